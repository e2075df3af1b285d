"""Runs a function on several gloo ranks and shows a failing rank's traceback."""

import os
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_qlrl.packing.distribute import make_rows
from megatron_qlrl.parallel.context import ParallelContext, process_group
from megatron_qlrl.types import PackedRow, TrainGroup

# What takes a rank seconds to import. A server process does so once, and ranks are forked from it.
PRELOADED = ["megatron_qlrl.policy.policy", "megatron_qlrl.weights.checkpoint", "transformers"]


def run_ranks(
    worker: Callable[..., None], world_size: int, cases: Sequence[Any], *, fresh: bool = False
) -> None:
    """Runs `worker(rank, case)` for each case, on `world_size` ranks, in a process group of its
    own (met through a file: a port can be taken by somebody else).

    `fresh`: ranks in new interpreters, which import all for themselves.
    """
    set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _start,
            (worker, world_size, folder, cases),
            nprocs=world_size,
            start_method="spawn" if fresh else "forkserver",
        )


def _start(
    rank: int, worker: Callable[..., None], world_size: int, folder: str, cases: Sequence[Any]
) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for number, case in enumerate(cases):
        with process_group(
            rank=rank,
            local_rank=rank,
            world_size=world_size,
            init_method=f"file://{folder}/{number}",
        ):
            worker(rank, case)


def rows_of(
    groups: Sequence[TrainGroup],
    context: ParallelContext,
    *,
    max_tokens: int = 64,
    share_prompts: bool = True,
) -> list[PackedRow]:
    """This data-parallel rank's rows of an optimizer batch."""
    return make_rows(
        groups,
        num_ranks=context.dp.size,
        max_tokens=max_tokens,
        share_prompts=share_prompts,
        aggregation="token_mean",
        constant_tokens=1,
        cost=lambda prompt, responses: prompt + sum(responses),
    )[context.dp.rank]


def tiny_hf(folder: Path, kind: str, *, seed: int = 0, **overrides: Any) -> Path:
    """A small random Hugging Face model of odd sizes (vocabulary 157 divides by nothing)."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    sizes: dict[str, Any] = {
        "vocab_size": 157,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    if kind in ("qwen3", "qwen3_moe"):
        sizes["head_dim"] = 20  # not hidden / heads
    if kind == "qwen3_moe":
        sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "norm_topk_prob": True}  # fmt: skip
    sizes |= overrides
    config, model = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    net = model(config(**sizes)).float()
    with torch.no_grad():  # biases and norms start at 0 and 1: make every parameter count
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    net.save_pretrained(folder)
    return folder
