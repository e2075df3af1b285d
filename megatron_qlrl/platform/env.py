"""The process environment: which rank this is, and what the engine must find there.

Beside the launchers this is the only reader and writer of environment variables. It is
torch-free, because everything set here must be in place before torch or vLLM is imported.
"""

import logging
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from megatron_qlrl.errors import ConfigError

LONGEST_STEP = "QLRL_LONGEST_STEP_S"
"""The longest step so far, which a process leaves to the next one (launch/next_process.py)."""

LISTENER = "QLRL_LISTENER"
"""The descriptor of a socket that listens at MASTER_PORT already; rank 0 has it where we chose the
port. A port that is only looked up can be taken by another program before rank 0 binds it."""

BACKLOG = 4096
"""How many ranks may wait at the socket until rank 0 answers."""

PICKLED_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Transformer Engine's name for the user's leave to unpickle its state of delayed FP8 scaling."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def read_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """Returns the place of this process as torchrun, the local launcher or srun gives it.

    Without either it is a job of one process. A batch script that sbatch starts is such a job
    too: it sees SLURM_PROCID and SLURM_NTASKS, but is not a task of a step.

    Raises:
        ConfigError: a variable is missing or not a number.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    else:
        return Ranks()
    rank, local_rank, world_size = (_number(environ, name) for name in names)
    if not 0 <= local_rank <= rank < world_size:
        raise ConfigError(
            f"launch: {names[0]}={rank}, {names[1]}={local_rank} and {names[2]}={world_size} do "
            "not fit together; start with `qlrl ... --processes N`, torchrun or srun"
        )
    return Ranks(rank, local_rank, world_size)


def init_ranks() -> Ranks:
    """Calls `read_ranks` and exports the place and the address under torch's names.

    torch's process group and the engine both read RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT. Calling it again changes nothing.

    Raises:
        ConfigError: a job of several processes has no MASTER_ADDR and it cannot be known.
    """
    ranks = read_ranks()
    address = _address(ranks)
    os.environ.update(
        RANK=str(ranks.rank),
        LOCAL_RANK=str(ranks.local_rank),
        WORLD_SIZE=str(ranks.world_size),
        MASTER_ADDR=address[0],
        MASTER_PORT=address[1],
    )
    # With sequence parallelism Megatron orders communication before compute by this.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return ranks


def set_engine_env(*, cpu_kv_cache_gib: int) -> None:
    """Sets what vLLM reads at import; call it before the first import of vllm.

    The user's own values win, except for the two that the package depends on.
    """
    # The engine lives in this process, where the trainer hands it weights as tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_kv_cache_gib)
    defaults = {
        # "auto" pins each engine's threads to cores it believes to have for itself.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # At WARNING every weight update of the CPU engine prints two lines that mean nothing.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # Models are local folders; without these each start asks the hub about them.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def set_deterministic_env() -> None:
    """Sets what cuBLAS and Transformer Engine read when they are first used."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"


def check_allocator(environ: Mapping[str, str] | None = None) -> None:
    """Checks that the environment gives torch an allocator that the engine can sleep in: vLLM frees
    its memory through a pool of its own, which only torch's native caching allocator has.

    Raises:
        ConfigError: it names another allocator or switches caching off.
    """
    environ = os.environ if environ is None else environ
    wrong = [
        f"{name}={environ[name]}"
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        if "cudaMallocAsync" in environ.get(name, "")
    ]
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in environ:  # torch asks for no value
        wrong.append("PYTORCH_NO_CUDA_MEMORY_CACHING")
    if wrong:
        raise ConfigError(
            f"the environment sets {' and '.join(wrong)}: the engine could not give its memory to "
            "the trainer, because vLLM sleeps through a memory pool that only torch's native "
            "allocator has; unset it (expandable_segments:True is fine)"
        )


def job_ends_at() -> float | None:
    """Returns when this job's time is up, in seconds since the epoch (from Slurm or
    slurm/common.sh); None without a limit."""
    value = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(value) if value.isdigit() else None


def read_job() -> tuple[str, int]:
    """Returns Slurm's number of this job and how often it was put back into the queue, or ("", 0)
    outside of one."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdigit() else 0


def longest_step_s() -> float:
    """Returns the seconds of this job's longest step before this process, or 0 at its start."""
    return float(os.environ.get(LONGEST_STEP, "0"))


def may_unpickle_state() -> bool:
    """Returns whether the user trusts the FP8 state in checkpoints, as Transformer Engine asks."""
    return os.environ.get(PICKLED_STATE) == "1"


def read_secret(variable: str | None, *, of: str = "reward.judge") -> str | None:
    """Returns the key in the environment `variable`, or None if no key is needed.

    Args:
        of: the section that names the variable, for the message.

    Raises:
        ConfigError: the variable is not set.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"the key of {of} is to come from the environment variable {variable}, which is not "
            f"set; export {variable}, or name none ({of}.api_key_env) if no key is needed"
        )
    return value


def quiet_foreign_warnings() -> None:
    """Hides what other packages warn about on every start and nobody can act on.

    Whether Transformer Engine and Apex are there is for `qlrl check` to say. torch's native code,
    which does not go through Python's stderr, reads its level when torch is imported.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for message in (
        ".*Apex (is|are) not installed",
        "full scope is deprecated",
        "`load_state_dict` is deprecated and will be removed",
        "Please use DTensor instead and we are deprecating ShardedTensor",
        "`torch.distributed.* is deprecated",
        "TypedStorage is deprecated",
        "The .grad attribute of a Tensor that is not a leaf Tensor",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name, start in _MEGATRONS_ADVICE.items():
        logging.getLogger(name).addFilter(partial(_starts_otherwise, start))


_MEGATRONS_ADVICE = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param",
}
"""What Megatron 0.19 advises its callers on every start, by logger."""


def _starts_otherwise(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


def listen(host: str = "") -> socket.socket:
    """Returns a socket that listens at a free port of `host`, by default of every address."""
    if host or not socket.has_dualstack_ipv6():
        return socket.create_server((host, 0), backlog=BACKLOG)
    return socket.create_server(
        ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
    )


def take_listener() -> tuple[str, int, int] | None:
    """Returns MASTER_ADDR, MASTER_PORT and the descriptor of the socket that listens there, or None
    if this process was given no such socket. Whoever takes it owns it."""
    descriptor = os.environ.pop(LISTENER, None)
    if descriptor is None:
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(descriptor)


def _address(ranks: Ranks) -> tuple[str, str]:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if ranks.world_size == 1:
        return host or "127.0.0.1", port or "0"  # the process group's store chooses the port
    if host and port:
        return host, port
    job = os.environ.get("SLURM_JOB_ID", "")
    one_node = os.environ.get("SLURM_NNODES", os.environ.get("SLURM_JOB_NUM_NODES")) == "1"
    if job.isdigit() and (host or one_node):
        # All ranks must find the same port without talking: take it from the job's number.
        step = _number(os.environ, "SLURM_STEP_ID") if "SLURM_STEP_ID" in os.environ else 0
        return host or "127.0.0.1", port or str(20_000 + (int(job) * 7 + step) % 20_000)
    raise ConfigError(
        f"launch: {ranks.world_size} processes need MASTER_ADDR and MASTER_PORT; in a batch "
        'script: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
        "MASTER_PORT=29500"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdigit():
        problem = f"is '{value}'" if value else "is not set"
        raise ConfigError(
            f"launch: {name} {problem}, expected a number; start with `qlrl ... --processes N`, "
            "torchrun or srun"
        )
    return int(value)
