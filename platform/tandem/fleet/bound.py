"""`python -S -E bound.py PARENT COMMAND…`: become COMMAND, which dies (SIGKILL) with its parent.

A program of its own rather than a `preexec_fn`: the parent has threads, and Python between fork and exec can deadlock.
The parent-death signal is bound to the parent's *thread*: start this from one that lives as long as the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def main() -> None:
    """Entry point of the module."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # it died before the signal was set
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
