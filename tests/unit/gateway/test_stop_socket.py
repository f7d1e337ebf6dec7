"""A gateway is told to stop by a socket, whoever else came to it before."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.gateway.stop_socket import ask_stop, serve_stop

STOPPED = "the gateway has stopped"


class Gateway:
    """Notes with which grace it was told to stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.graces: list[float] = []
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()
        self.close = serve_stop(path, self._stop, patience_s=0.1)

    def _stop(self, grace: float) -> None:
        self.graces.append(grace)
        self.begun.set()
        assert self.may_end.wait(10)

    @contextlib.contextmanager
    def caller(self, said: bytes) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            one.connect(str(self.path))
            one.sendall(said)
            yield one


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    made = Gateway(tmp_path / "stop")
    yield made
    if made.path.exists():
        made.close()


async def test_after_a_stop_in_order_nobody_is_there_to_ask(gateway: Gateway) -> None:
    gateway.close()
    assert await ask_stop(gateway.path, 1) == "no gateway runs here, or not any more"


async def test_a_gateway_that_died_is_told_apart(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "stop"))
    assert "did not stop in order" in await ask_stop(tmp_path / "stop", 1)


async def test_who_asks_waits_until_it_has_stopped(gateway: Gateway) -> None:
    assert await ask_stop(gateway.path, 7) == STOPPED
    assert gateway.graces == [7]


@pytest.mark.parametrize("said", [b"", b"12"], ids=["nothing", "half a line"])
async def test_a_caller_who_falls_silent_keeps_nobody_else_waiting(gateway: Gateway, said: bytes) -> None:
    with gateway.caller(said):
        assert await ask_stop(gateway.path, 1) == STOPPED
    assert gateway.graces == [1]


@pytest.mark.parametrize("said", [b"", b"soon\n"], ids=["nothing", "no number"])
async def test_a_caller_who_says_no_number_and_goes_changes_nothing(gateway: Gateway, said: bytes) -> None:
    with gateway.caller(said):
        pass
    assert await ask_stop(gateway.path, 1) == STOPPED


async def test_a_caller_who_goes_before_the_answer_changes_nothing(gateway: Gateway) -> None:
    gateway.may_end.clear()
    with gateway.caller(b"3\n"):
        assert gateway.begun.wait(10)
    gateway.may_end.set()
    assert await ask_stop(gateway.path, 4) == STOPPED
    assert gateway.graces == [3, 4]
