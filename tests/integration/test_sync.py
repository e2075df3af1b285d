"""Weights on their way into the real engine: what the probe finds, and what the cache keeps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_qlrl import build
from megatron_qlrl.bench.policy import LOSS, make_group
from megatron_qlrl.config.load import load_config
from megatron_qlrl.errors import SyncError
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.packing.distribute import group_rows
from megatron_qlrl.parallel.context import process_group
from megatron_qlrl.platform.env import init_ranks
from megatron_qlrl.rollout.vllm_engine import Request, Sampling

MATRIX = "model.layers.1.self_attn.o_proj.weight"
sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, n=1)
config = load_config(Path("examples/quickstart/config.yaml"), [f"run.dir={sys.argv[1]}"])
init_ranks()
found = {}
with process_group(rank=0, local_rank=0, world_size=1):
    job = build.make_job(config)
    with build.open_model(job, build.make_scorer(job), temperature=0.7) as model:
        policy, vocab = model.policy, job.shape.vocab_size

        def sync(name, stream):
            meter = Meter()
            collector = replace(model.collector, weights=lambda: (iter(stream), policy.version))
            try:
                with collector.session(sampling, step=0, meter=meter) as collect:
                    collect([])
                found[name] = meter.summary()
            except SyncError as error:
                found[name] = str(error)

        def present(change=lambda name, tensor: tensor):
            return [(name, change(name, tensor)) for name, tensor in model.stream.for_engine(1)]

        def square(name, tensor):
            if name != MATRIX:
                return tensor
            assert tensor.shape[0] == tensor.shape[1]
            return tensor.t().contiguous()

        sync("first", present())
        sync("missing", [pair for pair in present() if pair[0] != MATRIX])
        sync("transposed", present(square))
        sync("mended", present())
        old = {name: tensor.clone() for name, tensor in present()}
        group = make_group(vocab=vocab, prompt_tokens=64, response_tokens=32, group=4)
        rows = group_rows(group, max_tokens=256, share_prompt=True, cost=lambda p, r: 1.0)
        policy.update(rows, LOSS, lr=1e-6)
        sync("all old", old.items())
        sync("one old", present(lambda name, t: old[name] if name == MATRIX else t))
        sync("layer old", present(lambda name, t: old[name] if ".layers.1." in name else t))
        sync("updated", present())

        # Without its reset the cache holds what earlier weights have computed.
        engine = model.collector.engine()
        engine._llm.reset_prefix_cache = lambda: None
        prompt = np.random.default_rng(1).integers(0, vocab, 100).astype(np.int32)
        for name, version in (("one", 101), ("two", 102), ("two again", 102)):
            engine.take_counts()
            with engine.awake(iter(present()), version) as generate:
                list(generate([Request(prompt, seed=0)], sampling))
            found["cached tokens, version " + name] = engine.take_counts()["cached_tokens"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each sync its metrics, or its error's message; and what the cache gave."""
    folder = tmp_path_factory.mktemp("sync")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "run")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["first", "mended", "updated"])
def test_sound_engines_differ_by_rounding(found: dict[str, Any], name: str) -> None:
    assert 0 < found[name]["training/probe_prefill_error"] < 4
    assert 0 < found[name]["training/probe_decode_error"] < 4
    if name != "first":
        assert found[name]["timing_s/probe"] < 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "weight sync: 1 tensors missing, e.g. model.layers.1.self_attn.o_proj.weight"),
        ("transposed", "weight sync: engine 0 does not have the trainer's weights: by prefill"),
        ("all old", "weight sync: engine 0 does not have the trainer's weights: by prefill"),
        ("one old", "weight sync: engine 0 does not have the trainer's weights: by prefill"),
        ("layer old", "weight sync: engine 0 does not have the trainer's weights: by prefill"),
    ],
)
def test_an_engine_with_other_weights_stops_the_run(
    found: dict[str, Any], name: str, message: str
) -> None:
    """The update is small: one step of 1e-6 changes log-probs by some 1e-3."""
    assert found[name].startswith(message)


def test_no_prefix_of_other_weights_comes_from_the_cache(found: dict[str, Any]) -> None:
    assert found["cached tokens, version one"] == 0
    assert found["cached tokens, version two"] == 0
    assert found["cached tokens, version two again"] == 96  # three blocks of 32
