"""The model card, read back by huggingface_hub and by a Markdown parser."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

from megatron_qlrl.config.schema import Config
from megatron_qlrl.release.card import model_card
from megatron_qlrl.release.record import read_record, training_facts
from tests.conftest import HF_CONFIG
from tests.run_folder import PAYLOADS, change_config, write_certificate, write_evaluation, write_run

FACTS = {
    "base model": "Qwen/Qwen3-4B",
    "licence": {"license": "apache-2.0"},
    "from a release": True,
    "software": "megatron_qlrl 0.1",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released folder's config.json."""
    return hf(tmp_path)


def hf(tmp_path: Path, **changes: Any) -> Path:
    out = tmp_path / "hf"
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(HF_CONFIG | {"dtype": "bfloat16"} | changes))
    return out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two phases of two steps, evaluated before it and after both."""
    folder = write_run(tmp_path / "run")
    write_evaluation(folder, "short", [1.0, 1.0, 0.0, 1.0])
    write_evaluation(folder, "long", [1.0, 1.0, 1.0, 0.0, 0.0])
    return folder


def card_of(run: Path, folder: Path, *, step: int = 4, command: str = "rl", **facts: Any) -> str:
    record = read_record(FACTS | facts, command=command, steps_done=step, folder=run)
    return model_card(record, folder)


def metadata(card: str) -> ModelCardData:
    """What the hub reads, validated by its own client."""
    data = ModelCard(card, ignore_metadata_errors=False).data
    assert isinstance(data, ModelCardData)
    return data


def test_the_hub_reads_base_licence_and_results(run: Path, folder: Path) -> None:
    data = metadata(card_of(run, folder))
    assert (data.base_model, data.license) == ("Qwen/Qwen3-4B", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags is not None and "megatron_qlrl" in data.tags
    assert data.model_name == "qlrl"
    assert data.eval_results is not None
    [result] = data.eval_results
    assert (result.dataset_name, result.metric_name) == ("set", "val/set/score")
    assert (result.metric_type, result.metric_value) == ("score", 0.6)  # 3 of 5, after `long`
    index = data.to_dict()["model-index"]
    assert index[0]["results"][0]["task"] == {"type": "text-generation"}


def test_scores_stand_with_questions_and_errors(run: Path, folder: Path) -> None:
    card = card_of(run, folder)
    assert "| benchmark | questions | `start` | `short` | `long` |" in card
    # 2 of 4: sqrt(1/3 / 4); 3 of 4: sqrt(1/4 / 4); 3 of 5: sqrt(0.3 / 5)
    row = "| `val/set/score` | 5 | 0.5000 ± 0.2887 | 0.7500 ± 0.2500 | 0.6000 ± 0.2449 |"
    assert row in card


def test_a_checkpoint_from_the_middle_has_what_was_known_there(run: Path, folder: Path) -> None:
    card = card_of(run, folder, step=2)
    [result] = metadata(card).eval_results or []
    assert result.metric_value == 0.75
    assert "| benchmark | questions | `start` | `short` |\n" in card
    assert "| `short` | 100 | 2 of 2 |" in card and "| `long` | 200 | 0 of 2 |" in card
    assert "| tokens, prompts included | 8,000 |" in card


def test_a_run_that_started_from_another_one_names_it(run: Path, folder: Path) -> None:
    """By its folder's name and by what nobody can mistake; FACTS say that model.path is a release,
    whose weights did not count."""
    card = card_of(run, folder, parent="base at step 4 (sha256 of that checkpoint's ...: ab12)")
    assert (
        "| this run started from | a checkpoint of another run, `base at step 4 (sha256 of that "
        "checkpoint's ...: ab12)`; data, settings and cost of that run are not on this card |"
    ) in card
    assert "an earlier run" not in card
    assert "a checkpoint of another run" not in card_of(run, folder)


def test_weights_that_were_not_evaluated_say_so(run: Path, folder: Path) -> None:
    card = card_of(run, folder, step=3)
    assert metadata(card).eval_results is None
    assert "- These very weights were not evaluated." in card
    write_evaluation(run, "step_1", [1.0])
    write_evaluation(run, "step_3", [0.0, 1.0])
    card = card_of(run, folder, step=3)
    assert [r.metric_value for r in metadata(card).eval_results or []] == [0.5]
    assert "`step_3` |" in card and "step_1" not in card


def test_cost_is_that_of_the_record(run: Path, folder: Path) -> None:
    card = card_of(run, folder)
    # 4 steps of 10 s and an evaluation of 20 s, by 2 processes; the evaluation is before a step.
    assert "| processes, one for each device | 2 |" in card
    assert "| CPU process hours | 0.0333 |" in card
    assert "| tokens, prompts included | 16,000 |" in card


def test_data_settings_and_reward(run: Path, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "secret-folder" / "train.parquet"
    data.parent.mkdir()
    pq.write_table(pa.table({"a": [1, 2, 3]}), data)
    import hashlib

    change_config(
        run,
        data={"train_files": [str(data), "/gone/old.parquet"]},
        algorithm={"kl_coef": 0.25},
        evaluation={"endpoint": {"urls": ["http://secret-host:1/v1"], "model": "m"}},
        reward={"judge": {"urls": ["http://secret-host:2/v1"], "model": "/secret-folder/judge",
                          "api_key_env": "SECRET_ENV"}},
        run={"dir": "/secret-folder/run", "name": "/secret-folder/mine"},
        logging={"project": "secret-project"},
    )  # fmt: skip
    card = card_of(run, folder)
    assert f"| `train.parquet` | 3 | `{hashlib.sha256(data.read_bytes()).hexdigest()}` |" in card
    assert "| `old.parquet` | not at hand | `-` |" in card
    assert "| `algorithm.kl_coef` | `0.25` |" in card
    assert "| `optimizer.lr` | `1e-05` |" in card
    assert "judge `judge`" in card
    assert metadata(card).model_name == "mine"
    assert "secret" not in card.lower()
    assert str(tmp_path) not in card and "/gone" not in card


def test_the_judges_certificate(run: Path, folder: Path) -> None:
    judge = {"urls": ["http://secret-host:2/v1"], "model": "judge"}
    change_config(run, reward={"judge": judge})
    assert "the LLM judge `judge`. How well this judge judges was not measured." in card_of(
        run, folder
    )
    judge |= {"certificate": "/secret-folder/c.json", "max_false_positive": 0.05}
    change_config(run, reward={"judge": judge})
    write_certificate(run / "judge_certificate.json")
    card = card_of(run, folder)
    assert (
        "On labelled pairs of answers (`qlrl judge certify`) the judge had false positives 2.0% "
        "(1 of 50 pairs, 95% interval 0.4% to 10.5%), false negatives 5.0% (2 of 40 pairs, "
    ) in card
    assert (
        "measured 2026-01-02, 3 verdicts a pair. The run demanded false positives of at most 5.0%."
        in card
    )
    assert "secret" not in card


def test_an_unstated_licence_is_said(run: Path, folder: Path) -> None:
    card = card_of(run, folder, licence={}, **{"base model": "not named (set model.name)"})
    assert metadata(card).license is None and metadata(card).base_model is None
    assert "| licence | not stated: the base model's folder has no card that names one." in card


def test_facts_of_the_checkpoint_alone(folder: Path, tmp_path: Path) -> None:
    """An exported checkpoint, perhaps of an older version, whose run is elsewhere."""
    record = read_record(
        {"base model": "a/b", "seed": 3, "phases": "p (<= 5)"},
        command="rl", steps_done=4, folder=tmp_path / "nowhere",
    )  # fmt: skip
    card = model_card(record, folder)
    assert metadata(card).base_model == "a/b"
    assert "`p (<= 5)`" in card and "Seed `3`." in card
    assert card.count("The run's folder was not at hand") == 5


def test_imported_weights_are_not_called_trained(folder: Path, tmp_path: Path) -> None:
    record = read_record(FACTS, command="import", steps_done=0, folder=tmp_path / "nowhere")
    card = model_card(record, folder)
    assert "weights that were converted and not trained" in card
    assert "## Hardware" not in card and "## Phases" not in card


def test_yarn_of_the_run_and_yarn_that_could_be(run: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
            "rope_theta": 1e6}  # fmt: skip
    stretched = hf(tmp_path, rope_parameters=rope, max_position_embeddings=131072)
    card = card_of(run, stretched)
    assert "stretches 32,768 positions to 131,072 by YaRN with factor 4." in card
    assert "--dtype bfloat16 --max-model-len 131072\n" in card
    assert "--hf-overrides" not in card
    plain = card_of(run, hf(tmp_path, max_position_embeddings=32768))
    overrides = json.loads(plain.partition("--hf-overrides '")[2].partition("'\n")[0])
    assert overrides["max_position_embeddings"] == 131072
    assert overrides["rope_parameters"]["factor"] == 4.0
    assert overrides["rope_parameters"]["original_max_position_embeddings"] == 32768
    assert "--hf-overrides" not in card_of(run, hf(tmp_path, max_position_embeddings=4096))


HOSTILE = [
    *PAYLOADS,
    "a\n---\nlicense: mit\n",
    "x|y|z",
    "`` ` ```",
    "\n```\n# heading\n",
    "[a](javascript:alert(1))",
    "![x](http://tracker)",
    "https://tracker.example",
    "*/ & &lt; \\| \\` \\",
    "key: {a: [1",
    "!!python/object/apply:os.system [id]",
    "\u202egnp.exe",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_text(run: Path, folder: Path, text: str) -> None:
    """In the names of run, data files, benchmarks and judge, in settings and in the facts."""
    name = text.replace("/", "_").replace("\x00", "").encode("utf-8", "replace").decode()
    write_evaluation(run, "long", [1.0, 0.0], benchmark=name)
    name = name.strip() or "x"
    change_config(
        run,
        run={"name": name},
        data={"train_files": [f"/d/{name}"]},
        reward={"judge": {"urls": ["http://h/v1"], "model": name}},
    )
    starts = {"world_size": 1, "device": text, "torch": text}
    (run / "starts.jsonl").write_text(json.dumps(starts) + "\n")
    with_facts = {"base model": text, "software": text}
    card = card_of(run, folder, **with_facts)
    data = metadata(card)
    assert data.license == "apache-2.0" and data.base_model is None
    assert set(data.to_dict()) == {
        "library_name", "pipeline_tag", "license", "tags", "model-index",
    }  # fmt: skip
    body = card.partition("\n---\n")[2]
    parsed = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    tokens = [t for token in parsed for t in (token, *(token.children or ()))]
    assert not [t for t in tokens if t.type in ("html_block", "html_inline", "image")]
    links = [t.attrs["href"] for t in tokens if t.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2505.17667"]
    headings = [t for t in tokens if t.type == "heading_open"]
    assert len(headings) == 10
    widths = [line.replace("\\|", "").count("|") for line in body.splitlines() if line[:1] == "|"]
    assert set(widths) <= {3, 4, 6, 7}


def test_facts_of_a_config(tmp_path: Path) -> None:
    base = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / "1"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    config = Config.model_validate({"model": {"path": str(base)}})
    facts = training_facts(config)
    assert facts["base model"] == "Qwen/Qwen3-4B"
    assert facts["licence"] == {"license": "apache-2.0"}
    assert facts["from a release"] is False
    assert str(tmp_path) not in json.dumps(facts)
