"""The cluster's network: one namespace with a bridge, which the test process itself enters.

The namespace has no name: it lives as long as a process or a thread in it, so a killed test run leaves nothing.
To look into one that runs: `nsenter --net --target PID`, with the PID of its kube-apiserver.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import subprocess
from pathlib import Path

CLONE_NEWNET = 0x40000000

BRIDGE = "br0"
HOST = "10.214.0.1"
"""Where the API server listens and the test process is."""
NODES = ipaddress.IPv4Network("10.214.0.0/24")
PODS = ipaddress.IPv4Network("10.214.128.0/17")
NETWORK = ipaddress.IPv4Network("10.214.0.0/16")
SERVICES = ipaddress.IPv4Network("10.215.0.0/16")
KUBERNETES = "10.215.0.1"
"""The ClusterIP of the API server's own Service: the first of the range."""

_SETTINGS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    # Pods talk over the bridge without the address translation that Services need.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
}


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)} (network namespaces need root)")


def ip(commands: str, *, inside: int | None = None) -> None:
    """Run lines of `ip` commands here, or in the network of process `inside`. Raises RuntimeError."""
    prefix = [] if inside is None else ["nsenter", "--net", "--target", str(inside)]
    done = subprocess.run(
        [*prefix, "ip", "-batch", "-"], input=commands, capture_output=True, text=True, timeout=20, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"ip: {done.stderr.strip()}; commands: {commands.strip()}")


class ClusterNetwork:
    """Moves the calling thread into a network of its own, and back; what it starts meanwhile is in that network too."""

    def __init__(self) -> None:
        self._outside: int | None = None

    def enter(self) -> None:
        """Make the namespace, its bridge and its addresses."""
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _call("unshare", CLONE_NEWNET)
        for name, value in _SETTINGS.items():
            setting = Path("/proc/sys") / name
            if setting.exists():
                setting.write_text(value)
        ip(
            f"link set lo up\n"
            f"link add {BRIDGE} type bridge\n"
            f"addr add {HOST}/{NETWORK.prefixlen} dev {BRIDGE}\n"
            f"link set {BRIDGE} up\n"
            # No such host exists: the route only brings packets to where they are translated.
            f"route add {SERVICES} dev {BRIDGE}\n"
        )

    def leave(self) -> None:
        """Go back. The namespace ends with the last process in it."""
        if self._outside is None:
            return
        _call("setns", self._outside, CLONE_NEWNET)
        os.close(self._outside)
        self._outside = None
