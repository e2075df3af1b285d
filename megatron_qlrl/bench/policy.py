"""Makes policies with random weights: the real model, schedule and optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_qlrl.config.schema import AlgorithmConfig, OptimizerConfig, PolicyConfig
from megatron_qlrl.config.shape import ModelShape
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.packing.shard import shard_row
from megatron_qlrl.parallel.context import init_parallel, process_group
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.platform.env import init_ranks
from megatron_qlrl.policy.loss import PolicyLoss
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.types import TrainGroup, TrainResponse

LOSS = PolicyLoss(AlgorithmConfig())  # pyright: ignore[reportCallIssue]


def make_shape(
    *, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, positions: int
) -> ModelShape:
    """Returns the shape of a Qwen2: untied, with biases on queries, keys and values.

    Raises:
        ConfigError: heads do not divide hidden, or key/value heads do not divide heads.
    """
    if hidden % heads or heads % kv_heads:
        raise ConfigError(
            f"--hidden {hidden}, --heads {heads} and --kv-heads {kv_heads} do not fit together: "
            "heads must divide hidden, and kv-heads must divide heads"
        )
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=positions,
        rms_eps=1e-6,
        tied=False,
        qkv_bias=True,
        qk_norm=False,
        rope={"rope_type": "default", "rope_theta": 1e6},
    )


@contextmanager
def random_policy(
    shape: ModelShape, *, dtype: torch.dtype | None = None, **settings: Any
) -> Iterator[Policy]:
    """Yields a policy on the job's ranks; its process group ends with the context.

    Args:
        dtype: by default float32 on a CPU and bfloat16 on a GPU.
        settings: settings of the config's policy section.
    """
    ranks = init_ranks()
    config = PolicyConfig.model_validate({"distributed_optimizer": False} | settings)
    with process_group(rank=ranks.rank, local_rank=ranks.local_rank, world_size=ranks.world_size):
        context = init_parallel(tp=config.tp, pp=config.pp, cp=config.cp, ep=config.ep, seed=0)
        yield Policy(
            shape,
            config=config,
            # The step must not clip the gradients, which are compared after it.
            optimizer_config=OptimizerConfig(clip_grad=1e9),  # pyright: ignore[reportCallIssue]
            dtype=dtype or (torch.bfloat16 if has_gpu() else torch.float32),
            temperature=0.7,
            context=context,
            shard=partial(
                shard_row,
                cp_size=context.cp.size,
                cp_rank=context.cp.rank,
                multiple_of=config.tokens_multiple,
            ),
            load=_randomize,
        )


def make_group(
    *, vocab: int, prompt_tokens: int, response_tokens: int, group: int, seed: int = 0
) -> TrainGroup:
    """Returns a group of random tokens with advantages whose mean is about zero."""
    rng = np.random.default_rng(seed)

    def tokens(num: int) -> np.ndarray:
        return rng.integers(0, vocab, num).astype(np.int32)

    return TrainGroup(
        tokens(prompt_tokens),
        tuple(TrainResponse(tokens(response_tokens), float(rng.normal())) for _ in range(group)),
    )


def _randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
            else:
                noise = torch.empty(parameter.shape).normal_(0, 0.02, generator=generator)
                parameter.copy_(noise)
