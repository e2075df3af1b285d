"""Every reader of what comes from outside, given damaged input: a result or one named error.

Model folders have their own in tests/unit/config and tests/unit/weights.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fuzz import check_cases, mutate, mutate_bytes, mutate_json
from transformers import AutoTokenizer

from megatron_qlrl.config.load import load_config
from megatron_qlrl.data.builders.docs import build_docs
from megatron_qlrl.data.dataset import load_examples
from megatron_qlrl.distill.journal import Journal, Sample
from megatron_qlrl.distill.teacher import read_answer
from megatron_qlrl.reward.audit import audit
from megatron_qlrl.reward.judge import _model_names
from megatron_qlrl.reward.rules import check_gold
from megatron_qlrl.reward.score import Scorer
from megatron_qlrl.reward.verdict import NoVerdict, parse_verdict

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples").glob("*/config.yaml"))
OVERRIDES = (
    "policy.tp=2", "phases.0.steps=3", "phases=[]", "data.train_files=[a, b]",
    "run.dir=${run.name}", "model.rope_scaling={rope_type: yarn, factor: 4.0}",
    "phases.0.overrides.policy.cp=2", "reward.judge.urls=[http://h:1/v1]", "phases[0].name=x",
    "logging.wandb=off",
)  # fmt: skip
ROW: dict[str, Any] = {
    "data_source": "musique",
    "prompt": [{"role": "user", "content": "Which city? <|im_end|>"}],
    "reward_model": {"style": "rule", "ground_truth": "Paris"},
    "extra_info": {"index": 1, "question": "Which?"},
    "question": "Which city?",
    "response": "so\n</think>\n\nTherefore, the answer is (Paris).",
}
SCORED = {"data_source": "docmath", "question": "How many?", "ground_truth": "5", "id": [1]}
QUESTION = {"document": "a.txt", "question": "Who?", "answer": "me", "kind": "qa"}
COMPLETION: dict[str, Any] = {
    "id": "x",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": '{"equivalent": true}', "reasoning": "r"},
            "finish_reason": "stop",
        }
    ],
}
Damage = Callable[[Random], None]


def json_lines(rows: list[Any], rng: Random) -> bytes:
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(rng.randint(1, 2)):
        number = rng.randrange(len(lines))
        lines[number] = mutate_json(json.dumps(rows[number]).encode(), rng)
    raw = b"\n".join(lines) + b"\n"
    return mutate_bytes(raw, rng) if rng.random() < 0.1 else raw


def test_configs_and_overrides(tmp_path: Path, fuzz_cases: int) -> None:
    trees = [yaml.safe_load(path.read_text()) for path in CONFIGS]
    file, overrides = tmp_path / "c.yaml", []

    def damage(rng: Random) -> None:
        tree = rng.choice(trees)
        for _ in range(rng.randint(0, 2)):
            tree = mutate(tree, rng)
        raw = yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
        if rng.random() < 0.3:
            raw = mutate_bytes(raw, rng)
        file.write_bytes(raw)
        chosen = rng.sample(OVERRIDES, rng.randint(0, 2))
        damaged = (mutate_bytes(o.encode(), rng).decode("utf-8", "surrogateescape") for o in chosen)
        overrides[:] = damaged if rng.random() < 0.5 else chosen

    counts = check_cases(damage, lambda: load_config(file, overrides), cases=fuzz_cases // 3)
    assert counts.keys() == {"result", "ConfigError"}


def test_parquet_rows(tmp_path: Path, fuzz_cases: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "quickstart" / "base")
    file = tmp_path / "a.parquet"

    def damage(rng: Random) -> None:
        while True:
            row = ROW
            for _ in range(rng.randint(1, 3)):
                row = mutate(row, rng)
            try:
                table = pa.Table.from_pylist([ROW] * rng.randint(0, 1) + [row])
                pq.write_table(table, file)
                return
            except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
                continue  # no such file can be made

    counts = check_cases(
        damage, lambda: load_examples([file], tokenizer=tokenizer), cases=fuzz_cases
    )
    assert counts.keys() == {"result", "DataError"}


def test_parquet_bytes(tmp_path: Path, fuzz_cases: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "quickstart" / "base")
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([ROW] * 3), file)
    raw = file.read_bytes()
    counts = check_cases(
        lambda rng: file.write_bytes(mutate_bytes(raw, rng)),
        lambda: load_examples([file], tokenizer=tokenizer),
        cases=fuzz_cases,
    )
    assert counts.keys() <= {"result", "DataError"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_to_score(tmp_path: Path, fuzz_cases: int, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    rows = [SCORED | {"response": f"the answer is {n}"} for n in (5, 6)]
    written: list[str] = []

    def damage(rng: Random) -> None:
        written.clear()
        if kind == "jsonl":
            file.write_bytes(json_lines(rows, rng))
            return
        while True:
            try:
                table = pa.Table.from_pylist([rows[0], mutate(rows[1], rng)])
                pq.write_table(table, file)
                return
            except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
                continue

    def read() -> None:
        found = audit(
            file, Scorer(None), lambda row: written.append(json.dumps(row)), reasoning_open=False
        )
        found.table().encode()

    counts = check_cases(damage, read, cases=fuzz_cases)
    assert {"result"} <= counts.keys() <= {"result", "DataError"}


def test_questions(tmp_path: Path, fuzz_cases: int) -> None:
    (tmp_path / "a.txt").write_text("alpha")
    file, out = tmp_path / "q.jsonl", tmp_path / "o.parquet"

    def read() -> None:
        build_docs(
            documents_dir=tmp_path, questions=file, out=out, split="x", check_gold=check_gold
        )

    def damage(rng: Random) -> None:
        file.write_bytes(json_lines([QUESTION, QUESTION | {"document": ["a.txt"]}], rng))

    counts = check_cases(damage, read, cases=fuzz_cases)
    assert counts.keys() == {"result", "DataError"}


@pytest.mark.parametrize("read", [parse_verdict, read_answer, _model_names])
def test_replies(fuzz_cases: int, read: Callable[[bytes], Any]) -> None:
    body = [b""]
    sound = {"data": [{"id": "m"}, {"id": "n"}]} if read is _model_names else COMPLETION
    outcomes: Counter[str] = Counter()

    def damage(rng: Random) -> None:
        body[0] = mutate_json(json.dumps(sound).encode(), rng)

    def once() -> None:
        try:
            result = read(body[0])
            outcomes["result"] += 1
            str(result).encode()
        except NoVerdict as error:
            assert str(error)
            outcomes["none"] += 1

    check_cases(damage, once, cases=fuzz_cases)
    assert outcomes["result"] > 0
    assert outcomes["none"] > 0 or read is _model_names


def test_journals(tmp_path: Path, fuzz_cases: int) -> None:
    file = tmp_path / "j.jsonl"
    journal = Journal(file, {"t": 1.0})
    for number in range(2):
        journal.add(Sample("f:0", number, "text", finished=True))
    journal.close()
    raw = file.read_bytes()
    lines = [json.loads(line) for line in raw.splitlines()]

    def damage(rng: Random) -> None:
        file.write_bytes(json_lines(lines, rng) if rng.random() < 0.7 else mutate_bytes(raw, rng))

    def read() -> None:
        opened = Journal(file, {"t": 1.0})
        assert all(type(s.response) is str for s in opened.samples.values())
        opened.close()

    counts = check_cases(damage, read, cases=fuzz_cases)
    assert counts.keys() == {"result", "DataError"}
