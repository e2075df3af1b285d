"""Activations against the published formulas, and against sums written out by hand."""

from dataclasses import replace

import pytest

from megatron_qlrl.config.schema import PolicyConfig
from megatron_qlrl.plan.activations import BLOCK_TOKENS, CPU, GPU, Activations, Row
from tests.unit.plan.test_memory import TINY, qwen

# Korthikanti et al. 2022 (arXiv 2205.05198), table 3: s = 2048, and s * b * h of the 22B and 175B
# models, which have layers of multi-head attention and an MLP of 4h.
PAPER = {"22B": (2048 * 4, 6144, 48, 64), "175B": (2048 * 1, 12_288, 96, 96)}


def paper_model(name: str, **settings: object) -> Activations:
    tokens, hidden, layers, heads = PAPER[name]
    shape = qwen(hidden, layers, heads, heads, 4 * hidden)
    policy = PolicyConfig.model_validate({"tp": 8} | settings)
    return Activations(shape, policy, Row(tokens, tokens), width=2, kernels=GPU)


@pytest.mark.parametrize("name", PAPER)
def test_full_recomputation_keeps_what_the_paper_says(name: str) -> None:
    tokens, hidden, layers, _ = PAPER[name]
    found = paper_model(name, sequence_parallel=False, recompute="full")
    # "2sbh" bytes a layer (section 4, full activation recomputation; the layer's input).
    head = found.head_inputs() + tokens * (2 * hidden + 4)  # final norm, states that are predicted
    angles = 4 * found.shape.head_dim * tokens
    assert found.stage(0) - head - angles == 2 * tokens * hidden * layers


@pytest.mark.parametrize("name", PAPER)
def test_norms_keep_what_the_paper_says(name: str) -> None:
    tokens, hidden, _, _ = PAPER[name]
    sbh = tokens * hidden
    # Layer norms 4sbh, the inputs of QKV 2sbh and of the first MLP product 2sbh (section 4.1);
    # RMSNorm keeps a float32 number a token besides. With sequence parallelism all over t.
    statistics = 2 * 4 * tokens
    alone, shared = paper_model(name, sequence_parallel=False), paper_model(name)
    assert alone.layer().norms == (4 + 2 + 2) * sbh + statistics
    assert shared.layer().norms == ((4 + 2 + 2) * sbh + statistics) / 8


def test_keys_and_values_of_a_long_row() -> None:
    # 60K tokens of a model with 8 key/value heads of 128: 245 MB a layer, whatever cp is.
    shape = qwen(5120, 48, 40, 8, 13_824)
    more = {
        cp: Activations(shape, PolicyConfig(cp=cp), Row(60_000, 1), width=2, kernels=GPU)
        for cp in (4, 8)
    }
    q, angles = 5120, 4 * 128
    local = {cp: (2 * q + angles) * 2 * 60_000 // cp + 4 * 40 * 60_000 // cp for cp in more}
    for cp, found in more.items():
        assert found.layer().attention - local[cp] == 245_760_000


def test_a_layer_by_hand() -> None:
    # h 8, q 8, kv 4, f 10, heads 2 of 4, 6 tokens of 4 bytes (float32, unfused norms).
    found = Activations(TINY, PolicyConfig(), Row(6, 3), width=4, kernels=CPU).layer()
    assert found.norms == 6 * 2 * (8 * 8 + 4 + 8 * 4)
    assert found.attention == 6 * (4 * 4 * 4 + 2 * 8 * 4 + (8 + 3 * 4) * 4 + 2 * 4)
    assert found.mlp == 6 * 5 * 10 * 4


def test_recomputation_and_pipelines_keep_less() -> None:
    def kept(stage: int = 0, **settings: object) -> float:
        policy = PolicyConfig.model_validate(settings)
        return Activations(TINY, policy, Row(64, 8), width=2, kernels=GPU).stage(stage)

    assert kept(recompute="full") < kept(recompute="selective") < kept()
    head = 64 * (8 * 2 + 4) + 8 * 8 * 2
    layer = (kept() - head) / 2
    assert kept(0, pp=2) == layer + 64 * 8 * 2  # and its output
    assert kept(1, pp=2) == layer + head


def test_selective_recomputation_leaves_norms_and_attention() -> None:
    policy = PolicyConfig(recompute="selective")
    # 6 tokens, h 8, f 10: unfused norms stay; a fused one's output (8 x 4) is made again.
    unfused = Activations(TINY, policy, Row(6, 3), width=4, kernels=CPU)
    assert unfused.selective_layer() == replace(unfused.layer(), mlp=0)
    fused = Activations(TINY, policy, Row(6, 3), width=4, kernels=GPU)
    norms = fused.layer().norms - 6 * 8 * 4
    assert fused.selective_layer() == replace(fused.layer(), norms=norms, mlp=0)
    # The backward pass of the MLP: made again with its output, three gradients of f, h, f.
    stream = 6 * 8 * 4
    mlp = stream + 2 * 6 * 10 * 4 + 6 * 5 * 10 * 4 + stream
    head = fused.row.responses * 8 * 4 + 6 * (8 * 4 + 4)
    assert fused.working(0)["MLP gradients"] == mlp + stream - head
    assert unfused.working(0)["MLP gradients"] == mlp - 3 * 8 * 4 - 6 * (8 * 8 + 4)


def test_offloaded_inputs_leave_the_device() -> None:
    def found(**settings: object) -> Activations:
        policy = PolicyConfig.model_validate({"recompute": "full", "pp": 2} | settings)
        return Activations(TINY, policy, Row(48, 8), width=2, kernels=GPU)

    here, away = found(), found(offload_activations=True)
    stream = 48 * 8 * 2  # of one layer
    assert here.stage(0) - away.stage(0) == stream
    assert here.stage(1) == away.stage(1)  # the schedule holds what the second stage received
    assert (here.on_host(), away.on_host()) == (0, 2**20)  # 768 bytes, rounded up
    for moment in ("MLP gradients", "attention gradients"):
        assert away.working(0)[moment] - here.working(0)[moment] == stream


def test_block_of_logits_is_no_larger_than_the_vocabulary() -> None:
    few = Activations(TINY, PolicyConfig(), Row(64, 8), width=2, kernels=GPU)
    # 8 tokens x 16 entries: float32 once more and in bfloat16, beside two buffers.
    assert few.working(0)["log-probs forward"] == 8 * 2**26 + 6 * 8 * 16
    wide = Activations(
        replace(TINY, vocab_size=2**20), PolicyConfig(), Row(4096, 4095), width=2, kernels=GPU
    )
    assert wide.working(0)["log-probs forward"] == 8 * 2**26 + 6 * 2**26


def test_blocks_are_those_of_the_log_probs() -> None:
    from megatron_qlrl.policy import logprobs

    assert GPU.block_elements == logprobs.GPU_BLOCK_ELEMENTS
    assert CPU.block_elements == logprobs.CPU_BLOCK_ELEMENTS
    assert BLOCK_TOKENS == logprobs._BLOCK_TOKENS
