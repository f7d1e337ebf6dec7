"""The judge: what must hold when the traffic has ended. Each check returns what is wrong, in sentences."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import orjson
import psutil

from chaos.client import Outcome
from chaos.stage import Stage
from chaos.traffic import References
from chaos.watch import NotInTime
from tandem.core.types import Group, GroupState
from tandem.core.usage import UsageRecord
from tandem.engine.http1 import HttpFailure, Pool
from tandem.fleet.run_folder import RUN_VARIABLE

SETTLE_S = 20.0
_LOOK_S = 0.02
_RECORD_S = 10.0
_TRIES = 64
_FOREIGN_S = 20.0

_COUNTS = ("num_running_reqs", "num_waiting_reqs")
_QUEUES = (
    "prefill_bootstrap_queue_reqs",
    "prefill_inflight_queue_reqs",
    "decode_prealloc_queue_reqs",
    "decode_transfer_queue_reqs",
    "decode_retracted_queue_reqs",
)


def answers(done: Iterable[Outcome], references: References, allows: frozenset[str]) -> list[str]:
    """Every answer is complete and right, or an error that the scenario allows."""
    wrong = []
    for outcome in done:
        why = references.fault(outcome)
        if why and not (outcome.error and outcome.code in allows):
            where = " (side gateway)" if outcome.side else ""
            wrong.append(f"{outcome.name} {outcome.recipe!r}{where}, {outcome.tries} tries: {why}")
    return wrong


def records(stage: Stage) -> dict[str, list[UsageRecord]]:
    """Usage records by the request's `user`."""
    found: dict[str, list[UsageRecord]] = {}
    for folder in stage.usage_folders:
        for path in sorted(folder.glob("usage-*.jsonl")):
            for line in path.read_bytes().splitlines():
                record = msgspec.json.decode(line, type=UsageRecord)
                found.setdefault(record.user, []).append(record)
    return found


async def usage(stage: Stage, done: Iterable[Outcome]) -> list[str]:
    """Exactly one record for each request, with the tokens that the client was given.

    A client that had to ask again, as its gateway died, may have one for each try: the first may have died with it.
    """
    done = list(done)
    ends = time.monotonic() + _RECORD_S
    found = records(stage)
    while any(not found.get(one.name) for one in done) and time.monotonic() < ends:
        await asyncio.sleep(0.2)
        found = records(stage)
    wrong = []
    for one in done:
        mine = found.get(one.name, [])
        if not 1 <= len(mine) <= one.tries:
            wrong.append(f"{one.name} {one.recipe!r}, {one.tries} tries, has {len(mine)} usage records")
            continue
        counted = [record.completion_tokens for record in mine]
        if one.left:
            right = max(counted) >= len(one.tokens) and mine[0].outcome == "client_gone"
        else:
            right = len(one.tokens) in counted or one.usage.get("completion_tokens") in counted
        if not right:
            told = len(one.tokens)
            wrong.append(f"{one.name} {one.recipe!r} was given {told} tokens, its usage records tell {counted}")
    return wrong


async def rooms(stage: Stage) -> list[str]:
    """No gateway has a request or a room open, or counts load."""
    wrong = []
    ends = time.monotonic() + SETTLE_S
    while True:
        wrong = [line for state in await _gateways(stage) for line in _open(state)]
        if not wrong or time.monotonic() > ends:
            return wrong
        await asyncio.sleep(_LOOK_S)


def _open(state: dict[str, Any]) -> list[str]:
    gateway = state["gateway"]
    lines = [
        f"{gateway['replica']}: {gateway[what]} {what}" for what in ("open_requests", "open_rooms") if gateway[what]
    ]
    for load in gateway["loads"]:
        if load["rooms"] or load["tokens"]:
            lines.append(f"{gateway['replica']} still counts {load}")
    return lines


async def _gateways(stage: Stage) -> list[dict[str, Any]]:
    """What every replica tells at /fleet. Replicas share a port: it is asked until each was met."""
    pool = Pool()
    wanted = set(stage.watch.gateways) | ({"side"} if stage.side is not None else set())
    found: dict[str, dict[str, Any]] = {}
    try:
        for _ in range(_TRIES):
            for base in stage.bases.values():
                response = await pool.request("GET", f"{base}/fleet", fresh=True)
                await response.head(10)
                state = orjson.loads(await response.read(10))
                response.close()
                found[state["gateway"]["replica"]] = state
            if wanted <= found.keys():
                break
    finally:
        await pool.close()
    return list(found.values())


async def loads(pool: Pool, group: Group) -> list[dict[str, Any]]:
    """What `/v1/loads` of a group tells of each DP rank. Raises HttpFailure."""
    status, body = await pool.fetch("GET", f"{group.url}/v1/loads?include=all", within=5)
    if status != 200:
        raise HttpFailure(f"{group.url}/v1/loads answered {status}")
    return list(orjson.loads(body)["loads"])


def busy(load: dict[str, Any]) -> list[str]:
    """What of a load is not zero."""
    queues = load.get("disaggregation") or {}
    found = {name: load.get(name, 0) for name in _COUNTS} | {name: queues.get(name, 0) for name in _QUEUES}
    return [f"{name}={value}" for name, value in found.items() if value]


async def busy_lines(pool: Pool, group: Group) -> list[str]:
    """What a group has to do, or why it does not tell."""
    try:
        found = await loads(pool, group)
    except HttpFailure as error:
        return [f"{group.group}: {error}"]
    return [f"{group.group} DP {load.get('dp_rank', 0)}: {what}" for load in found for what in busy(load)]


async def _busy(pool: Pool, stage: Stage) -> list[str]:
    ready = [group for group in stage.watch.groups.values() if group.state is GroupState.READY]
    return [line for lines in await asyncio.gather(*(busy_lines(pool, group) for group in ready)) for line in lines]


async def all_idle(stage: Stage, within: float) -> str:
    """Wait until no engine has a request in any queue; return what was last there. Raises NotInTime."""
    last = ""
    pool = Pool()
    ends = time.monotonic() + within
    try:
        while lines := await _busy(pool, stage):
            last = "; ".join(lines)
            if time.monotonic() > ends:
                raise NotInTime(f"engines are not idle after {within:g} s: {last}")
            await asyncio.sleep(_LOOK_S)
    finally:
        await pool.close()
    return last


async def engines(stage: Stage) -> list[str]:
    """No engine has a request, and no KV but what its cache holds: when that is emptied, none."""
    try:
        await all_idle(stage, SETTLE_S)
    except NotInTime as error:
        return [str(error)]
    pool = Pool()
    wrong = []
    try:
        for group in stage.watch.groups.values():
            status, body = await pool.fetch("POST", f"{group.url}/flush_cache", within=20)
            if status != 200:
                wrong.append(f"{group.group} does not flush its cache: {body[:200].decode(errors='replace')}")
            wrong += await _kv_left(pool, group)
    except HttpFailure as error:
        wrong.append(str(error))
    finally:
        await pool.close()
    return wrong


async def _kv_left(pool: Pool, group: Group) -> list[str]:
    ends = time.monotonic() + 5
    while True:
        left = {load.get("dp_rank", 0): load.get("num_used_tokens", 0) for load in await loads(pool, group)}
        if not any(left.values()):
            return []
        if time.monotonic() > ends:
            return [
                f"{group.group} keeps KV of {tokens} tokens on DP {rank}" for rank, tokens in left.items() if tokens
            ]
        await asyncio.sleep(0.1)


async def groups(stage: Stage) -> list[str]:
    """All groups are ready, and all replicas are there, each once."""
    try:
        await stage.whole()
    except NotInTime as error:
        return [str(error)]
    alive = [one for one in stage.watch.gateways.values() if psutil.pid_exists(one.pid)]
    if len(alive) != len(stage.watch.gateways):
        return [f"{len(stage.watch.gateways)} replicas are in the store, {len(alive)} live"]
    return []


async def processes(stage: Stage) -> list[str]:
    """Of the engines only those live that belong to a group as it is now."""
    known: set[int] = set()
    for group in stage.watch.groups.values():
        for rank in group.ranks:
            main = psutil.Process(rank.pid)
            known |= {main.pid, *(child.pid for child in main.children(recursive=True))}
    strays = []
    for process in stage.fleet.processes():
        if process.pid in known or not process.is_running():
            continue
        command = " ".join(process.cmdline())
        if command.startswith("sglang::"):
            strays.append(f"process {process.pid} ({command}) belongs to no group")
    return strays


def nothing_left(run: str, before: set[str], found: list[psutil.Process], ports: set[int]) -> list[str]:
    """After the fleet was stopped: of what it had, nothing is left. `before`: names in /dev/shm before it started."""
    alive = [process.pid for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    wrong = [f"processes {alive} live on"] if alive else []
    listening = {
        one.laddr.port: one.pid
        for one in psutil.net_connections("tcp")
        if one.laddr and one.status == psutil.CONN_LISTEN
    }
    # Another fleet on this machine may have taken a port that had become free.
    if still := {port for port in ports & listening.keys() if not _of_another_run(listening[port], run)}:
        wrong.append(f"ports {sorted(still)} are still listened on")
    if memory := _left_in_memory(before):
        wrong.append(f"/dev/shm still holds {sorted(memory)}")
    return wrong


def _of_another_run(pid: int | None, run: str) -> bool:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.parents()]:
            with contextlib.suppress(psutil.Error, OSError):
                if mark := one.environ().get(RUN_VARIABLE):
                    return mark != run
    return False


def _left_in_memory(before: set[str]) -> set[str]:
    """Names in /dev/shm that are nobody's. Others may be at work on this machine: what a living process maps, or what
    goes away now that nothing of the fleet is left, is theirs.
    """
    ends = time.monotonic() + _FOREIGN_S
    while memory := {name for name in set(os.listdir("/dev/shm")) - before if not _mapped(name)}:
        if time.monotonic() > ends:
            break
        time.sleep(0.2)
    return memory


def _mapped(name: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"/dev/shm/{name}" in maps.read_text():
                return True
    return False


def codes(done: Iterable[Outcome]) -> Counter[str]:
    """How often each error came."""
    return Counter(one.code for one in done if one.code)
