"""Runs the user's own rewards (`reward.custom`) in worker processes with a time limit.

    config -> worker imports the functions, checks their signatures -> ready, or ConfigError
    a response -> an idle worker -> number in [0, 1], or no verdict, counted by its reason

A function can hang in C code or end its process; only a process of its own can be ended from
outside. A worker that was ended is started again at the next response.
"""

import asyncio
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from megatron_qlrl.errors import ConfigError, RewardError
from megatron_qlrl.reward.custom_child import ARGUMENTS
from megatron_qlrl.types import Score

START_LIMIT_S = 120
"""How long the imports may take."""
_CHILD = Path(__file__).with_name("custom_child.py")

Failure = Literal["raised", "invalid", "timeout", "crashed"]
COUNTS = ("asked", "no_verdict", "raised", "invalid", "timeout", "crashed", "seconds")


class OwnReward(Protocol):
    """The signature of a function in `reward.custom`. It is called by name, and may leave out the
    arguments that it does not use.

    Args:
        question: the question of the row.
        gold: `reward_model.ground_truth` of the row.
        response: all that the model wrote.
        final: the response behind its reasoning. A response that leaves its reasoning open scores 0
            and the function is not asked.
        extra: `extra_info` of the row, {} without it.

    Returns:
        A number in [0, 1], or a `Score`, whose `value` and `prediction` are used; None is no
        verdict: the response is masked out of loss and statistics.
    """

    def __call__(
        self, *, question: str, gold: str, response: str, final: str, extra: Mapping[str, Any]
    ) -> float | Score | None: ...


@dataclass(frozen=True)
class Source:
    """Where a function was found: its file, and the SHA-256 of the file's bytes."""

    file: str
    digest: str


@dataclass(frozen=True)
class Verdict:
    """What a function said of a response.

    Attributes:
        value: in [0, 1]; None is no verdict.
        prediction: the answer that a returned `Score` names, or None.
        failed: how the function failed, or None.
        why: the sentence about the failure, without its subject.
    """

    value: float | None
    prediction: str | None = None
    failed: Failure | None = None
    why: str = ""


class Worker:
    """One child process with all functions. Calls are made one after another.

    Like `ExpressionReader`, it is a plain subprocess and no multiprocessing, for the same reasons.
    """

    def __init__(
        self,
        functions: Sequence[str],
        *,
        timeout_s: float,
        start_limit_s: float = START_LIMIT_S,
    ) -> None:
        """`functions` are named as package.module:function."""
        self.sources: dict[str, Source] = {}
        self._functions, self._timeout_s = list(functions), timeout_s
        self._start_limit_s = start_limit_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process.

        Raises:
            ConfigError: a function cannot be imported or called as it must.
        """
        process = self._process = subprocess.Popen(
            # With -P the child's folder cannot shadow modules of the standard library.
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        weakref.finalize(self, _end, process)
        first = {
            # As `python -m` does it: the current folder before PYTHONPATH and installed packages.
            "path": list(dict.fromkeys((os.getcwd(), *filter(None, sys.path)))),
            "functions": self._functions,
            "start_limit_s": math.ceil(2 * self._start_limit_s),
            "call_limit_s": math.ceil(2 * self._timeout_s),
        }
        reply, late = self._exchange(process, first, self._start_limit_s)
        names = ", ".join(self._functions)
        if reply is None:
            how = f"takes more than {self._start_limit_s:g} s" if late else _ended(process)
            raise ConfigError(f"reward.custom: importing {names} {how}; its output is above")
        if "unusable" in reply:
            _end(process)
            raise ConfigError(
                f"reward.custom: {reply['unusable']} (named: {names}). A function is named as "
                "package.module:function; see docs/own-rewards.md"
            )
        sources = cast("dict[str, dict[str, str]]", reply["sources"])
        self.sources = {name: Source(**own) for name, own in sources.items()}

    def ask(self, function: str, arguments: Mapping[str, Any]) -> Verdict:
        """Returns what a function says; a process that has ended is started again.

        Raises:
            ConfigError: it cannot be started again.
        """
        if self._process is None or self._process.poll() is not None:
            self.start()
        process = self._process
        assert process is not None
        reply, late = self._exchange(process, (function, arguments), self._timeout_s)
        if late:
            limit = f"reward.custom_timeout_s={self._timeout_s:g}"
            return Verdict(None, None, "timeout", f"gave no answer within {limit}; it was ended")
        if reply is None:
            return Verdict(None, None, "crashed", _ended(process))
        if "failed" in reply:
            return Verdict(None, None, reply["failed"], reply["why"])
        return Verdict(reply["value"], reply["prediction"])

    def close(self) -> None:
        """Ends the process, also one that is busy."""
        if self._process is not None:
            _end(self._process)

    def _exchange(
        self, process: subprocess.Popen[bytes], request: object, limit_s: float
    ) -> tuple[dict[str, Any] | None, bool]:
        """Returns the reply, or None if the process has ended; and whether it was ended because
        of the limit."""
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(process)

        assert process.stdin and process.stdout
        timer = threading.Timer(limit_s, end)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            process.stdin.write(pickle.dumps(request))
            line = process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it has ended, or was closed
            pass
        timer.cancel()
        timer.join()  # after this it ends nothing any more
        if late.is_set() or not line:
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)  # a process that ends by itself keeps its own exit code
            _end(process)
            return None, late.is_set()
        return json.loads(line), False


class CustomRewards:
    """The functions of a run and their workers. `score` belongs to one event loop.

    Attributes:
        counts: asked, no_verdict (the function returned None), raised, invalid (no number in
            [0, 1]), timeout, crashed (the process ended), and seconds of all calls.
        last_failure: why there was no verdict, the last time a function failed.
    """

    def __init__(self, functions: Mapping[str, str], *, timeout_s: float, num_workers: int) -> None:
        """Starts the first worker, the others when they are needed.

        Args:
            functions: by the pattern of the data source, package.module:function.

        Raises:
            ConfigError: a function cannot be used.
        """
        self.counts = no_custom_counts()
        self.last_failure = ""
        names = list(dict.fromkeys(functions.values()))
        self._workers = [Worker(names, timeout_s=timeout_s) for _ in range(num_workers)]
        self._workers[0].start()
        self.sources = {
            f"{pattern} ({name})": self._workers[0].sources[name]
            for pattern, name in functions.items()
        }
        self._idle = list(reversed(self._workers))
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        self._slots = asyncio.Semaphore(num_workers)

    async def score(self, function: str, arguments: Mapping[str, Any]) -> Verdict:
        """Returns what the function says of one response.

        Raises:
            RewardError: the function could be imported at the start, and no longer.
        """
        assert arguments.keys() == set(ARGUMENTS)
        loop = asyncio.get_running_loop()
        async with self._slots:
            worker = self._idle.pop()
            start = time.perf_counter()
            try:
                verdict = await loop.run_in_executor(self._pool, worker.ask, function, arguments)
            except ConfigError as error:
                raise RewardError(str(error)) from error
            finally:
                self._idle.append(worker)
        self.counts["asked"] += 1
        self.counts["seconds"] += time.perf_counter() - start
        if verdict.failed is not None:
            self.counts[verdict.failed] += 1
            self.last_failure = f"reward.custom: {function} {verdict.why}"
        elif verdict.value is None:
            self.counts["no_verdict"] += 1
        return verdict

    def close(self) -> None:
        """Ends the workers, also those that are busy."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()


def check_own_rewards(functions: Mapping[str, str]) -> None:
    """Imports the functions in a process of its own, before expensive work starts.

    Raises:
        ConfigError: one cannot be used.
    """
    with closing(Worker(list(functions.values()), timeout_s=START_LIMIT_S)) as worker:
        worker.start()


def no_custom_counts() -> dict[str, float]:
    """Returns `CustomRewards.counts` before any call."""
    return dict.fromkeys(COUNTS, 0.0)


def _ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is not None and code < 0:
        return f"ended its process by {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and those that the function started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    _kill(process)
    process.wait()
    process.stdin.close()
    process.stdout.close()
