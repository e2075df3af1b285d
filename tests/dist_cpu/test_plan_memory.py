"""The planner's memory against live bytes of real updates: state exactly, peaks within 10 %."""

from functools import partial
from typing import Any

import pytest
import torch

from megatron_qlrl.bench.policy import LOSS, _randomize, group_rows, make_group, make_shape
from megatron_qlrl.config.schema import OptimizerConfig, PolicyConfig
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.parallel.context import init_parallel
from megatron_qlrl.plan.activations import CPU, Activations, Row
from megatron_qlrl.plan.memory import model_state, stage_parameters, training_peak
from megatron_qlrl.policy.step import Policy
from tests.dist_cpu.harness import run_ranks
from tests.dist_cpu.live_bytes import LiveBytes, existing_storages

TOLERANCE = 0.10


def check_case(rank: int, case: dict[str, Any]) -> None:
    case = dict(case)
    dtype = getattr(torch, case.pop("dtype", "float32"))
    prompt, response, group = case.pop("lengths")
    vocab = case.pop("vocab", 512)
    rows = case.pop("rows", 1)
    settings = PolicyConfig(**{"distributed_optimizer": False} | case)
    context = init_parallel(tp=settings.tp, pp=settings.pp, cp=settings.cp, seed=0)
    shape = make_shape(
        layers=4, hidden=128, heads=8, kv_heads=4, ffn=320, vocab=vocab,
        positions=prompt + response,
    )  # fmt: skip
    policy = Policy(
        shape,
        policy=settings,
        optimizer=OptimizerConfig(),  # pyright: ignore[reportCallIssue]
        dtype=dtype,
        temperature=0.7,
        context=context,
        shard=partial(
            shard_row, cp_size=settings.cp, cp_rank=context.cp.rank,
            multiple_of=settings.tp if settings.sequence_parallel else 1,
        ),
        load=_randomize,
    )  # fmt: skip
    made = make_group(
        vocab=vocab, prompt_tokens=prompt, response_tokens=response, group=group, seed=1
    )
    tokens = prompt + response * group
    packed = group_rows(shape, made, max_tokens=tokens, share=True) * rows
    policy.update(packed, LOSS, lr=1e-6)  # makes Adam's state
    held = sum(s.nbytes() for s in existing_storages())
    with LiveBytes() as live:
        policy.update(packed, LOSS, lr=1e-6)

    width = dtype.itemsize
    numels = stage_parameters(shape, tp=settings.tp, pp=settings.pp, stage=context.pp.rank)
    assert sum(numels) == sum(p.numel() for p in policy.model.parameters())
    state = sum(model_state(sum(numels), settings, width=width, dp=context.dp.size).values())
    activations = Activations(
        shape, settings, Row(tokens, response * group), width=width, kernels=CPU
    )
    peak = training_peak(
        activations, dp=context.dp.size, micro_batches=rows, stage=context.pp.rank
    )
    print(case, dtype, context.pp.rank, peak.moment, "state", held, round(state), "peak", live.peak, round(peak.total - state), round((peak.total - state)/live.peak, 3), flush=True)
    return


CASES = [
    {"lengths": (1024, 16, 2)},
    {"lengths": (1024, 16, 2), "dtype": "bfloat16"},
    {"lengths": (256, 16, 8), "dtype": "bfloat16", "vocab": 8192},
    {"lengths": (256, 64, 8), "vocab": 4096},
    {"lengths": (4096, 16, 2), "recompute": "selective"},
    {"lengths": (4096, 16, 2), "recompute": "full"},
    {"lengths": (4096, 16, 2), "recompute": "full", "dtype": "bfloat16"},
]
CASES2 = [
    {"lengths": (2048, 16, 2), "tp": 2},
    {"lengths": (2048, 16, 2), "tp": 2, "sequence_parallel": False},
    {"lengths": (2048, 16, 2), "cp": 2},
    {"lengths": (2048, 16, 2), "cp": 2, "recompute": "selective"},
    {"lengths": (2048, 16, 2), "pp": 2, "rows": 3},
    {"lengths": (2048, 16, 2), "pp": 2, "rows": 3, "recompute": "full", "dtype": "bfloat16"},
    {"lengths": (2048, 16, 2), "distributed_optimizer": True, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_plan(world_size: int) -> None:
    run_ranks(check_case, world_size, CASES if world_size == 1 else CASES2)
