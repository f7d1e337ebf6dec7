"""`python -m tandem.engine.cpu.launch_server ARGS`: `sglang.launch_server` on a machine without a GPU.

The arguments are SGLang's own. Exits with code 2 and one sentence when the engine cannot run here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tandem.engine.cpu import plugin, standins
from tandem.engine.cpu.versions import EngineError, check_versions
from tandem.engine.plugin import install

ENVIRONMENT = {
    plugin.SWITCH: "1",
    install.SWITCH: "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A crash must end the process at once: no core dump of a device that is not there, no py-spy, no 5 s of grace.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
}
"""What must be set before the first import of torch or SGLang."""


def prepare() -> None:
    """Check versions, install stand-ins, import the engine, apply and check every hook.

    Starts no thread, so the process may be forked afterwards. Raises `EngineError`.
    """
    check_versions()
    standins.install()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    plugin.check_hooks()
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server  # noqa: F401 - imported here so that forked engines share it


def serve(arguments: Sequence[str]) -> None:
    """Run SGLang's server with its command-line `arguments`; returns when it has stopped."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(list(arguments)))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def main() -> None:
    """Entry point of the module."""
    os.environ.update(ENVIRONMENT)
    try:
        prepare()
    except EngineError as error:
        sys.exit(f"tandem: {error}")
    serve(sys.argv[1:])


if __name__ == "__main__":
    main()
