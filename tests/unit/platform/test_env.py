import logging
import os
import socket
import warnings
from contextlib import nullcontext

import pytest

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.env import (
    Ranks,
    check_allocator,
    init_ranks,
    listen,
    quiet_foreign_warnings,
    read_job,
    read_ranks,
    read_secret,
    set_engine_env,
    take_listener,
)

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Ranks(0, 0, 1)),
        (TORCHRUN, Ranks(5, 1, 8)),
        (SRUN, Ranks(3, 1, 4)),
        (SRUN | TORCHRUN, Ranks(5, 1, 8)),
        # A batch script outside srun is one process, whatever the job's number of tasks.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, Ranks(0, 0, 1)),
    ],
)
def test_read_ranks(environ: dict[str, str], expected: Ranks) -> None:
    assert read_ranks(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', expected a number"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, LOCAL_RANK=1 and WORLD_SIZE=8 do not fit"),
    ],
)
def test_read_ranks_of_a_broken_launch(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_ranks(environ)


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty environment of our own in place of the process'."""
    fresh: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", fresh)
    return fresh


def test_one_process_gets_an_address(environ: dict[str, str]) -> None:
    assert init_ranks() == Ranks(0, 0, 1)
    assert environ["MASTER_PORT"] == "0"  # any free port: nobody else has to know it
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("0", "0", "1")
    assert init_ranks() == Ranks(0, 0, 1)
    assert environ["MASTER_PORT"] == "0"


def test_srun_on_one_node_agrees_on_a_port(environ: dict[str, str]) -> None:
    environ.update(SRUN, SLURM_JOB_ID="123", SLURM_NNODES="1", SLURM_STEP_ID="2")
    assert init_ranks() == Ranks(3, 1, 4)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert environ["MASTER_PORT"] == "20863"  # 20000 + 123 * 7 + 2
    assert environ["RANK"] == "3"


def test_srun_keeps_the_scripts_address(environ: dict[str, str]) -> None:
    environ.update(SRUN, MASTER_ADDR="node7", MASTER_PORT="29500", SLURM_NNODES="2")
    init_ranks()
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("node7", "29500")


def test_srun_on_two_nodes_needs_an_address(environ: dict[str, str]) -> None:
    environ.update(SRUN, SLURM_JOB_ID="123", SLURM_NNODES="2")
    with pytest.raises(ConfigError, match="4 processes need MASTER_ADDR and MASTER_PORT"):
        init_ranks()


def test_engine_environment(environ: dict[str, str]) -> None:
    environ.update(
        VLLM_LOGGING_LEVEL="DEBUG",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_KVCACHE_SPACE="40",
    )
    set_engine_env(cpu_kv_cache_gib=2)
    assert environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environ["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environ["VLLM_NO_USAGE_STATS"] == "1"


def test_only_the_known_warnings_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_foreign_warnings()
        warnings.warn("Transformer Engine and Apex are not installed. Falling", stacklevel=1)
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("the disk is nearly full", stacklevel=1)
    assert [str(w.message) for w in seen] == ["the disk is nearly full"]


def test_megatrons_advice_is_hidden_and_its_other_messages_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quiet_foreign_warnings()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("something is wrong")
    assert caplog.messages == ["something is wrong"]


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_listener_is_reached_before_it_is_taken_and_taken_once(
    environ: dict[str, str], host: str
) -> None:
    with listen(host) as listener:
        port = listener.getsockname()[1]
        environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        environ["QLRL_LISTENER"] = str(listener.fileno())
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        assert take_listener() == ("127.0.0.1", port, listener.fileno())
        assert take_listener() is None


def test_a_secret_is_read_by_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", " s3cret\n")
    monkeypatch.setenv("EMPTY_KEY", " ")
    assert read_secret("SOME_KEY") == "s3cret"
    assert read_secret(None) is None
    for name in ("EMPTY_KEY", "NO_SUCH_KEY"):
        with pytest.raises(ConfigError, match=f"{name}, which is not set; export {name}"):
            read_secret(name)


def test_job_and_its_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert read_job() == ("", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    assert read_job() == ("812", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert read_job() == ("812", 2)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        (
            {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},
            "sets PYTORCH_ALLOC_CONF=backend:cudaMallocAsync: the engine could not give its memory",
        ),
        (
            {
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,backend:cudaMallocAsync",
                "PYTORCH_NO_CUDA_MEMORY_CACHING": "0",
            },
            "backend:cudaMallocAsync and PYTORCH_NO_CUDA_MEMORY_CACHING: the engine",
        ),
    ],
)
def test_allocators_in_which_the_engine_cannot_sleep(
    environ: dict[str, str], message: str | None
) -> None:
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_allocator(environ)
