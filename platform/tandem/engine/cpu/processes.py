"""How an engine starts its children: by fork.

SGLang spawns its scheduler, detokenizer and DP controller, and each new interpreter imports the engine again: 12 s of
CPU each, a dozen times for a fleet of four ranks. On CPU there is no device context that forbids forking, the main
process has one thread when it starts them, and a forked child has every hook already.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _default_signals() -> None:
    """A child must not answer SIGQUIT by killing "its" tree, as the handler inherited from the main process would."""
    for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def fork_children(result: None, *args: Any, **kwargs: Any) -> None:
    """After `_set_envs_and_config`, which asks for spawn."""
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(after_in_child=_default_signals)


def load_file(original: Callable[[str], str], ipc_name: str) -> str:
    """Around `shm_path_for`: the schedulers' load lies in the engine's own temporary folder, not in /dev/shm, where a
    killed engine would leave it behind."""
    return str(Path(tempfile.gettempdir()) / Path(original(ipc_name)).name)
