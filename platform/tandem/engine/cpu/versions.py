"""The versions that the CPU engine's hooks were written against.

The hooks reach into SGLang's internals, so another version may accept them and then compute something else. Refusing
to start is the only safe answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata

KNOWN: Mapping[str, str] = {
    "sglang": "0.5.23",
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "nixl": "1.5.1",
}


class EngineError(RuntimeError):
    """The CPU engine cannot run here; the message says why and what to do."""


def check_versions(installed: Callable[[str], str] = metadata.version) -> None:
    """Raise `EngineError` unless every package has the version that the hooks know.

    A local part such as `+cpu` is ignored.
    """
    wrong = []
    for package, known in KNOWN.items():
        try:
            found = installed(package)
        except metadata.PackageNotFoundError:
            wrong.append(f"{package} is missing (needs {known})")
            continue
        if found.split("+")[0] != known:
            wrong.append(f"{package} is {found} (needs {known})")
    if wrong:
        raise EngineError(
            f"the CPU engine does not know these versions: {'; '.join(wrong)}. "
            "Install the pinned set: requirements/engine-cpu.txt and requirements/engine-cpu-nodeps.txt."
        )
