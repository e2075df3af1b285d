"""The child of `expressions.py`: a line with an expression in, a line with its value out.

Run as a script with the time limit of one line in seconds. The alarm's default action ends the process even inside C code, also when the
parent is gone by then.
"""

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
    from math_verify import LatexExtractionConfig, parse

    logging.disable(logging.WARNING)  # "timeout is disabled": the alarm is the timeout
    for line in sys.stdin:
        signal.alarm(time_limit_s)
        found = parse(
            f"${line.strip()}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=0,
        )
        print(_value(found), flush=True)
        signal.alarm(0)


def _value(found: list) -> float | str:
    try:
        value = float(found[0].evalf()) if len(found) == 1 else math.inf
    except (AttributeError, TypeError, ValueError, OverflowError):
        return "none"
    return value if math.isfinite(value) else "none"


if __name__ == "__main__":
    main(int(sys.argv[1]))
