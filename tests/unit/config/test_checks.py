"""Each mistake gives one ConfigError that says what, where and how to mend it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_qlrl.config import checks
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import Experts, ModelShape
from megatron_qlrl.errors import ConfigError

HF: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
SHAPE = ModelShape.from_hf(HF)


def make_config(**sections: Any) -> Config:
    return Config.model_validate({"model": {"path": "m"}, **sections})


def test_layout_that_fits() -> None:
    config = make_config(policy={"tp": 4, "pp": 3, "cp": 2}, rollout={"tp": 2})
    checks.check_layout(config, SHAPE, world_size=48)
    assert checks.smallest_world_size([config]) == 24


@pytest.mark.parametrize(
    ("train", "rollout_tp", "smallest"), [((1, 1, 1), 1, 1), ((2, 3, 1), 4, 12), ((1, 1, 1), 8, 8)]
)
def test_smallest_world_size(train: tuple[int, ...], rollout_tp: int, smallest: int) -> None:
    policy = dict(zip(("tp", "pp", "cp"), train, strict=True))
    config = make_config(policy=policy, rollout={"tp": rollout_tp})
    assert checks.smallest_world_size([config]) == smallest


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        (
            {"policy": {"tp": 8}},
            8,
            r"policy\.tp=8 does not divide the model's num_key_value_heads=4; "
            r"valid values: 1, 2, 4$",
        ),
        ({"policy": {"tp": 3}}, 3, r"num_attention_heads=8, num_key_value_heads=4; valid"),
        ({"policy": {"pp": 4}}, 4, r"num_hidden_layers=6; valid values: 1, 2, 3, 6$"),
        ({"policy": {"tp": 2, "cp": 2}}, 6, r"6 processes cannot hold .* a multiple of 4"),
        ({"rollout": {"tp": 8}}, 8, r"rollout\.tp=8 does not divide .*valid values: 1, 2, 4$"),
        (
            {"rollout": {"tp": 4}},
            6,
            r"rollout\.tp=4 does not divide the 6 processes; valid values: 1, 2$",
        ),
    ],
)
def test_layout_that_does_not_fit(sections: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checks.check_layout(make_config(**sections), SHAPE, world_size=world_size)


EXPERTS = Experts(num=8, per_token=2, ffn_size=48, normalise=True)


@pytest.mark.parametrize(
    ("policy", "processes", "message"),
    [
        (
            {"ep": 3},
            3,
            r"policy\.ep=3 does not divide the model's num_experts=8; valid .*1, 2, 4, 8",
        ),
        ({"ep": 4, "pp": 2}, 4, r"policy\.ep=4 does not divide the 2 ranks .*valid values: 1, 2$"),
        ({"ep": 4, "tp": 2, "cp": 3}, 12, r"must divide one another.*valid values: 1, 2$"),
        ({"tp": 2, "sequence_parallel": False}, 2, "policy.sequence_parallel=false with"),
        ({"fp8": "e4m3"}, 1, "policy.fp8=e4m3 is not supported for a model with experts"),
    ],
)
def test_experts_must_be_divided_evenly(
    policy: dict[str, Any], processes: int, message: str
) -> None:
    shape = replace(SHAPE, experts=EXPERTS)
    with pytest.raises(ConfigError, match=message):
        checks.check_layout(make_config(policy=policy), shape, world_size=processes)


def test_expert_sizes_that_fit() -> None:
    shape = replace(SHAPE, ffn_size=97, experts=EXPERTS)  # no part has the dense MLP's size
    for policy, processes in (
        ({"ep": 8}, 8), ({"ep": 2, "tp": 2}, 2), ({"ep": 8, "tp": 2}, 8), ({"tp": 4}, 4),
    ):  # fmt: skip
        checks.check_layout(make_config(policy=policy), shape, world_size=processes)
    with pytest.raises(ConfigError, match=r"policy\.ep=2 divides experts, and this model has none"):
        checks.check_layout(make_config(policy={"ep": 2}), SHAPE, world_size=2)


def test_ffn_counts_for_tp() -> None:
    shape = replace(SHAPE, ffn_size=98)
    with pytest.raises(ConfigError, match=r"intermediate_size=98; valid values: 1, 2$"):
        checks.check_layout(make_config(policy={"tp": 4}), shape, world_size=4)


def _long(max_input: int, **model: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m", **model},
            "phases": [{"name": "one", "max_input_tokens": max_input, "steps": 1}],
            "rollout": {"max_response_tokens": 96},
        }
    )


def test_length_limit_is_the_models_positions() -> None:
    checks.check_layout(_long(4000), SHAPE, world_size=1)
    with pytest.raises(ConfigError, match=r"4001 \+ 96 tokens, is beyond .* 4096 .*factor: 2\.0"):
        checks.check_layout(_long(4001), SHAPE, world_size=1)


@pytest.mark.parametrize("by_the_run", [False, True])
def test_length_limit_with_rope_scaling(by_the_run: bool) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    own, of_run = ({}, yarn) if by_the_run else ({"rope_scaling": yarn}, None)
    shape = ModelShape.from_hf(HF | own, of_run)
    checks.check_layout(_long(8096), shape, world_size=1)
    message = r"beyond the model's 8192 .*factor: 3\.0, original_max_position_embeddings: 4096"
    with pytest.raises(ConfigError, match=message):
        checks.check_layout(_long(8097), shape, world_size=1)


def _data(tmp_path: Path, **names: list[str]) -> dict[str, list[str]]:
    for files in names.values():
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    return {key: [str(tmp_path / n) for n in files] for key, files in names.items()}


def test_files_that_exist(tmp_path: Path) -> None:
    data = _data(tmp_path, train_files=["a.parquet"], eval_files=["b.parquet", "c.parquet"])
    config = _long(100).model_copy(update={"data": make_config(data=data).data})
    checks.check_files(config, "rl")
    checks.check_files(config, "eval")
    with pytest.raises(ConfigError, match=r"`qlrl sft` needs data\.sft_files"):
        checks.check_files(config, "sft")


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    data = {"eval_files": ["gone/x.parquet"], "sft_files": ["gone/y.parquet"]}
    with pytest.raises(ConfigError) as caught:
        checks.check_files(make_config(data=data), "sft")
    message = str(caught.value)
    assert "data.sft_files: gone/y.parquet; data.eval_files: gone/x.parquet" in message
    assert str(Path.cwd()) in message


def test_rl_needs_phases_and_benchmarks_need_names(tmp_path: Path) -> None:
    data = _data(tmp_path, train_files=["a.parquet"], eval_files=["p/b.parquet", "q/b.parquet"])
    with pytest.raises(ConfigError, match="at least one entry under phases"):
        checks.check_files(make_config(data=data), "rl")
    with pytest.raises(ConfigError, match=r"data\.eval_files: .* b appears twice"):
        checks.check_files(make_config(data=data), "eval")


def test_machine() -> None:
    plain = make_config()
    checks.check_machine(plain, processes=8, num_gpus=8)
    with pytest.raises(ConfigError, match=r"--processes 9 on a machine with 8 usable"):
        checks.check_machine(plain, processes=9, num_gpus=8)


def test_fp8_needs_a_gpu_and_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = make_config(policy={"fp8": "hybrid"})
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"policy\.fp8=hybrid needs a GPU"):
        checks.check_machine(fp8, processes=1, num_gpus=0)
    with pytest.raises(ConfigError, match=r"fp8=hybrid needs Transformer Engine, which is not"):
        checks.check_machine(fp8, processes=8, num_gpus=8)
    monkeypatch.setattr(checks, "find_spec", {"transformer_engine": object()}.get)
    checks.check_machine(fp8, processes=8, num_gpus=8)


@pytest.mark.parametrize(
    ("recipe", "tp", "wrong"),
    [
        # Qwen2.5-14B: hidden 5120, FFN 13824 = 108 x 128, 40 and 8 heads of 128.
        ("blockwise", 1, None),
        ("blockwise", 4, None),  # FFN 3456 = 27 x 128, 2 key/value heads: 256
        ("blockwise", 8, "intermediate_size 1728"),  # 13.5 x 128; key/value 128
        ("mxfp8", 8, None),  # 54 x 32
        ("tensorwise", 8, None),
    ],
)
def test_fp8_needs_whole_blocks_on_every_rank(recipe: str, tp: int, wrong: str | None) -> None:
    hf = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "vocab_size": 152064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "tie_word_embeddings": False,
    }  # fmt: skip
    shape = ModelShape.from_hf(hf)
    config = make_config(policy={"fp8": "hybrid", "fp8_recipe": recipe, "tp": tp})
    if wrong is None:
        checks.check_layout(config, shape, world_size=8)
        return
    with pytest.raises(ConfigError, match=re.escape(f"this model has {wrong} there")):
        checks.check_layout(config, shape, world_size=8)


@pytest.mark.parametrize(
    ("policy", "multiple"),
    [
        ({}, 1),
        ({"tp": 4}, 4),
        ({"tp": 4, "sequence_parallel": False}, 1),
        ({"fp8": "hybrid"}, 128),
        ({"fp8": "e4m3", "fp8_recipe": "tensorwise", "tp": 4}, 64),
        ({"fp8": "e4m3", "fp8_recipe": "delayed", "tp": 4, "sequence_parallel": False}, 16),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8", "tp": 2}, 64),
    ],
)
def test_tokens_of_a_rank_are_padded_for_shards_and_blocks(
    policy: dict[str, Any], multiple: int
) -> None:
    assert make_config(policy=policy).policy.tokens_multiple == multiple


def test_float32_is_for_machines_without_a_gpu() -> None:
    wide = make_config(model={"path": "m", "dtype": "float32"})
    checks.check_machine(wide, processes=1, num_gpus=0)
    with pytest.raises(ConfigError, match="set model.dtype=bfloat16"):
        checks.check_machine(wide, processes=1, num_gpus=1)
