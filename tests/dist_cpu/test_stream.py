"""What the stream of weights gives to releases and to engines of every width, in every layout."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from safetensors.torch import save_file

from megatron_qlrl.config.shape import ModelShape, hf_shapes, padded_vocab
from megatron_qlrl.parallel.context import ParallelContext, init_parallel
from megatron_qlrl.weights.stream import WeightStream, load_hf

BUCKET_BYTES = 1000
"""Some parameters share a bucket, others are larger than one."""


def shape_of(vocab: int, *, tied: bool) -> ModelShape:
    return ModelShape.from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab,
            "max_position_embeddings": 8,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
        }
    )


def parameters(shape: ModelShape, context: ParallelContext) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters under Megatron's names, empty."""
    tp, vocab = context.tp.size, padded_vocab(shape.vocab_size, context.tp.size)
    sizes: dict[str, tuple[int, ...]] = {}
    if context.pp.rank == 0:
        sizes["embedding.word_embeddings.weight"] = (vocab // tp, 8)
    for layer in range(2 // context.pp.size):
        sizes |= {
            f"decoder.layers.{layer}.{name}": size
            for name, size in {
                "input_layernorm.weight": (8,),
                "self_attention.linear_qkv.weight": (16 // tp, 8),
                "self_attention.linear_qkv.bias": (16 // tp,),
                "self_attention.linear_proj.weight": (8, 8 // tp),
                "pre_mlp_layernorm.weight": (8,),
                "mlp.linear_fc1.weight": (24 // tp, 8),
                "mlp.linear_fc2.weight": (8, 12 // tp),
            }.items()
        }
    if context.is_last_stage:
        sizes["decoder.final_layernorm.weight"] = (8,)
        if not shape.tied:
            sizes["output_layer.weight"] = (vocab // tp, 8)
    return {name: torch.nn.Parameter(torch.full(size, torch.nan)) for name, size in sizes.items()}


def kept(name: str, tensor: torch.Tensor, *, tp: int, rank: int) -> torch.Tensor:
    """The part that rank `rank` of a vLLM engine of `tp` ranks keeps."""
    if name.endswith("norm.weight"):
        return tensor
    if "embed" in name or "lm_head" in name:
        rows = -(-len(tensor) // 64) * 64 // tp
        return tensor[rank * rows : (rank + 1) * rows]
    return tensor.chunk(tp, 1 if "o_proj" in name or "down_proj" in name else 0)[rank]


def check(rank: int, case: tuple[Path, tuple[int, int], ModelShape]) -> None:
    folder, (tp, pp), shape = case
    generator = torch.Generator().manual_seed(0)
    right = {n: torch.randn(s, generator=generator) for n, s in hf_shapes(shape).items()}
    context = init_parallel(tp=tp, pp=pp, cp=1, seed=0)
    if rank == 0:
        save_file(right, folder / "model.safetensors")
    torch.distributed.barrier()
    made = parameters(shape, context)
    model: Any = SimpleNamespace(named_parameters=made.items)
    load_hf(folder, model, shape=shape, context=context)
    stream = WeightStream(model, shape=shape, context=context, bucket_bytes=BUCKET_BYTES)

    whole = {name: tensor.clone() for name, tensor in stream}
    assert whole.keys() == right.keys()
    assert all(torch.equal(whole[name], right[name]) for name in right)

    right.setdefault("lm_head.weight", right["model.embed_tokens.weight"])
    for engine in (1, 2):
        if context.world_size % engine:
            continue
        sent = list(stream.for_engine(engine))
        assert sorted(name for name, _ in sent) == sorted(right)
        for name, tensor in sent:
            assert tensor.shape == right[name].shape
            ours, theirs = (
                kept(name, t, tp=engine, rank=rank % engine) for t in (tensor, right[name])
            )
            assert torch.equal(ours, theirs), (name, engine)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_engine_gets_what_it_keeps(tmp_path: Path, world_size: int) -> None:
    """A vocabulary of 70 is cut by vLLM in another place than by the trainer."""
    cases = []
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        for vocab, tied in ((128, False), (70, True)):
            folder = tmp_path / f"{tp}{pp}{vocab}"
            folder.mkdir()
            if world_size % int(np.prod((tp, pp))) == 0:
                cases.append((folder, (tp, pp), shape_of(vocab, tied=tied)))
    run_ranks(check, world_size, cases)


def check_nothing_gathered(rank: int, _: None) -> None:
    """Of a tensor in slices the rest is whatever was in memory, here NaN."""
    context, shape = init_parallel(tp=2, pp=1, cp=1, seed=0), shape_of(128, tied=False)
    made = parameters(shape, context)
    for parameter in made.values():
        parameter.data.fill_(rank)
    model: Any = SimpleNamespace(named_parameters=made.items)
    stream = WeightStream(model, shape=shape, context=context, bucket_bytes=BUCKET_BYTES)
    torch.use_deterministic_algorithms(mode=True)  # new memory is filled with NaN
    try:
        gate = dict(stream.for_engine(2))["model.layers.1.mlp.gate_proj.weight"]
    finally:
        torch.use_deterministic_algorithms(mode=False)
    mine, other = gate.chunk(2) if rank == 0 else gate.chunk(2)[::-1]
    assert (mine == rank).all()
    assert other.isnan().all()


def test_nothing_is_gathered_for_an_engine_that_is_cut_alike() -> None:
    run_ranks(check_nothing_gathered, 2, [None])
