r"""Reads expressions such as `\frac{3}{4}` or `3 \times 10^6` with math-verify, in a child process.

math-verify uses sympy, which may take forever or all memory on unlucky input. So the input is
checked first (a short alphabet, small exponents, bounded nesting), and the child ends itself at a
time limit and a memory limit.
"""

import functools
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from megatron_qlrl.errors import RewardError
from megatron_qlrl.reward.numeric import bare_form

_CHILD = Path(__file__).with_name("expressions_child.py")
_MAX_CHARS = 80
_MAX_NESTING = 4
_ALPHABET = re.compile(r"(?:[-0-9.{}()^ ×·]|\\(?:[dt]?frac|sqrt|times|cdot)(?![a-z]))+")
_NOTATION = re.compile(r"[\\^×·]")
_EXPONENT = re.compile(r"\^(?:\{(-?[0-9]{1,3})\}|(-?[0-9]{1,3})(?![0-9.]))")
_TIMES = re.compile(r"(?<=[0-9])\s*x\s*(?=10\s*\^)")
# A minus must be a sign and not a difference: "5 - 6" may be a range.
_DIFFERENCE = re.compile(r"(?<![{(^])\s*-")
_HUGE = re.compile(r"[0-9]{16}|[)}]\s*\^")


def evaluate(text: str) -> float | None:
    """Returns the value of an expression, or None if the text is none or exceeds the limits.

    Only products, fractions, roots and powers of written numbers are expressions here.

    Raises:
        RewardError: math-verify cannot be started.
    """
    if len(text) > _MAX_CHARS:
        return None
    expression = _checked(_TIMES.sub(r"\\times ", bare_form(text)))
    return _reader(os.getpid()).read(expression) if expression else None


def _checked(text: str) -> str | None:
    """Returns the expression as LaTeX with braces around its exponents, or None if it is not
    safe."""
    if not _NOTATION.search(text) or not _ALPHABET.fullmatch(text):
        return None
    powers = _EXPONENT.sub("", text)
    if "^" in powers or powers.count("\\sqrt") > 1 or _HUGE.search(text):
        return None
    if _DIFFERENCE.search(powers, 1) or _nesting(text) > _MAX_NESTING:
        return None
    return _EXPONENT.sub(lambda match: f"^{{{match[1] or match[2]}}}", text)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{(") - (char in "})")
        deepest = max(deepest, depth)
    return deepest


class ExpressionReader:
    """One child process: it is started at the first expression and restarted after it has ended.

    It is a plain subprocess, because multiprocessing forks a process that holds the threads of
    Megatron and vLLM, or needs an importable main module, and daemons may not use it.
    """

    def __init__(self, child: Path = _CHILD, *, time_limit_s: int = 10) -> None:
        # With -P the child's folder cannot shadow modules of the standard library.
        self._command = [sys.executable, "-P", str(child), str(time_limit_s)]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def read(self, expression: str) -> float | None:
        """Returns the value, or None if math-verify finds none or the child exceeded a limit.

        Raises:
            RewardError: the child cannot be started.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            reply = _ask(self._process, expression)
        return float(reply) if reply not in (b"", b"none\n") else None

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        weakref.finalize(self, _end, process)
        assert process.stdout
        if process.stdout.readline() != b"ready\n":
            _end(process)
            raise RewardError(
                f"math-verify did not start in {sys.executable}: its message is above. "
                "Install the pinned requirements again (requirements/cpu.txt)"
            )
        return process


def _ask(process: subprocess.Popen[bytes], expression: str) -> bytes:
    """Sends one line and returns the reply, or b"" if the child has ended."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(expression.encode() + b"\n")
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = b""
    if not reply:
        _end(process)
    return reply


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@functools.cache
def _reader(_pid: int) -> ExpressionReader:
    """Returns this process' reader; a forked process must not write into its parent's pipe."""
    return ExpressionReader()
