"""Waiting without spinning.

Three loops of SGLang 0.5.23 spin: the DP controller's (a whole core for each group, which is what made one stream on
a small machine four times slower), a scheduler with something in flight but nothing to compute, and, between ranks,
sleepers that leave their peers waiting in a collective. DP attention makes every scheduling step a collective, so all
ranks of a group must wake together: whoever wakes for a reason of its own sends one datagram to each peer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import zmq

SLEEP_MS = 1000
"""Longest sleep of an idle scheduler; also the period of its own housekeeping."""
PENDING_MS = 2
"""Pause of a scheduler that waits for a KV transfer or a handshake, which no socket announces."""


class Alarm:
    """Wakes the other ranks of the group out of their idle sleep. Loss only costs `SLEEP_MS`."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.socket.setblocking(False)
        self.address: tuple[str, int] = self.socket.getsockname()[:2]
        self.peers: list[tuple[str, int]] = []

    def ring(self) -> None:
        """Wake every peer."""
        for peer in self.peers:
            try:
                self.socket.sendto(b"", peer)
            except OSError:  # a full buffer or a peer that is gone: it wakes by its own time-out, or never
                continue

    def drain(self) -> None:
        """Forget the calls received so far."""
        while True:
            try:
                self.socket.recv(16)
            except BlockingIOError:
                return
            except ConnectionError:  # an ICMP error of an earlier send
                continue


def set_alarm(result: None, self: Any) -> None:
    """After `Scheduler.init_idle_sleeper`: exchange alarm addresses; runs on all ranks at the same point of start."""
    import torch.distributed as dist
    from sglang.srt.runtime_context import get_parallel

    alarm = Alarm(os.environ.get("SGLANG_HOST_IP", "127.0.0.1")) if self.idle_sleeper is not None else None
    group = get_parallel().tp_group
    addresses: list[tuple[str, int] | None] = [None] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(addresses, alarm.address if alarm else None, group=group.cpu_group)
    if alarm is None:  # a tensor-parallel follower: it waits in its leader's broadcast
        return
    alarm.peers = [address for rank, address in enumerate(addresses) if address and rank != group.rank_in_group]
    self.idle_sleeper.alarm = alarm
    self.idle_sleeper.poller.register(alarm.socket, zmq.POLLIN)


def sleep_until_called(original: Callable[..., None], self: Any) -> None:
    """Around `IdleSleeper.maybe_sleep`: sleep until a request, a peer's call, or the time-out; then wake the peers.

    A rank that was called does not call back, or two ranks would keep each other awake.
    """
    ready = dict(self.poller.poll(SLEEP_MS))
    called = ready.pop(self.alarm.socket.fileno(), None) is not None
    if called:
        self.alarm.drain()
    if ready or not called:
        self.alarm.ring()


def pause_while_pending(original: Callable[..., None], self: Any) -> None:
    """Around `Scheduler.on_idle`: with work in flight but none to compute, give the core away for a moment."""
    original(self)
    if self.idle_sleeper is not None and not self.is_fully_idle():
        self.idle_sleeper.alarm.ring()
        self.idle_sleeper.poller.poll(PENDING_MS)
        self.idle_sleeper.alarm.drain()


def wait_for_requests(original: Callable[..., None], self: Any) -> None:
    """Around `DataParallelController.event_loop`, which polls its socket without pause."""
    from sglang.srt.managers.io_struct import sock_recv

    poller = zmq.Poller()
    poller.register(self.recv_from_tokenizer, zmq.POLLIN)
    while True:
        self.soft_watchdog.feed()
        if not poller.poll(SLEEP_MS):
            continue
        while True:
            try:
                request = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.Again:
                break
            self._request_dispatcher(request)
