"""Fingerprints of real configs and of the shipped toy model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from megatron_qlrl.config.schema import Config, JudgeConfig
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.train.fingerprint import (
    SETTINGS,
    check_resume,
    compare,
    fingerprint,
    rows_digest,
    use_of,
)
from megatron_qlrl.types import Prompt

BASE = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "base"


class FakeTokenizer:
    chat_template = "{{ messages }}"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


def _config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": str(BASE)},
        "phases": [
            {"name": "one", "max_input_tokens": 100, "steps": 4},
            {"name": "two", "max_input_tokens": 200, "steps": 4},
        ],
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 50},
        "policy": {"max_tokens_per_row": 2048},
    }
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return Config.model_validate(tree)


def _print(command: str = "rl", *, rows: str = "r", tokenizer: Any = None, **sections: Any) -> Any:
    found = fingerprint(
        _config(**sections), command, tokenizer=tokenizer or FakeTokenizer(), rows=rows
    )
    return json.loads(json.dumps(found))


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if inner:
            yield from _settings(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_setting_has_an_entry_and_every_entry_settings() -> None:
    settings = {s for s in _settings(Config) if not s.startswith("phases.")}
    assert "reward.judge.model" in settings and "policy.tp" in settings
    for setting in settings:
        assert use_of(setting) in ("meaning", "rl", "sft", "told", "free"), setting
    for entry in SETTINGS:
        assert any(s == entry or s.startswith(f"{entry}.") for s in settings), entry


def test_nothing_changed() -> None:
    assert compare(_print(), _print(), 6) == ([], "")


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        ({"run": {"seed": 1}}, "run.seed: 0 -> 1"),
        ({"rollout": {"group_size": 4}}, "rollout.group_size: 8 -> 4"),
        ({"rollout": {"prompts_per_step": 4}}, "rollout.prompts_per_step: 8 -> 4"),
        ({"algorithm": {"updates_per_step": 2}}, "algorithm.updates_per_step: 1 -> 2"),
        ({"algorithm": {"advantage": "rloo"}}, "algorithm.advantage: grpo -> rloo"),
        ({"reward": {"custom": {"a": "m:f"}}}, "reward.custom: {} -> {'a': 'm:f'}"),
        ({"reward": {"solved_above": 0.5}}, "reward.solved_above: 0.0 -> 0.5"),
        ({"data": {"enable_thinking": False}}, "data.enable_thinking: None -> False"),
        (
            {"reward": {"judge": {"urls": ["http://h:1/v1"], "model": "j"}}},
            "reward.judge.model: None -> j",
        ),
    ],
)
def test_what_changes_the_meaning_is_refused(sections: dict[str, Any], refused: str) -> None:
    assert compare(_print(), _print(**sections), 2)[0] == [f"{refused} (in phases.0)"]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"policy": {"tp": 2}}, "policy.tp: 1 -> 2"),
        ({"optimizer": {"lr": 1.0e-5}}, "optimizer.lr: 2e-06 -> 1e-05"),
        ({"rollout": {"tp": 2}}, "rollout.tp: 1 -> 2"),
        # What the warnings of a run that learns nothing advise must be possible on resume.
        ({"rollout": {"max_response_tokens": 99}}, "rollout.max_response_tokens: 50 -> 99"),
        ({"algorithm": {"generation_rounds": 4}}, "algorithm.generation_rounds: 1 -> 4"),
        ({"stability": {"kl_spike": "stop"}}, "stability.kl_spike: warn -> stop"),
    ],
)
def test_what_does_not_is_told(sections: dict[str, Any], told: str) -> None:
    assert compare(_print(), _print(**sections), 2) == ([], f"goes on with other settings: {told}")


def test_another_source_of_an_own_reward_is_told() -> None:
    """A function that stopped the run has to be mended before it goes on."""
    config = _config(reward={"custom": {"a": "m:f"}})
    old, new = (
        fingerprint(
            config, "rl", tokenizer=FakeTokenizer(), rows="r", own_rewards={"a (m:f)": digest}
        )
        for digest in ("12ab", "34cd")
    )
    told = "goes on with other settings: the source of a (m:f): 12ab -> 34cd"
    assert compare(old, new, 2) == ([], told)
    assert compare(old, old, 2) == ([], "")


def test_paths_and_records_are_free(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "moved")
    other = _print(
        model={"path": str(tmp_path / "moved")},
        run={"dir": "elsewhere", "name": "x"},
        data={"train_files": ["/other/place/train.parquet"]},
        logging={"tensorboard": True},
        checkpoint={"every_steps": 1},
    )
    assert compare(_print(), other, 2) == ([], "")


# --- contents ----------------------------------------------------------------------------


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(BASE, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    size = int.from_bytes(weights[:8], "little")
    start, end = json.loads(weights[8 : 8 + size])["model.norm.weight"]["data_offsets"]
    weights[8 + size + (start + end) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    here = _print(model={"path": str(folder)})
    assert compare(_print(), here, 2)[0] == ["the model's weights"]
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    here = _print(model={"path": str(folder)})
    assert compare(_print(), here, 2)[0] == ["the model's config.json", "the model's weights"]


def test_another_tokenizer_template_or_data_is_refused() -> None:
    class Other(FakeTokenizer):
        chat_template = "{{ messages }} "

        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 0}

    changed = compare(_print(), _print(tokenizer=Other(), rows="s"), 2)[0]
    assert changed == [
        "the tokenizer",
        "the chat template",
        "the training data, as the model sees it",
    ]


def test_rows_digest_sees_every_field_and_the_order() -> None:
    def prompt(uid: str = "a:0", ids: tuple[int, ...] = (1, 2), **changes: str) -> Prompt:
        fields = {"data_source": "s", "question": "q", "ground_truth": "g"} | changes
        return Prompt(uid, np.array(ids, np.int32), **fields)

    one, two = prompt(), prompt("a:1")
    answer = [np.array([5], np.int32)]
    variants = [
        rows_digest([one, two]),
        rows_digest([two, one]),
        rows_digest([one]),
        rows_digest([one], answer),
        rows_digest([one], [np.array([6], np.int32)]),
        rows_digest([prompt(ids=(1, 3))]),
        rows_digest([prompt(ground_truth="h")]),
        rows_digest([prompt(data_source="t")]),
        rows_digest([prompt(question="r")]),
    ]
    assert len(set(variants)) == len(variants)
    assert rows_digest([prompt()]) == rows_digest(iter([one]))


# --- phases ------------------------------------------------------------------------------


def _phases(*phases: tuple[int, int, dict[str, Any]]) -> list[dict[str, Any]]:
    """(max_input_tokens, steps, more) of each."""
    return [
        {"name": f"p{k}", "max_input_tokens": n, "steps": steps} | more
        for k, (n, steps, more) in enumerate(phases)
    ]


ONE, TWO = (100, 4, {}), (200, 4, {})


@pytest.mark.parametrize(
    ("step", "phases", "refused"),
    [
        # Begun ones are as they were.
        (2, [(90, 4, {}), TWO], ["max_input_tokens: 100 -> 90 (in phases.0)"]),
        (6, [ONE, (300, 4, {})], ["max_input_tokens: 200 -> 300 (in phases.1)"]),
        (6, [ONE, (200, 4, {"reference": "renew"})], ["reference: keep -> renew (in phases.1)"]),
        (6, [ONE], ["phases.1 is gone"]),
        (6, [ONE, (200, 4, {"overrides": {"rollout": {"group_size": 4}}})],
         ["rollout.group_size: 8 -> 4 (in phases.1)"]),
        # Those that have not begun may change.
        (4, [ONE, (300, 9, {"reference": "renew"})], []),
        (2, [ONE, (200, 4, {"overrides": {"rollout": {"group_size": 4}}})], []),
        (4, [ONE], []),
        (8, [ONE, TWO, (300, 1, {})], []),
        # Steps: more or fewer in the phase that goes on, not fewer than are done.
        (2, [(100, 3, {}), TWO], []),
        (2, [(100, 2, {}), TWO], []),
        (4, [(100, 6, {}), TWO], []),
        (8, [ONE, (200, 6, {})], []),
        (6, [ONE, (200, 1, {})], ["phases.1.steps: 4 -> 1, and 2 are done"]),
        (3, [(100, 2, {}), TWO], ["phases.0.steps: 4 -> 2, and 3 are done"]),
        (6, [(100, 5, {}), TWO], ["phases.0.steps: 4 -> 5, and it is over"]),
    ],
)  # fmt: skip
def test_phases(step: int, phases: list[Any], refused: list[str]) -> None:
    saved, now = _print(phases=_phases(ONE, TWO)), _print(phases=_phases(*phases))
    assert compare(saved, now, step)[0] == refused


def test_change_of_a_phase_is_told() -> None:
    saved = _print(phases=_phases(ONE, TWO))
    longer = _print(phases=_phases(ONE, (200, 6, {})))
    assert compare(saved, longer, 6)[1].endswith("settings: phases.1.steps: 4 -> 6")
    overrides = {"overrides": {"policy": {"tp": 2}}}
    other = _print(phases=_phases(ONE, (200, 4, overrides)))
    assert compare(saved, other, 6)[1].endswith(": phases.1.overrides.policy.tp: None -> 2")


# --- SFT, versions, the message ------------------------------------------------------------


def test_sft_has_settings_of_its_own() -> None:
    saved = _print("sft")
    assert compare(saved, _print("sft", sft={"batch_size": 64}), 2)[0] == [
        "sft.batch_size: 128 -> 64"
    ]
    others = {"rollout": {"group_size": 4}, "algorithm": {"kl_coef": 0.5}, "phases": []}
    assert compare(saved, _print("sft", **others), 2)[0] == []
    assert compare(saved, _print("sft", sft={"epochs": 1}), 2) == (
        [],
        "goes on with other settings: sft.epochs: 3 -> 1",
    )


def test_what_another_version_does_not_know_is_not_compared() -> None:
    saved, now = _print(), _print()
    del saved["phases"][0]["meaning"]["algorithm.kl_kind"], saved["contents"]["the tokenizer"]
    saved["told"]["policy.gone"] = 1
    now["phases"][0]["meaning"]["algorithm.new"] = 1
    assert compare(saved, now, 2) == ([], "")


def test_message_names_the_ways_out() -> None:
    state = {"step": 2, "dtype": "float32", "fingerprint": _print()}
    with pytest.raises(CheckpointError) as caught:
        check_resume(Path("run/step_2"), state, _print(rollout={"group_size": 4}))
    said = str(caught.value)
    assert said.startswith("run/step_2 is of another run: rollout.group_size: 8 -> 4 (in phases.0)")
    assert "set run.dir to a new folder" in said and "checkpoint.resume=false" in said


def test_checkpoint_of_before_fingerprints_goes_on() -> None:
    said = check_resume(Path("run/step_2"), {"step": 2}, _print())
    assert said.startswith("checkpoint run/step_2 does not say") and "\n" not in said


def test_judge_is_part_of_the_meaning_by_its_model_alone() -> None:
    assert {use_of(f"reward.judge.{name}") for name in JudgeConfig.model_fields} == {"rl", "free"}
    keys = {"urls": ["http://h:1/v1"], "model": "j"}
    saved = _print(reward={"judge": keys})
    moved = _print(reward={"judge": keys | {"urls": ["http://other:2/v1"]}})
    assert compare(saved, moved, 2) == ([], "")


def test_type_of_the_weights_is_that_of_the_checkpoint_whatever_the_config_said() -> None:
    # Before model.dtype was honoured without a GPU, such a config was trained in float32.
    state = {"step": 2, "dtype": "float32", "fingerprint": _print(model={"dtype": "bfloat16"})}
    assert check_resume(Path("run/step_2"), state, _print()) == ""
    with pytest.raises(CheckpointError, match="the weights' type: float32 -> bfloat16 changed"):
        check_resume(Path("run/step_2"), state, _print(model={"dtype": "bfloat16"}))
