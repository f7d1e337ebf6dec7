"""`tandem doctor`: what this machine has and lacks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer
from rich.table import Table

from tandem.cli.console import make_console
from tandem.config import FleetConfig
from tandem.engine.cpu.versions import KNOWN

GIB = 2**30
FLEET_MEMORY = 6 * GIB
"""What the default fleet of four ranks needs, measured as proportional set size."""


class Verdict(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    LACKS = "lacks"


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Say what this machine has and lacks for running a fleet. Exits with 1 if the default fleet cannot run."""
    findings = list(examine(FleetConfig()))
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        _show(findings)
    raise typer.Exit(any(finding.verdict is Verdict.LACKS for finding in findings))


def examine(config: FleetConfig) -> Iterator[Finding]:
    """Look at this machine as a home for `config`."""
    yield _python()
    yield from _packages()
    yield _memory()
    yield _shared_memory()
    yield Finding("CPU cores", Verdict.OK, str(len(os.sched_getaffinity(0))))
    yield _gpus()
    yield _rdma()
    for name, host, port in (
        ("HTTP port", config.gateway.host, config.gateway.port),
        ("gRPC port", config.gateway.host, config.gateway.grpc_port),
        ("control port", config.control.host, config.control.port),
    ):
        yield _port(name, host, port)
    yield _redis()


def _show(findings: list[Finding]) -> None:
    colours = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.LACKS: "red"}
    table = Table(title="tandem doctor", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column)
    for finding in findings:
        colour = colours[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/]", finding.what, finding.found, finding.advice)
    make_console().print(table)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Finding("Python", Verdict.OK if good else Verdict.LACKS, version, "" if good else "install 3.11 or newer")


def _packages() -> Iterator[Finding]:
    for package, known in {**KNOWN, "ray": "2.60.0"}.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding(package, Verdict.LACKS, "not installed", "make install")
            continue
        good = found.split("+")[0] == known
        advice = "" if good else f"the CPU engine needs {known}: make install"
        yield Finding(package, Verdict.OK if good else Verdict.LACKS, found, advice)


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    good = free >= FLEET_MEMORY
    advice = "" if good else f"the default fleet needs {FLEET_MEMORY // GIB} GiB"
    return Finding("free memory", Verdict.OK if good else Verdict.LACKS, f"{free / GIB:.1f} GiB", advice)


def _shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    good = free >= GIB // 4
    advice = "" if good else "Ray wants at least 256 MiB in /dev/shm (docker run --shm-size)"
    return Finding("shared memory", Verdict.OK if good else Verdict.LACKS, f"{free / GIB:.1f} GiB", advice)


def _gpus() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("GPUs", Verdict.NOTE, "none", "the CPU engine is used (device: cpu)")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError) as error:
        return Finding("GPUs", Verdict.NOTE, f"nvidia-smi failed: {error}", "check the driver")
    return Finding("GPUs", Verdict.OK, answer.replace("\n", "; ") or "none")


def _rdma() -> Finding:
    folder = Path("/sys/class/infiniband")
    devices = sorted(device.name for device in folder.iterdir()) if folder.is_dir() else []
    if devices:
        return Finding("RDMA devices", Verdict.OK, ", ".join(devices))
    return Finding("RDMA devices", Verdict.NOTE, "none", "KV caches move over TCP")


def _port(name: str, host: str, port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = "stop what listens there, or set another port in fleet.yaml"
            return Finding(name, Verdict.LACKS, f"{host}:{port}: {error.strerror}", advice)
    return Finding(name, Verdict.OK, f"{host}:{port} is free")


def _redis() -> Finding:
    found = shutil.which("redis-server")
    return Finding(
        "redis-server",
        Verdict.OK if found else Verdict.NOTE,
        found or "none",
        "" if found else "only the tests and `state: redis://…` need it",
    )
