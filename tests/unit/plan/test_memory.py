"""Parameters and bytes against published figures and against sums written out by hand."""

from dataclasses import replace

import pytest

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.config.shape import Experts, ModelShape
from megatron_qlrl.plan.activations import GPU, Activations, Row
from megatron_qlrl.plan.memory import (
    active_parameters,
    expert_parameters,
    model_state,
    stage_parameters,
    stream_peak,
    update_peak,
)


def qwen(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> ModelShape:
    return ModelShape.from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
        }
    )


TINY = replace(qwen(8, 2, 2, 1, 10), vocab_size=16, head_dim=4)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        # As counted on the model cards of Qwen2.5-7B, -14B and -32B (7.61, 14.7 and 32.5 B).
        ((3584, 28, 28, 4, 18_944), 7_615_616_512),
        ((5120, 48, 40, 8, 13_824), 14_770_033_664),
        ((5120, 64, 40, 8, 27_648), 32_763_876_352),
    ],
)
def test_parameters_of_published_models(sizes: tuple[int, ...], parameters: int) -> None:
    assert sum(stage_parameters(qwen(*sizes), tp=1, pp=1, stage=0)) == parameters


def test_parameters_by_hand() -> None:
    # norm 8, proj 8*8, qkv (8 + 2*4)*8, its bias 16, norm 8, fc1 2*10*8, fc2 10*8
    layer = [8, 64, 128, 16, 8, 160, 80]
    assert stage_parameters(TINY, tp=1, pp=1, stage=0) == [128, *layer, *layer, 8, 128]
    assert stage_parameters(replace(TINY, num_kv_heads=2), tp=2, pp=1, stage=0)[:8] == [
        64, 8, 32, 96, 12, 8, 80, 40,
    ]  # fmt: skip
    assert stage_parameters(TINY, tp=1, pp=2, stage=0) == [128, *layer]
    assert stage_parameters(TINY, tp=1, pp=2, stage=1) == [*layer, 8, 128]


EXPERTS = Experts(num=4, per_token=2, ffn_size=3, normalise=True)


def test_experts_by_hand() -> None:
    moe = replace(TINY, experts=EXPERTS)
    # norm, proj, qkv with bias, norm, router 4*8, and for each expert fc1 2*3*8 and fc2 3*8
    layer = [8, 64, 128, 16, 8, 32]
    assert stage_parameters(moe, tp=1, pp=2, stage=0) == [128, *layer, *[48, 24] * 4]
    assert stage_parameters(moe, tp=1, pp=2, stage=0, ep=2) == [128, *layer, *[48, 24] * 2]
    assert expert_parameters(moe) == 2 * 4 * 72
    assert expert_parameters(moe, pp=2, ep=4) == 72
    num = sum(stage_parameters(moe, tp=1, pp=1, stage=0))
    assert active_parameters(moe) == num - 2 * 2 * 72  # half of the experts


def test_experts_share_their_state_with_the_ranks_that_hold_the_same_ones() -> None:
    """8 ranks, tp 2 x cp 2 x dp 2, ep 4: an expert is on two of them, other weights on four."""
    policy = PolicyConfig(tp=2, cp=2, ep=4, distributed_optimizer=True)
    state = model_state([600, 400], policy, width=2, dp=2, experts=400)
    assert state["optimizer"] == 12 * (600 / 4 + 400 / 2)
    assert state["weights"] + state["gradients"] == 6 * 1000


def test_stream_gathers_experts_over_their_own_ranks() -> None:
    """Buckets of single tensors. Fullest: fc1 of 48 comes from 8 ranks, 8 x 48 and this rank's own,
    and the engine keeps all 8 experts of 72 of the layer before."""
    moe = replace(TINY, experts=replace(EXPERTS, num=8))
    peak = stream_peak(moe, PolicyConfig(ep=8), width=4, bucket_bytes=4)
    assert peak == 4 * (9 * 48 + 8 * 72)


def test_a_tied_head_is_a_copy_on_a_stage_of_its_own() -> None:
    tied = replace(TINY, tied=True)
    assert stage_parameters(tied, tp=1, pp=1, stage=0)[-1] == 8
    assert stage_parameters(tied, tp=1, pp=2, stage=1)[-1] == 128


@pytest.mark.parametrize(
    ("width", "distributed", "ranks", "bytes_each"),
    [
        # Megatron-core's table (developer guide, "Distributed Optimizer"), d = 8:
        # bf16 parameters, fp32 gradients: 18, or 6 + 12/d; fp32 both: 16, or 8 + 8/d.
        (2, False, (8, 1), 18),
        (2, True, (8, 1), 6 + 12 / 8),
        (2, True, (4, 2), 6 + 12 / 8),  # context parallel ranks share the state too
        (4, False, (8, 1), 16),
        (4, True, (8, 1), 8 + 8 / 8),
    ],
)
def test_state_of_a_parameter(
    width: int, distributed: bool, ranks: tuple[int, int], bytes_each: float
) -> None:
    dp, cp = ranks
    policy = PolicyConfig(cp=cp, distributed_optimizer=distributed)
    state = model_state([600, 400], policy, width=width, dp=dp)
    assert sum(state.values()) == pytest.approx(1000 * bytes_each)


def test_optimizer_that_waits_makes_a_moment_of_its_own() -> None:
    def peak(tokens: int, *, offload: bool) -> tuple[str, float]:
        row = Row(tokens, 8)
        found = Activations(TINY, PolicyConfig(), row, width=2, kernels=GPU)
        at = update_peak(found, dp=1, micro_batches=1, stage=0, offload=offload)
        return at.moment, at.total

    num = sum(stage_parameters(TINY, tp=1, pp=1, stage=0))
    # A long row: without Adam's 12 bytes a parameter at its fullest moment.
    moment, total = peak(100_000, offload=False)
    assert peak(100_000, offload=True) == (moment, total - 12 * num)
    # A model that outweighs a row: weights, gradients and Adam, nothing else.
    wide = replace(TINY, vocab_size=2**24)
    num = sum(stage_parameters(wide, tp=1, pp=1, stage=0))
    found = Activations(wide, PolicyConfig(), Row(8, 8), width=2, kernels=GPU)
    at = update_peak(found, dp=1, micro_batches=1, stage=0, offload=True)
    assert (at.moment, at.total) == ("optimizer step", 18 * num)


def test_fp8_keeps_copies_of_the_weights() -> None:
    state = model_state([1000], PolicyConfig(fp8="hybrid"), width=2, dp=1)
    assert state["FP8 weights"] == 2000


def test_stream_holds_two_buckets() -> None:
    # Buckets of at most 200 elements: [128, 8, 64], [128, 16, 8], [160], [80, 8, 64], ... The
    # fullest moment: the first is read (200, and a copy of its 128) while the second (152) is
    # gathered from a copy of its own.
    assert stream_peak(TINY, PolicyConfig(), width=2, bucket_bytes=400) == 2 * (200 + 128 + 304)
    # Tensors larger than a bucket have one each: 160 and its copy, then 80 twice.
    assert stream_peak(TINY, PolicyConfig(), width=2, bucket_bytes=2) == 2 * (320 + 160)
