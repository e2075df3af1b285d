"""The child process of `custom.py`: imports the user's functions and calls one for each request.

    stdin: pickles of the parent: the functions once, then a (function, arguments) for each call
    stdout: a line of JSON for each of them

It runs as a script. What a function prints goes to stderr, so it cannot disturb the replies.
"""

import hashlib
import importlib
import inspect
import json
import numbers
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ARGUMENTS: tuple[str, ...] = ("question", "gold", "response", "final", "extra")
MAX_CHARS = 400
"""The longest text in a reply; a whole reply must fit into a pipe's buffer."""

Reply = dict[str, Any]


class Unusable(Exception):
    """The function cannot be imported or called; the message says why."""


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # The parent ends a call that takes too long. The alarm does so if the parent is gone.
    start = pickle.load(requests)
    sys.path[:] = start["path"]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.alarm(start["start_limit_s"])
    functions: dict[str, tuple[Callable[..., object], list[str]]] = {}
    sources: dict[str, dict[str, str]] = {}
    try:
        for name in start["functions"]:
            function = load(name)
            functions[name] = function, wanted(name, function)
            sources[name] = source_of(name, function)
    except Unusable as error:
        _send(replies, {"unusable": str(error)})
        return
    _send(replies, {"sources": sources})
    while True:
        signal.alarm(0)
        try:
            name, arguments = pickle.load(requests)
        except EOFError:
            return
        signal.alarm(start["call_limit_s"])
        function, names = functions[name]
        _send(replies, call(function, {key: arguments[key] for key in names}))


def load(name: str) -> Callable[..., object]:
    """Imports a function that is named as package.module:function.

    Raises:
        Unusable: there is no such function.
    """
    module_name, _, path = name.partition(":")
    try:
        result: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = "the current folder, PYTHONPATH and the installed packages"
        raise Unusable(f"there is no module {error.name!r} in {where}") from error
    except Exception as error:  # the user's code may raise anything
        raise Unusable(f"importing {module_name} fails: {_told(error)}") from error
    for part in path.split("."):
        if not hasattr(result, part):
            raise Unusable(f"{module_name} has no {path!r}")
        result = getattr(result, part)
    if not callable(result):
        raise Unusable(f"{path!r} is a {type(result).__name__}, not a function")
    return result


def wanted(name: str, function: Callable[..., object]) -> list[str]:
    """Returns the arguments that the function asks for by name.

    Raises:
        Unusable: it takes others, or is asynchronous.
    """
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise Unusable(f"{name} must be a plain function, neither async nor a generator")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise Unusable(f"{name} does not tell its arguments: {error}") from error
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        names = list(ARGUMENTS)
    else:
        names = [p.name for p in parameters]
    unknown = [
        p.name
        for p in parameters
        if p.name not in ARGUMENTS or p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)
    ]
    if unknown:
        raise Unusable(
            f"{name} takes {', '.join(unknown)}; its arguments are passed by name and are some of "
            f"{', '.join(ARGUMENTS)}"
        )
    return names


def source_of(name: str, function: Callable[..., object]) -> dict[str, str]:
    """Returns the file that defines the function, and the digest of its bytes."""
    module = sys.modules[name.partition(":")[0]]
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that can be called
        file = inspect.getsourcefile(type(function))
    file = file or module.__file__ or ""
    content = Path(file).read_bytes() if Path(file).is_file() else b""
    return {"file": file, "digest": hashlib.sha256(content).hexdigest()}


def call(function: Callable[..., object], arguments: Mapping[str, object]) -> Reply:
    """Returns the verdict, or why there is none."""
    try:
        return verdict(function(**arguments))
    except Exception as error:  # the user's code may raise anything
        return {"failed": "raised", "why": f"raised {_told(error)}"}


def verdict(result: Any) -> Reply:
    """Returns what a function's result says: a number in [0, 1], a `Score` with one, or None."""
    from megatron_qlrl.types import Score

    prediction = None
    value = result
    if isinstance(result, Score):
        value, prediction = result.value, result.prediction[:MAX_CHARS] or None
    if value is None:
        return {"value": None, "prediction": prediction}
    if isinstance(value, numbers.Real) and 0 <= float(value) <= 1:
        return {"value": float(value), "prediction": prediction}
    shown = f"returned {value!r}"[:MAX_CHARS] + f" (a {type(value).__name__})"
    return {"failed": "invalid", "why": f"{shown}, not a number in [0, 1], a Score or None"}


def _told(error: Exception) -> str:
    """The error with the line of the user's code that raised it, in bounded length."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}"[:MAX_CHARS] + at


def _send(replies: int, reply: Reply) -> None:
    line = json.dumps(reply, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    while line:
        line = line[os.write(replies, line) :]


if __name__ == "__main__":
    main()
