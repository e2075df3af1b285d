#!/usr/bin/env python
"""Checks and measures one GPU: attention kernels and log-probs against float64, shared rows against
separate rows layer by layer, `qlrl bench logprob` and `update` at 7B widths, and Transformer
Engine's layers, in bfloat16 and in FP8, against Megatron's own.

    python tools/gpu_check.py --out gpu.json [--site FOLDER] [--parts NAME ...]

It needs torch with triton and transformers; megatron-core and pydantic may be in FOLDER:

    pip install --no-deps --target FOLDER megatron-core==0.16.1 \
        pydantic pydantic-core annotated-types typing-inspection typing-extensions

A part that fails is recorded with its traceback, the others still run, and the exit code is 1.
Without a GPU the same parts run in small sizes, without Transformer Engine. What it measured on an
H200 is in docs/measurements/gpu_check_h200.json.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--site", type=Path, help="folder with more packages")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these parts alone")
    arguments = parser.parse_args()
    if arguments.site:
        sys.path.append(str(arguments.site.resolve()))
    import torch

    gpu = torch.cuda.is_available()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attention": check_attention,
        "logprobs": check_logprobs,
        "sharing": check_sharing_by_layer,
        "bench_logprob": lambda: bench_logprob(gpu),
        "bench_update": lambda: bench_update(gpu),
        "bench_update_60k": lambda: bench_update_long(gpu),
        "kernels": lambda: bench_kernels(gpu),
        "engine_tensorwise": lambda: check_engine(gpu, fp8="hybrid", fp8_recipe="tensorwise"),
        "engine_blockwise": lambda: check_engine(gpu, fp8="e4m3", fp8_recipe="blockwise"),
    }
    if unknown := set(arguments.parts or ()) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    parts = {name: parts[name] for name in arguments.parts or parts}
    results: dict[str, Any] = {"machine": machine(), "command": " ".join(sys.argv)}
    for name, part in parts.items():
        started = time.perf_counter()
        try:
            results[name] = part()
        except Exception:  # one broken part must not hide the results of the others
            results[name] = {"failed": traceback.format_exc()}
        results[name]["seconds"] = round(time.perf_counter() - started, 2)
        print(f"{name}: {'FAILED' if 'failed' in results[name] else 'ok'}", flush=True)
        # Written after every part, so that an interrupted run leaves its results.
        arguments.out.write_text(json.dumps(results, indent=1))
    return int(any("failed" in value for value in results.values() if isinstance(value, dict)))


def machine() -> dict[str, Any]:
    import torch

    from megatron_qlrl.platform.machine import attention_kernel

    gpu = torch.cuda.is_available()
    kernel = attention_kernel(gpu=gpu)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "attention_kernel": [kernel.name, kernel.why],
    }


def check_attention() -> dict[str, Any]:
    """Compares output and gradients of shared-prompt pieces, for every kernel that loads here, with
    dense attention in float64. Allowed is 1.5 times the error of dense attention in the kernel's
    type, and 8 units in the last place."""
    import torch

    from megatron_qlrl.platform.device import device, has_gpu
    from megatron_qlrl.policy.attention import segment_attention
    from megatron_qlrl.policy.kernels import KERNELS
    from megatron_qlrl.types import Piece

    prompt, response, heads, kv_heads, dim = 300, 70, 8, 2, 64
    tokens = prompt + 2 * response
    pieces = (
        Piece(0, prompt, 0, prompt, True),
        Piece(prompt, tokens, 0, prompt, False),
        Piece(prompt, prompt + response, prompt, prompt + response, True),
        Piece(prompt + response, tokens, prompt + response, tokens, True),
    )
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for p in pieces:
        block = torch.ones(p.q1 - p.q0, p.k1 - p.k0, dtype=torch.bool)
        seen[p.q0 : p.q1, p.k0 : p.k1] |= block.tril() if p.causal else block
    dtype = torch.bfloat16 if has_gpu() else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(tokens, n, dim, generator=generator).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    def with_gradients(function: Any, inputs: list[torch.Tensor], grad: torch.Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    want = with_gradients(dense, [x.double() for x in (q, k, v)], g.double())
    peer = with_gradients(dense, [q, k, v], g)

    def errors(ours: Any) -> dict[str, float]:
        return {
            part: float((a.cpu().double() - b).norm() / b.norm())
            for part, a, b in zip(("out", "dq", "dk", "dv"), ours, want, strict=True)
        }

    relative: dict[str, Any] = {"dense": errors(peer)}
    for name in ["aten_cuda", "flash_attn"] if has_gpu() else ["aten_cpu"]:
        kernel = KERNELS[name]
        try:
            ours = with_gradients(
                lambda q, k, v, kernel=kernel: segment_attention(
                    q, k, v, pieces, dim**-0.5, kernel
                ),
                [x.to(device()) for x in (q, k, v)],
                g.to(device()),
            )
        except ImportError as error:
            relative[name] = f"absent: {error}"
            continue
        relative[name] = errors(ours)
        for part, error in relative[name].items():
            assert error <= 1.5 * relative["dense"][part] + 8 * torch.finfo(dtype).eps, relative
    return {"relative_error": relative}


def check_logprobs() -> dict[str, Any]:
    """Checks the errors of `qlrl bench logprob` at a small size."""
    from megatron_qlrl.bench.logprob import bench_logprob

    figures = bench_logprob(vocab=10_000, hidden=256, tokens=512, rounds=1)
    # 64 units in the last place of 1 are 8 units of the log-probs, which are about -log(10,000).
    assert figures["max_error"] <= 3 * figures["full_logits_max_error"] + 64 * 2.0**-23, figures
    return {name: figures[name] for name in ("max_error", "full_logits_max_error")}


def check_sharing_by_layer() -> dict[str, Any]:
    """Runs the check that a run makes at its first batch."""
    from megatron_qlrl.bench.policy import make_group, make_shape, random_policy
    from megatron_qlrl.packing.distribute import group_rows
    from megatron_qlrl.plan.flops import block_flops
    from megatron_qlrl.policy.selfcheck import check_sharing

    shape = make_shape(
        layers=4, hidden=512, heads=8, kv_heads=2, ffn=1536, vocab=4096, positions=1024
    )
    group = make_group(vocab=4096, prompt_tokens=256, response_tokens=32, group=3)
    with random_policy(shape) as policy:
        cost = partial(block_flops, shape)
        rows = (
            group_rows(group, max_tokens=1024, share_prompt=s, cost=cost) for s in (True, False)
        )
        return {"layers": 4, "error_in_units_of_noise": check_sharing(policy, *rows)}


def bench_logprob(gpu: bool) -> dict[str, Any]:
    from megatron_qlrl.bench.logprob import bench_logprob

    if gpu:
        return bench_logprob(vocab=151_936, hidden=3584, tokens=8192, rounds=5)
    return bench_logprob(vocab=4096, hidden=32, tokens=256, rounds=1)


def bench_update(gpu: bool) -> dict[str, Any]:
    return _bench_update(gpu, prompt_tokens=8000 if gpu else 128, rounds=3)


def bench_update_long(gpu: bool) -> dict[str, Any]:
    """P = 60,000, R = 1,000, G = 8 (on a GPU)."""
    return _bench_update(gpu, prompt_tokens=60_000 if gpu else 256, rounds=1)


def _bench_update(gpu: bool, *, prompt_tokens: int, rounds: int) -> dict[str, Any]:
    from megatron_qlrl.bench.update import bench_update

    response = 1000 if gpu else 16
    widths, shape = _shape(gpu, layers=2, positions=prompt_tokens + response)
    figures = bench_update(
        shape, prompt_tokens=prompt_tokens, response_tokens=response, group=8, rounds=rounds
    )
    return {"shape": widths | {"layers": 2, "prompt_tokens": prompt_tokens}, **figures}


def bench_kernels(gpu: bool) -> dict[str, Any]:
    """Times every attention kernel that loads here, forward and backward, on a prompt and on a
    response's view of it, beside torch's cuDNN attention, and a large matmul."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from megatron_qlrl.bench.floor import matmul_rate
    from megatron_qlrl.bench.measure import compare
    from megatron_qlrl.platform.device import device
    from megatron_qlrl.policy.kernels import KERNELS

    prompt, response, heads, kv_heads, dim = (
        (16_384, 1024, 28, 4, 128) if gpu else (64, 16, 4, 2, 32)
    )
    dtype = torch.bfloat16 if gpu else torch.float32

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=device())

    figures: dict[str, Any] = {"prompt_tokens": prompt, "response_tokens": response}
    for piece, length, causal in (("prompt", prompt, True), ("response", response, False)):
        q, g = draw(length, heads, dim), draw(length, heads, dim)
        k, v = draw(prompt, kv_heads, dim), draw(prompt, kv_heads, dim)
        calls: dict[str, Callable[[], Any]] = {}
        for name, kernel in KERNELS.items():
            try:
                out, lse = kernel.forward(q, k, v, causal, dim**-0.5)
            except (ImportError, NotImplementedError, RuntimeError) as error:
                figures[f"{piece} {name}"] = f"absent: {str(error)[:90]}"
                continue
            forward = partial(kernel.forward, q, k, v, causal, dim**-0.5)
            backward = partial(kernel.backward, g, q, k, v, out, lse, causal, dim**-0.5)
            calls |= {f"{name} forward": forward, f"{name} backward": backward}
        if gpu:
            one = [x.transpose(0, 1)[None].detach().requires_grad_() for x in (q, k, v)]

            def cudnn(one: list[torch.Tensor] = one, causal: bool = causal) -> torch.Tensor:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)

            def both(call: Any = cudnn, one: Any = one, g: torch.Tensor = g) -> Any:
                return torch.autograd.grad(call(), one, g.transpose(0, 1)[None])

            try:
                both()
                calls |= {"cuDNN forward": cudnn, "cuDNN forward and backward": both}
            except RuntimeError as error:
                figures[f"{piece} cuDNN"] = f"absent: {str(error)[:90]}"
        # Two products of L x T x d for each head, half of it where causal; 2.5 times that backward.
        flops = 4 * heads * dim * length * prompt / (2 if causal else 1)
        for name, cost in compare(calls, rounds=3).items():
            work = {"forward": 1.0, "backward": 2.5}
            times = sum(work[word] for word in name.split() if word in work)
            figures[f"{piece} {name}"] = {
                "s": cost.work_s, "tflop_per_s": times * flops / cost.work_s / 1e12
            }  # fmt: skip
    figures["matmul_tflop_per_s"] = matmul_rate(dtype, rounds=10) / 1e12
    return figures


def check_engine(gpu: bool, **fp8: str) -> dict[str, Any]:
    """Compares an update by Transformer Engine's layers, in bfloat16 and in FP8, with one by
    Megatron's own in bfloat16: log-probs, gradient norm, and time of FP8 against bfloat16.

    In bfloat16 both round alike, at other places. FP8 has three bits of mantissa (e4m3) in place of
    bfloat16's seven, so its log-probs may be 16 times as far apart; twice that is allowed. The
    gradient norm is a mean over many roundings and moves far less.
    """
    import numpy as np

    from megatron_qlrl.bench.policy import make_group
    from megatron_qlrl.packing.distribute import group_rows
    from megatron_qlrl.plan.flops import block_flops
    from megatron_qlrl.platform.device import has_transformer_engine

    if not has_transformer_engine():
        return {"engine": "absent: it needs a GPU and the package transformer_engine"}
    prompt, response = (16_000, 1000) if gpu else (128, 16)
    widths, shape = _shape(gpu, layers=4, positions=prompt + response)
    group = make_group(
        vocab=shape.vocab_size, prompt_tokens=prompt, response_tokens=response, group=8
    )
    tokens = prompt + 8 * response
    rows = group_rows(group, max_tokens=tokens, share_prompt=True, cost=partial(block_flops, shape))
    logprobs, norm, _ = _update_by(False, shape, rows, {})
    figures: dict[str, Any] = {"shape": widths | {"layers": 4, "tokens": tokens}, "fp8": fp8}
    allowed = 0.02
    for name, settings, norm_allowed in (("bfloat16", {}, 0.01), ("float8", fp8, 0.05)):
        theirs, other, seconds = _update_by(True, shape, rows, settings)
        apart = np.abs(theirs - logprobs)
        figures[name] = {
            "logprob_max_difference": float(apart.max()),
            "logprob_mean_difference": float(apart.mean()),
            "grad_norm_ratio": other / norm,
            "tokens_per_s": tokens / seconds,
        }
        assert apart.mean() < allowed, figures
        assert abs(other / norm - 1) < norm_allowed, figures
        allowed = 2 * 16 * apart.mean()
    figures["speedup"] = figures["float8"]["tokens_per_s"] / figures["bfloat16"]["tokens_per_s"]
    return figures


def _update_by(
    engine: bool, shape: Any, rows: list[Any], settings: dict[str, str]
) -> tuple[Any, float, float]:
    """Returns log-probs, gradient norm and seconds of an update, with Transformer Engine's layers
    or Megatron's. Only one policy exists at a time: three of this size do not fit into 80 GB."""
    from unittest.mock import patch

    import numpy as np

    from megatron_qlrl.bench.measure import compare
    from megatron_qlrl.bench.policy import LOSS, random_policy
    from megatron_qlrl.policy import model

    with (
        patch.object(model, "has_transformer_engine", lambda: engine),
        random_policy(shape, **settings) as policy,
    ):
        # With a learning rate of 0 the weights do not change.
        update = partial(policy.update, rows, LOSS, lr=0.0)
        norm = update()["actor/grad_norm"]
        logprobs = [row.columns["now"] for row in policy.add_logprobs(rows, "now")]
        cost = compare({"update": update}, rounds=3)["update"]
    return np.concatenate(logprobs), norm, cost.work_s


def _shape(gpu: bool, *, layers: int, positions: int) -> tuple[dict[str, int], Any]:
    """Returns widths and a shape, on a GPU those of a 7B model."""
    from megatron_qlrl.bench.policy import make_shape

    if gpu:
        widths = {"hidden": 3584, "heads": 28, "kv_heads": 4, "ffn": 18_944, "vocab": 152_064}
    else:
        widths = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 512}
    return widths, make_shape(layers=layers, positions=positions, **widths)


if __name__ == "__main__":
    sys.exit(main())
