"""Machines made of network namespaces: each has an address of its own on one bridge. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root and iproute2 to make network namespaces (CI has both)",
)

NETWORK = "10.213.7"
BRIDGE = "tdbr0"


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=10)


def name(number: int) -> str:
    """Name of the namespace of machine `number`, from 1."""
    return f"tandem-test-{number}"


def address(number: int) -> str:
    """Its address."""
    return f"{NETWORK}.{number}"


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[str]]:
    """Make `count` namespaces on one bridge that the caller's namespace is on too; yield their addresses."""
    remove(count)
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for number in range(1, count + 1):
            _ip("netns", "add", name(number))
            _ip("link", "add", f"tdv{number}", "type", "veth", "peer", "name", "eth0", "netns", name(number))
            _ip("link", "set", f"tdv{number}", "master", BRIDGE, "up")
            _ip("-n", name(number), "addr", "add", f"{address(number)}/24", "dev", "eth0")
            _ip("-n", name(number), "link", "set", "eth0", "up")
            _ip("-n", name(number), "link", "set", "lo", "up")
        yield [address(number) for number in range(1, count + 1)]
    finally:
        remove(count)


def remove(count: int) -> None:
    """Remove what `machines` makes, also after a run that was killed."""
    for number in range(1, count + 1):
        _ip("netns", "del", name(number), check=False)
    _ip("link", "del", BRIDGE, check=False)


def bytes_sent(number: int) -> int:
    """Bytes that machine `number` has sent to the network."""
    path = "/sys/class/net/eth0/statistics/tx_bytes"
    done = subprocess.run(
        ["ip", "netns", "exec", name(number), "cat", path], check=True, capture_output=True, text=True, timeout=10
    )
    return int(done.stdout)
