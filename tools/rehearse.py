"""Runs `qlrl rl` over rows as long as the paper's, with a narrow model and no engine, and says what
each part takes: seconds, host memory, bytes on disk.

    python tools/rehearse.py OUT --tokenizer models/Qwen3-4B --json rehearsal.json

Everything beside the two stand-ins is the product: reading, tokenising, curriculum, rewards,
packing, updates, logs, checkpoints, release, report. The model has one narrow layer and the
tokenizer's vocabulary. The sampler draws tokens at random, as many as a log-normal law says. Rows
have the lengths of DocQA-RL-1.6K: 1,600 rows of 11.4K tokens in the mean and 59.6K at most, of
which 79 % have no more than 20K. Their text is Python's own reference.

With `--engine` it takes real vLLM and one prompt of the longest with 8 responses in each step.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_qlrl import build, commands
from megatron_qlrl.bench.measure import host_peak, reset_host_peak
from megatron_qlrl.config.load import load_config
from megatron_qlrl.data.dataset import verl_schema
from megatron_qlrl.data.tokenizer import load_tokenizer
from megatron_qlrl.errors import QlrlError
from megatron_qlrl.platform.env import init_ranks
from megatron_qlrl.rollout.vllm_engine import COUNTS, Completion, Generate, Request, Sampling
from megatron_qlrl.train.recorder import Recorder
from megatron_qlrl.weights.checkpoint import CheckpointStore

LONGEST, SHORT, SHARE_SHORT = 59_600, 20_000, 0.79
OVERHEAD = 100
"""More tokens than a prompt has beside its document."""


def lengths(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each row: log-uniform from 1,000 to 20,000 for 79 % of them, and a density that
    falls with the square of the distance from 59,600 for the others. One row has 59,600."""
    short = np.exp(rng.uniform(np.log(1000), np.log(SHORT), rows))
    long = SHORT + (LONGEST - SHORT) * rng.beta(1, 3, rows)
    result = np.where(rng.random(rows) < SHARE_SHORT, short, long).astype(int)
    result[0] = LONGEST
    return result


def write_rows(file: Path, sizes: np.ndarray, tokenizer: Any, rng: np.random.Generator) -> None:
    """Writes documents of so many tokens in verl's format, 64 rows at a time."""
    text = "\n".join(topics.values())
    per_token = len(text) / len(_offsets(tokenizer, text))
    text *= 2  # a document is a slice of the text, read around its end
    schema = verl_schema({"index": pa.int64()}, has_response=False)
    with pq.ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        for index, size in enumerate(sizes):
            wanted = max(int(size) - OVERHEAD, 1)
            begin = int(rng.integers(len(text) // 2))
            document = _first_tokens(tokenizer, text[begin:], wanted, guess=per_token * wanted)
            question = f"What does part {index} say?"
            content = f"<text>\n{document}\n</text>\n\n{question}"
            rows.append(
                {
                    "data_source": "rehearsal",
                    "prompt": [{"role": "user", "content": content}],
                    "ability": "qa",
                    "reward_model": {"style": "rule", "ground_truth": str(index)},
                    "extra_info": {"index": index},
                    "document": document,
                    "question": question,
                }
            )
            if len(rows) == 64 or index + 1 == len(sizes):
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []


def _first_tokens(tokenizer: Any, text: str, wanted: int, *, guess: float) -> str:
    """Returns the text's first tokens; so many have about `guess` characters. The text has more."""
    while True:
        offsets = _offsets(tokenizer, text[: int(guess)])
        if len(offsets) > wanted:
            return text[: offsets[wanted][0]]
        guess = 1.5 * guess + 10  # tables and code have longer tokens than prose


def _offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Returns where each token of a text begins and ends."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return encoded["offset_mapping"]


def write_model(folder: Path, tokenizer: Any) -> None:
    """Writes a Qwen2 of one layer, 64 wide, with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


REWARD = """def by_text(final):
    return float(sum(final.encode()) % 2)
"""
"""Half of all texts earn 1, for the texts mean nothing."""


class RandomSampler:
    """Stands for the engine: tokens at random, log-normal lengths."""

    engine_index, num_engines, leads = 0, 1, True

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    @contextmanager
    def awake(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> Iterator[Generate]:
        for _ in weights:
            pass
        yield self._generate

    def _generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        for number, request in enumerate(requests):
            rng = np.random.default_rng(request.seed)
            length = int(
                min(rng.lognormal(np.log(sampling.max_tokens / 4), 1), sampling.max_tokens)
            )
            ids = rng.integers(self._vocab, size=max(length, 1), dtype=np.int32)
            logprobs = np.full(len(ids), -np.log(self._vocab), np.float32)
            yield number, Completion(ids, logprobs, length < sampling.max_tokens)

    def take_counts(self) -> dict[str, float]:
        return dict.fromkeys(COUNTS, 0.0)

    def close(self) -> None:
        pass


class Parts:
    """Seconds, calls and host memory of named parts, which must not lie in each other."""

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, float]] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        before, began = reset_host_peak(), time.perf_counter()
        yield
        cost = self.costs.setdefault(name, {"seconds": 0.0, "calls": 0, "peak_mib": 0.0})
        cost["seconds"] += time.perf_counter() - began
        cost["calls"] += 1
        cost["peak_mib"] = max(cost["peak_mib"], (host_peak() - before) / 2**20)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Times each call of `owner.method` from now on."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def sizes_on_disk(run: Path) -> dict[str, int]:
    """Bytes of a run's files, by kind."""
    sizes: dict[str, int] = {}
    for path in run.rglob("*"):
        if path.is_file() and not path.is_symlink():
            kind = path.relative_to(run).parts[0]
            sizes[kind] = sizes.get(kind, 0) + path.stat().st_size
    return dict(sorted(sizes.items()))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    long = {"prompts_per_step": 1, "check_sync": True} if args.engine else {}
    return {
        "run": {"dir": str(args.out / "run")},
        "model": {"path": str(args.out / "model"), "dtype": "float32"},
        "data": {"train_files": [str(args.out / "train.parquet")]},
        "phases": [
            {"name": "20k", "max_input_tokens": 20_000, "steps": args.steps},
            {"name": "60k", "max_input_tokens": 60_000, "steps": args.steps},
        ],
        "rollout": {
            "prompts_per_step": args.prompts,
            "group_size": 8,
            "max_response_tokens": args.response_tokens,
            "check_sync": False,
            **long,
        },
        "algorithm": {"filter_groups": False},
        "policy": {"max_tokens_per_row": 60_000 + 8 * args.response_tokens},
        "reward": {"custom": {"rehearsal": "rehearsal_reward:by_text"}},
        "checkpoint": {"every_steps": 1, "keep": 2},
    }


def rehearse(args: argparse.Namespace) -> dict[str, Any]:
    parts, rng = Parts(), np.random.default_rng(0)
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = lengths(args.rows, rng)
    if args.engine:
        sizes = np.array([SHORT, *([LONGEST] * args.rows)][: args.rows])
    if not (args.out / "model" / "config.json").is_file():
        write_model(args.out / "model", load_tokenizer(args.tokenizer))
    # In the folder of another model the same files may be read by another class of tokenizer.
    tokenizer = load_tokenizer(args.out / "model")
    if not (args.out / "train.parquet").is_file():
        write_rows(args.out / "train.parquet", sizes, tokenizer, rng)
    # A module of its own: the reward's process imports it, and must not import torch with it.
    (args.out / "rehearsal_reward.py").write_text(REWARD)
    sys.path.insert(0, str(args.out.resolve()))
    file = args.out / "config.json"
    file.write_text(json.dumps(settings(args)))
    parts.watch(commands, "read_train_prompts", "read and tokenise")
    parts.watch(build, "make_sampler", "curriculum")
    parts.watch(commands, "report_at_end", "report")
    for method in ("start", "record", "save", "release"):
        parts.watch(Recorder, method, f"recorder.{method}")
    parts.watch(CheckpointStore, "wait", "checkpoint, waiting for the disk")
    if not args.engine:
        build._make_engine = lambda *_: RandomSampler(len(tokenizer))
    init_ranks()
    began = time.perf_counter()
    commands.run_rl(load_config(file, args.settings))
    run = args.out / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "rows": {
            "rows": len(sizes),
            "tokens": int(sizes.sum()),
            "mean": float(sizes.mean()),
            "longest": int(sizes.max()),
            "share_to_20k": float((sizes <= SHORT).mean()),
            "file_bytes": (args.out / "train.parquet").stat().st_size,
        },
        "seconds": time.perf_counter() - began,
        "parts": parts.costs,
        "steps": [
            {
                name.removeprefix("timing_s/"): round(value, 3)
                for name, value in step.items()
                if name.startswith("timing_s/") or name in ("step", "perf/total_num_tokens")
            }
            for step in steps
        ],
        "bytes_on_disk": sizes_on_disk(run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=2, help="of each phase")
    parser.add_argument("--prompts", type=int, default=32, help="of a step")
    parser.add_argument("--response-tokens", type=int, default=2048)
    parser.add_argument("--engine", action="store_true", help="real vLLM, one prompt a step")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="more settings: a.b=value")
    args = parser.parse_intermixed_args()
    try:
        result = rehearse(args)
    except QlrlError as error:
        sys.exit(f"rehearse: error: {error}")
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
