"""Fixtures for every suite."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from megatron_qlrl.config.shape import ModelShape, hf_shapes

# A deadline per example fails on a busy machine; how fast code is, benchmarks say.
settings.register_profile("qlrl", deadline=None)
settings.load_profile("qlrl")

LAUNCH_VARIABLES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT QLRL_ERROR_DIR "
    "SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_STEP_ID SLURM_JOB_ID SLURM_NNODES"
).split()

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=150, help="Damaged files for each reader.")


@pytest.fixture
def fuzz_cases(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--fuzz-cases")


# Files that look at the same run, a fixture of the session. Where tests run in several processes,
# all of these go to one, so that the run is made once.
SHARED_RUNS = {
    "tests/integration/test_phases.py": "phased_run",
    "tests/integration/test_slurm.py": "phased_run",
    "tests/integration/test_release.py": "finished_run",
    "tests/integration/test_release_check.py": "finished_run",
    "tests/integration/test_resume.py": "finished_run",
    "tests/integration/test_judge.py": "answering_model",
    "tests/integration/test_distill.py": "answering_model",
    "tests/integration/test_fast.py": "answering_model",
}


class _BySharedRun(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return SHARED_RUNS.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _BySharedRun:
    return _BySharedRun(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a run takes longest and comes first."""
    order = {run: place for place, run in enumerate(SHARED_RUNS.values())}
    items.sort(
        key=lambda item: order.get(SHARED_RUNS.get(item.nodeid.split("::")[0], ""), len(order))
    )


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests start as a job of one process, even when they run under srun."""
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def lone_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A gloo process group of this process alone, met through a file."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}


@pytest.fixture
def fake_hf(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Hugging Face folder that passes the checks; its weights are zeros."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        write_safetensors(folder / "model.safetensors", hf_shapes(ModelShape.from_hf(HF_CONFIG)))
        return folder

    return make


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, dtype: str = "F32", num_bytes: int = 4
) -> None:
    """Zeros, written by hand after the format's description."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + at)
