"""Decode does not stand still while prefill groups are silent.

A scheduler of decode asks the bootstrap servers of prefill groups in the middle of its turn, one after the other, 5 s
each (SGLang 0.5.23, `disaggregation/decode.py`, `disaggregation/common/conn.py`), and its whole group waits for it:
three silent prefill groups are 15 s without a token. Each rank asks for itself, and SGLang goes on with a request only
when all ranks of its DP rank have got there, or one has failed; so ranks may differ in when they ask, and in what they
are told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any

ANSWER_S = 2.0
"""How long a bootstrap server may take to answer."""
FIRST_S = 0.25
"""How long a turn waits for one that it has not asked before: a sound one answers within milliseconds."""
BUDGET_S = 3.0
"""Spent on servers that did not answer, it ends the asking for this turn. With the last wait, that is at most 5 s,
below `Limits.blocked_s`."""

_PROBES, _SILENT = "_tandem_probes", "_tandem_silent"
"""Attributes of SGLang's objects: probes by address; the addresses that have just failed to answer theirs."""

_log = logging.getLogger(__name__)

Waiting = dict[str, list[Any]]
"""Requests by the address of their prefill group's bootstrap server."""


class _Turn:
    """What the present turn of this process's scheduler has met with."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.silent: set[str] = set()


_turn = _Turn()


def turn(self: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler.ingest_requests`."""
    global _turn
    if _turn.spent_s or _turn.silent:
        _turn = _Turn()


def ensure(original: Callable[[Any, Waiting], tuple[Waiting, list[Any]]], self: Any, waiting: Waiting) -> Any:
    """Around `DecodePreallocQueue._ensure_prefill_info`: a server that SGLang does not know is first asked by a thread.

    SGLang itself asks it, and counts the attempt, once that thread knows how it is.
    """
    known, probes = self.kv_manager.prefill_info_table, vars(self).setdefault(_PROBES, {})
    for address in set(probes) - set(waiting):
        del probes[address]
    strange = [address for address in waiting if address not in known]
    begun = {address: _threads().submit(_answers, address) for address in strange if _is_due(self, probes, address)}
    probes.update(begun)
    wait([probe for address, probe in begun.items() if address not in self._ensure_retry_count], timeout=FIRST_S)

    ready: Waiting = {}
    remaining: list[Any] = []
    for address, requests in waiting.items():
        probe = probes.get(address)
        if address in strange and (probe is None or not probe.done()):
            remaining += requests
            continue
        if probe is not None:
            del probes[address]
        silent = {address} if address in strange and probe is not None and not probe.result() else set()
        setattr(self.kv_manager, _SILENT, silent)
        some_ready, some_remaining = original(self, {address: requests})
        ready.update(some_ready)
        remaining += some_remaining
    setattr(self.kv_manager, _SILENT, set())
    return ready, remaining


def try_ensure(original: Callable[[Any, str], bool], self: Any, bootstrap_addr: str) -> bool:
    """Around `CommonKVManager.try_ensure_parallel_info`: what did not answer its probe is not asked again at once."""
    return bootstrap_addr not in getattr(self, _SILENT, ()) and original(self, bootstrap_addr)


def fetch(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `CommonKVReceiver._get_bootstrap_info_from_server`; without an answer the request fails, as always."""
    if self.bootstrap_addr in _turn.silent or _turn.spent_s >= BUDGET_S:
        _log.error("tandem: %s is not asked: bootstrap servers were silent in this turn", self.bootstrap_addr)
        return None
    began = time.monotonic()
    info = original(self, *args, **kwargs)
    took_s = time.monotonic() - began
    if info is None and took_s >= 0.5 * ANSWER_S:
        _turn.spent_s += took_s
        _turn.silent.add(self.bootstrap_addr)
    return info


def hasten(session: Any, bootstrap_addr: str) -> None:
    """After `_get_bootstrap_session`: its requests wait for `ANSWER_S` only. Sessions are kept, so one comes again."""
    adapter = session.get_adapter("http://")
    if "send" not in vars(adapter):
        send = adapter.send
        adapter.send = lambda request, **options: send(request, **{**options, "timeout": ANSWER_S})


def _is_due(queue: Any, probes: Mapping[str, Future[bool]], address: str) -> bool:
    """Whether a new probe is to begin: there is none, and SGLang would not put the attempt off."""
    last = queue._ensure_last_attempt_time.get(address)
    rested = last is None or time.monotonic() - last >= queue._ensure_retry_interval
    return address not in probes and rested


def _answers(address: str) -> bool:
    import requests

    try:
        requests.get(f"http://{address}/health", timeout=ANSWER_S)
    except requests.RequestException as error:
        _log.warning("tandem: the bootstrap server of prefill at %s does not answer: %s", address, error)
        return False
    return True


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=16, thread_name_prefix="tandem-bootstrap")
