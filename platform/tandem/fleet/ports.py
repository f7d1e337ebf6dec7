"""Blocks of free TCP ports for the ranks of one machine.

An engine binds its ports many seconds after they were chosen. So a rank claims a whole block first, and holds the claim
for its life: a Unix socket in the kernel's abstract namespace, whose name only one process can hold, and which leaves
no file behind. Like ports, such names belong to a network namespace.
"""

from __future__ import annotations

import errno
import socket
from types import TracebackType

import psutil

FIRST, LAST = 16000, 21999
"""Below what kernels hand out by themselves (32768 and up), what SGLang draws for itself (22000 to 29999), and what
Kubernetes forwards (30000 to 32767)."""
BLOCK = 64


class NoPortsError(RuntimeError):
    """Every block of the range is taken."""


class PortBlock:
    """A claim on the ports `first` … `first + BLOCK - 1` of this machine. Released by `close`, or with the process."""

    def __init__(self, first: int, claim: socket.socket) -> None:
        self.first = first
        self._claim = claim

    @classmethod
    def claim(cls, host: str) -> PortBlock:
        """Claim the first block that nobody holds and all of whose ports are free on `host`. Raises NoPortsError."""
        for first in range(FIRST, LAST + 2 - BLOCK, BLOCK):
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0tandem-ports-{first}")
            except OSError as error:
                claim.close()
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            if all(_free(host, port) for port in range(first, first + BLOCK)):
                return cls(first, claim)
            claim.close()
        raise NoPortsError(
            f"no {BLOCK} free ports in a row between {FIRST} and {LAST} on {host}: stop what listens there"
        )

    def close(self) -> None:
        """Give the block back."""
        self._claim.close()

    def __enter__(self) -> PortBlock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def interface_of(host: str) -> str:
    """Name of the network interface that has the address `host`, empty if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return str(name)
    return ""


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are still in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True
