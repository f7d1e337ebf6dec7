"""What a network can do to machines that are network namespaces (`support/namespaces.py`): nothing passes, or slowly.

Delays are made by a bucket filter (tbf): netem is not in every kernel.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from support.namespaces import name

_TABLE = "chaos"


def number_of(address: str) -> int:
    """The machine of an address."""
    return int(address.rpartition(".")[2])


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _nft(machine: str, *words: str) -> None:
    _run("ip", "netns", "exec", name(number_of(machine)), "nft", *words)


@contextlib.contextmanager
def dropped(one: str, other: str) -> Iterator[None]:
    """Lose every packet between two machines."""
    _nft(one, f"add table inet {_TABLE}")
    try:
        for hook, side in (("input", "saddr"), ("output", "daddr")):
            _nft(one, f"add chain inet {_TABLE} {hook} {{ type filter hook {hook} priority 0; policy accept; }}")
            _nft(one, f"add rule inet {_TABLE} {hook} ip {side} {other} drop")
        yield
    finally:
        _nft(one, f"delete table inet {_TABLE}")


@contextlib.contextmanager
def slowed(machine: str, kbit: int) -> Iterator[None]:
    """Let so little pass to a machine that what is sent to it comes seconds later."""
    link = f"tdv{number_of(machine)}"
    _run("tc", "qdisc", "add", "dev", link, "root", "tbf", "rate", f"{kbit}kbit", "burst", "16kbit", "latency", "10s")
    try:
        yield
    finally:
        _run("tc", "qdisc", "del", "dev", link, "root")
