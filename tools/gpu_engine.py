#!/usr/bin/env python
"""Measures the co-located engine on a real model in one process: GPU memory at each point of sleep,
wake-up and reload; what seeds and log-probs cost in sampling; and `qlrl bench step`.

    python tools/gpu_engine.py prepare FOLDER --tokenizer models/Qwen3-4B
    python tools/gpu_engine.py measure FOLDER/config.json --out engine.json

`prepare` writes a model of Qwen3-1.7B's widths with random weights and the tokenizer's vocabulary,
documents of 20,000 and 60,000 tokens, a reward that differs between responses, and a config. The
file of `measure` is written after each of its parts; tools/gpu_day.py calls both.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GIB = 2**30


def prepare(folder: Path, tokenizer_folder: Path, *, small: bool) -> None:
    """Writes model, documents, reward and config; small ones for a machine without a GPU."""
    import numpy as np
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_qlrl.data.tokenizer import load_tokenizer
    from tools.rehearse import REWARD, write_rows

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(tokenizer_folder)
    hidden, ffn, layers, heads, kv_heads, dim = (
        (64, 128, 2, 2, 1, 32) if small else (2048, 6144, 28, 16, 8, 128)
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=hidden,
                intermediate_size=ffn,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=dim,
                vocab_size=-(-len(tokenizer) // 64) * 64,
                max_position_embeddings=131_072,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.bfloat16()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    short, long, response = (1000, 2000, 16) if small else (20_000, 60_000, 500)
    # What the chat template and the question add stays below the limits.
    sizes = np.array([short - 100, short - 100, long - 400, long - 400])
    rng = np.random.default_rng(0)
    write_rows(folder / "train.parquet", sizes, load_tokenizer(folder / "model"), rng)
    (folder / "rehearsal_reward.py").write_text(REWARD)
    config = {
        "model": {"path": str(folder / "model"), "name": "random", "dtype": "bfloat16"},
        "run": {"dir": str(folder / "run")},
        "data": {"train_files": [str(folder / "train.parquet")]},
        "phases": [
            {"name": "short", "max_input_tokens": short, "steps": 2},
            {"name": "long", "max_input_tokens": long, "steps": 2},
        ],
        "rollout": {
            "prompts_per_step": 1,
            "group_size": 8,
            "max_response_tokens": response,
            "gpu_memory_utilization": 0.45,
            "enforce_eager": True,
        },
        "algorithm": {"filter_groups": False, "reference": False},
        "policy": {"max_tokens_per_row": long + 8 * response, "recompute": "full"},
        "reward": {"custom": {"rehearsal": "rehearsal_reward:by_text"}},
        "checkpoint": {"every_steps": 1000},
    }
    (folder / "config.json").write_text(json.dumps(config))


class Memory:
    """GPU memory at named points, in GiB."""

    MEANING = (
        "used: in use on the device, which says what is free. allocated, reserved: what torch "
        "counts in this process, and with it the memory that a sleeping engine has given back"
    )

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []

    def point(self, name: str) -> None:
        import torch

        if not torch.cuda.is_available():
            return
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        figures = {
            "used": total - free,
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
        self.points.append({"at": name} | {k: round(v / GIB, 2) for k, v in figures.items()})

    def watch(self, owner: Any, method: str) -> None:
        """Makes a point after each call of `owner.method`, with the call's seconds."""
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = original(*args, **kwargs)
            seconds = time.perf_counter() - began
            words = [method, *(a for a in args if isinstance(a, str))]
            self.point(" ".join(words))
            if self.points:
                self.points[-1]["seconds"] = round(seconds, 3)
            return result

        setattr(owner, method, watched)


def measure(file: Path, out: Path) -> None:
    """Measures the config of `prepare`."""
    from megatron_qlrl import build
    from megatron_qlrl.bench.policy import LOSS, make_group
    from megatron_qlrl.bench.step import measure_step
    from megatron_qlrl.config.load import load_config
    from megatron_qlrl.packing.distribute import group_rows
    from megatron_qlrl.parallel.context import process_group
    from megatron_qlrl.platform.device import has_gpu
    from megatron_qlrl.platform.env import init_ranks
    from megatron_qlrl.rollout.vllm_engine import Request, Sampling

    gpu = has_gpu()
    prompt, response, count = (2000, 128, 64) if gpu else (64, 8, 4)
    config = load_config(file, [])
    result: dict[str, Any] = {}

    def write() -> None:
        out.write_text(json.dumps(result, indent=1))

    memory = Memory()
    result |= {"memory_gib": memory.MEANING, "memory": memory.points}
    init_ranks()
    with process_group(rank=0, local_rank=0, world_size=1):
        memory.point("process group")
        job = build.make_job(config)
        with build.open_model(job, build.make_scorer(job), temperature=1.0) as model:
            memory.point("policy")
            group = make_group(
                vocab=job.shape.vocab_size, prompt_tokens=prompt, response_tokens=response, group=8
            )
            rows = group_rows(
                group, max_tokens=prompt + 8 * response, share_prompt=True, cost=lambda p, r: 1.0
            )
            model.policy.update(rows, LOSS, lr=0.0)
            memory.point("policy after an update")
            began = time.perf_counter()
            engine = model.collector.engine()
            result["engine_start_s"] = round(time.perf_counter() - began, 1)
            memory.point("engine started, asleep")
            write()
            for method in ("_wake", "_reload", "_sleep"):
                memory.watch(engine, method)
            requests = [Request(group.prompt_ids, seed) for seed in range(count)]
            sampling = Sampling(1.0, 1.0, response, 1, ignore_end=True)
            for number in range(3):
                weights, version = model.collector.weights()
                memory.point("gradients freed")
                with engine.awake(weights, version) as generate:
                    for _ in generate(requests, sampling):
                        pass
                    memory.point("generated")
                    if number == 2:
                        result["samplers"] = samplers(engine, group.prompt_ids[:256], gpu=gpu)
                        write()
                model.policy.update(rows, LOSS, lr=0.0)
                memory.point("updated")
                write()
            result["counts"] = engine.take_counts()
            result["step"] = measure_step(job, model, prompt, response, 2 if gpu else 1)
            write()


def samplers(engine: Any, prompt_ids: Any, *, gpu: bool) -> dict[str, Any]:
    """Returns tokens a second of 64 responses of 128 tokens, with what a run asks for and without:
    seeds, log-probs, those over the whole vocabulary, and the nucleus."""
    count, tokens = (64, 128) if gpu else (2, 4)
    llm = engine._llm.llm_engine
    runner = llm.model_executor.driver_worker.model_runner
    asked: dict[str, dict[str, Any]] = {
        "as a run asks": {},
        "no seeds": {"seed": False},
        "no log-probs": {"logprobs": None},
        "not normalised": {"normalised": False},
        "raw log-probs, not normalised": {"mode": "raw_logprobs", "normalised": False},
        "nothing of it": {"seed": False, "logprobs": None, "normalised": False,
                          "mode": "raw_logprobs"},
        "top-p 0.95": {"top_p": 0.95},
        "top-p 0.95, no seeds": {"top_p": 0.95, "seed": False},
    }  # fmt: skip
    result: dict[str, Any] = {"runner": type(runner).__module__}
    for name, wanted in asked.items():
        with sampling_as(runner, wanted.get("mode"), wanted.get("normalised", True)):
            rates = [
                _rate(llm, prompt_ids, count, tokens, seed=wanted.get("seed", True),
                      logprobs=wanted.get("logprobs", 0), top_p=wanted.get("top_p", 1.0))
                for _ in range(2)
            ]  # fmt: skip
        result[name] = {"tokens_per_s": round(rates[-1]), "first_round": round(rates[0])}
    return result


@contextmanager
def sampling_as(runner: Any, mode: str | None, normalised: bool) -> Iterator[None]:
    """A block in which the runner reports log-probs in another mode, or of plain logits."""
    model, sampler = runner.get_model(), runner.sampler
    owners = [o for o in (sampler, getattr(sampler, "topk_topp_sampler", None)) if o is not None]
    before = [owner.logprobs_mode for owner in owners]
    own = model.__dict__.get("compute_logits")
    for owner in owners:
        owner.logprobs_mode = mode or owner.logprobs_mode
    if not normalised:
        del model.compute_logits
    try:
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            owner.logprobs_mode = old
        if not normalised:
            model.compute_logits = own


def _rate(
    llm: Any, prompt_ids: Sequence[int], count: int, tokens: int, *, seed: bool,
    logprobs: int | None, top_p: float,
) -> float:  # fmt: skip
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    for number in range(count):
        llm.add_request(
            f"rate-{number}",
            tokens_input([int(i) for i in prompt_ids]),
            SamplingParams(
                temperature=1.0,
                top_p=top_p,
                max_tokens=tokens,
                ignore_eos=True,
                seed=number if seed else None,
                logprobs=logprobs,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )
    began, done = time.perf_counter(), 0
    while llm.has_unfinished_requests():
        done += len(llm.step())
    assert done == count, (done, count)
    return count * tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("folder", type=Path)
    preparing.add_argument("--tokenizer", type=Path, required=True)
    preparing.add_argument("--small", action="store_true")
    measuring = commands.add_parser("measure")
    measuring.add_argument("config", type=Path)
    measuring.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.folder.resolve(), arguments.tokenizer, small=arguments.small)
    else:
        measure(arguments.config, arguments.out)


if __name__ == "__main__":
    main()
