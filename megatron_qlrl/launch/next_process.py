"""Replaces a rank's process by a fresh one when the next phases need another layout or engine.

The groups of Megatron and vLLM are global to a process and end only with it, so a rank replaces
itself (exec) by the same command, which continues from the checkpoint. The process id stays the
same: the local launcher, srun and torchrun see one long-lived rank.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from megatron_qlrl.platform.env import LISTENER, LONGEST_STEP
from megatron_qlrl.platform.stop import STOP_SIGNALS


def replace_process(
    port: int, *, listener: int | None, longest_step_s: float, settings: Sequence[str]
) -> NoReturn:
    """Starts this command again in this process, with `settings` added to it.

    Args:
        listener: the descriptor of a socket that listens at `port`, on rank 0.
        port: a new port where the ranks meet. The old store may still run when the first ranks
            arrive: torchrun's outlives its ranks and keeps all their keys.
        longest_step_s: what `platform.env.longest_step_s` returns in the new process.
    """
    # The job's signals are blocked until the new program handles them; before, they would end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ["MASTER_PORT"] = str(port)
    os.environ[LONGEST_STEP] = str(longest_step_s)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if listener is not None:
        os.environ[LISTENER] = str(listener)
    added = [s for s in settings if s not in sys.orig_argv]
    # Sockets and device files of libraries must not stay open in the new program. They cannot be
    # closed here: gloo's threads still poll theirs and would abort the process.
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own descriptor is closed already
            os.set_inheritable(int(name), int(name) < 3 or int(name) == listener)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *added])
