"""`qlrl distill` with vLLM's own server as teacher: killed, started again, trained on."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from megatron_qlrl.data.dataset import load_examples

PROMPTS, SAMPLES = 12, 3


@pytest.fixture
def config(
    write_config: Callable[..., Path], toy_data: Path, answering_model: Path, tmp_path: Path,
    port: int,
) -> Path:  # fmt: skip
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(toy_data / "train.parquet").slice(0, PROMPTS), few)
    return write_config(
        tmp_path,
        model={"path": str(answering_model)},
        data={"train_files": [str(few)], "eval_files": []},
        distill={
            "teacher": {
                "urls": [f"http://127.0.0.1:{port}/v1"], "model": "toy", "concurrency": 2,
                "attempts": 1,
            },
            "samples": SAMPLES,
            "temperature": 0.7,
            "max_response_tokens": 40,
        },
    )  # fmt: skip


def test_killed_and_started_again_no_sample_is_lost_or_doubled(
    qlrl: Callable[..., Any],
    start_qlrl: Callable[..., subprocess.Popen[str]],
    serve: Callable[[Path], subprocess.Popen[str]],
    answering_model: Path,
    config: Path,
    tmp_path: Path,
) -> None:
    out, journal = tmp_path / "sft.parquet", tmp_path / "sft.parquet.journal.jsonl"

    dead = qlrl("distill", config, out)
    assert dead.code == 2
    assert "the service failed 16 times in a row; 0 of 36 samples" in dead.messages[0]
    assert not out.exists()

    serve(answering_model)
    cut = start_qlrl("distill", config, out)
    deadline = time.monotonic() + 120
    while len(journal.read_bytes().splitlines()) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    cut.kill()
    cut.communicate()
    before = journal.read_bytes()
    assert 6 <= len(before.splitlines()) < 1 + PROMPTS * SAMPLES
    with journal.open("ab") as torn:
        torn.write(b'{"uid": "few:11", "sam')

    done = qlrl("distill", config, out).check()
    lines = journal.read_bytes().splitlines()
    assert b"".join(line + b"\n" for line in lines).startswith(before)
    samples = [json.loads(line) for line in lines[1:]]
    assert sorted((s["uid"], s["sample"]) for s in samples) == sorted(
        (f"few:{n}", k) for n in range(PROMPTS) for k in range(SAMPLES)
    )

    report = json.loads(done.out)
    assert report == json.loads((tmp_path / "sft.parquet.report.json").read_text())
    ((source, counts),) = report["sources"].items()
    assert source.startswith("toy_docqa")
    assert sum(counts.values()) == PROMPTS * SAMPLES
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == counts["kept"] > 0
    for row in rows:  # correct by an independent look
        gold = row["reward_model"]["ground_truth"]
        assert row["response"].rstrip().rstrip(".").endswith(f"the answer is {gold}")
        assert not row["response"].startswith("<think>")
    examples = load_examples([out], tokenizer=AutoTokenizer.from_pretrained(answering_model))
    assert len(examples) == len(rows)

    again = qlrl("distill", config, out, "distill.temperature=0.9")
    assert again.code == 2
    assert "was begun with other settings" in again.messages[0]
