"""Helm 4, which is a library, as a process: its own threads would not be in the network namespace of the test's.

python -m support.helm4 KUBECONFIG NAMESPACE METHOD     with the method's arguments as JSON on standard input
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helm_python import Config, HelmError

_RUN_S = 240
_TESTS = Path(__file__).parents[1]


class Helm4Error(Exception):
    """Helm refused; the message is what it said."""


def helm4(kubeconfig: Path | str, namespace: str, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of `helm_python.Config`, in a process in this thread's network namespace. Raises Helm4Error."""
    done = subprocess.run(
        [sys.executable, "-m", "support.helm4", str(kubeconfig), namespace, method],
        input=json.dumps({"arguments": arguments, "options": options}),
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
        check=False,
    )
    if done.returncode:
        raise Helm4Error(done.stderr.strip())
    return json.loads(done.stdout)


def main() -> None:
    """Do what the arguments say, and print the result as JSON."""
    kubeconfig, namespace, method = sys.argv[1:]
    asked = json.load(sys.stdin)
    try:
        with Config(kubeconfig_path=kubeconfig, namespace=namespace) as config:
            json.dump(getattr(config, method)(*asked["arguments"], **asked["options"]), sys.stdout)
    except HelmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
