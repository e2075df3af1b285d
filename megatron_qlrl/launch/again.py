"""A rank that goes on in a fresh process: the next phases want another layout or another engine.

Megatron's groups and vLLM's are global to a process and end with it, so a rank replaces itself
(exec) by the same command, which continues from the checkpoint. The process id stays the same:
the local launcher, srun and torchrun see one long-lived rank, and the number of ranks is that of
the job.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from megatron_qlrl.platform.env import LONGEST_STEP
from megatron_qlrl.platform.stop import STOP_SIGNALS


def start_again(port: int, *, longest_step_s: float, settings: Sequence[str]) -> NoReturn:
    """Starts this command anew in this process, with `settings` added to it.

    Args:
        port: where the ranks meet, a new one: the old store may still be up when the first of
            them arrive (torchrun's outlives its ranks, with all their old keys).
        longest_step_s: for `platform.env.longest_step_s` there.
    """
    # Until the new program listens, the job's signals wait; they would end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ["MASTER_PORT"] = str(port)
    os.environ[LONGEST_STEP] = str(longest_step_s)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    added = [s for s in settings if s not in sys.orig_argv]
    # Sockets and device files of libraries would stay open in the new program. Closing them here
    # would abort the process: gloo's threads are still polling theirs.
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is gone already
            os.set_inheritable(int(name), int(name) < 3)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *added])
