"""The child process of `expressions.py`: reads one expression per line, writes its value.

It runs as a script whose argument is the time limit of one expression in seconds. The alarm's
default action ends the process even inside C code, and also if the parent has ended.
"""

# math-verify has no types.
# pyright: basic

import logging
import math
import resource
import signal
import sys

START_LIMIT_S = 120
MEMORY_LIMIT_BYTES = 4 << 30


def main(time_limit_s: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.alarm(START_LIMIT_S)
    logging.disable(logging.WARNING)  # math-verify warns that its timeout is off; the alarm is ours
    value(r"\frac{1}{2}")  # imports everything before the time limits apply
    print("ready", flush=True)
    signal.alarm(0)
    for line in sys.stdin:
        signal.alarm(time_limit_s)
        print(value(line.strip()), flush=True)
        signal.alarm(0)


def value(expression: str) -> float | str:
    """Returns the finite real value of a LaTeX expression, or "none"."""
    from math_verify import LatexExtractionConfig, parse

    expressions = parse(
        f"${expression}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )
    try:
        number = float(expressions[0].evalf()) if len(expressions) == 1 else math.inf
    except (AttributeError, TypeError, ValueError, OverflowError):
        return "none"
    return number if math.isfinite(number) else "none"


if __name__ == "__main__":
    main(int(sys.argv[1]))
