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
from chaos.engine_faults import Happening, title
from chaos.idle import all_idle, loads
from chaos.stage import Stage
from chaos.traffic import References
from chaos.watch import NotInTime
from tandem.core.types import GatewayReplica
from tandem.core.usage import UsageRecord
from tandem.engine.http1 import HttpFailure, Pool
from tandem.fleet.run_folder import RUN_VARIABLE
from tandem.state import StoreError

ALL_CHECKS = ("answers", "usage", "rooms", "engines", "groups", "leases", "processes", "nothing left")
SETTLE_S = 20.0
LEASES_S = 30.0
"""A dead gateway's lease lasts 10 s, then it is reaped."""
_LEASES_LOOK_S = 0.2
_LOOK_S = 0.02
_RECORD_S = 10.0
_HELD_S = 8.0
_TRIES = 64
_FOREIGN_S = 20.0


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
    """Usage records by the request's `user`. Two gateways may have counted the same answer, under one id."""
    written = [
        (path, msgspec.json.decode(line, type=UsageRecord))
        for folder in stage.usage_folders
        for path in sorted(folder.glob("usage-*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
    return once_each(written)


def once_each(written: Iterable[tuple[Path, UsageRecord]]) -> dict[str, list[UsageRecord]]:
    """Records and their files; one that another gateway has written, with the same tokens, is left out."""
    found: dict[str, list[UsageRecord]] = {}
    first: dict[tuple[str, int, int], Path] = {}
    for path, record in written:
        if first.setdefault((record.id, record.prompt_tokens, record.completion_tokens), path) == path:
            found.setdefault(record.user, []).append(record)
    return found


async def usage(stage: Stage, done: Iterable[Outcome], references: References) -> list[str]:
    """Exactly one record for each request, with the tokens of its prompt and those that the client was given, also
    where several pairs were at work.

    A client that had to ask again, as its gateway died, may have one for each try: the first may have died with it.
    Where gateways share what they have answered, in Redis, its records share one answer: together they tell its tokens,
    and one of them its prompt.
    """
    done = list(done)
    ends = time.monotonic() + _RECORD_S
    while True:
        found = records(stage)
        wrong = [
            why
            for one in done
            # The side gateway keeps its answers to itself, and who means to leave has none kept.
            if (
                why := miscounted(
                    one,
                    found.get(one.name, []),
                    references,
                    shared=bool(stage.redis) and not one.side and not one.left,
                )
            )
        ]
        if not wrong or time.monotonic() > ends:
            return wrong
        await asyncio.sleep(0.2)


def miscounted(one: Outcome, mine: list[UsageRecord], references: References, *, shared: bool = False) -> str:
    """What is wrong with the usage records of a request; empty = nothing. `shared`: what one gateway has answered and
    counted, all others know."""
    if not 1 <= len(mine) <= one.tries:
        return f"{one.name} {one.recipe!r}, {one.tries} tries, has {len(mine)} usage records"
    counted = [record.completion_tokens for record in mine]
    prompt = references.prompt_tokens(one.recipe)
    prompts = [record.prompt_tokens for record in mine]
    if shared:
        counted, prompts = [sum(counted)], [sum(prompts)]
    if one.left:
        right = max(counted) >= len(one.tokens) and any(record.outcome == "client_gone" for record in mine)
    else:
        right = len(one.tokens) in counted or one.usage.get("completion_tokens") in counted
    if not right:
        return f"{one.name} {one.recipe!r} was given {len(one.tokens)} tokens, its usage records tell {counted}"
    if any(told != prompt for told in prompts):
        return f"{one.name} {one.recipe!r} has a prompt of {prompt} tokens, its usage records tell {prompts}"
    return ""


def moved(happened: Iterable[Happening], done: Iterable[Outcome], found: dict[str, list[UsageRecord]]) -> list[str]:
    """Streams whose connection to decode was cut in their midst, or that were refused one, took another pair."""
    done = list(done)
    wrong = []
    for one in happened:
        ran = [out for out in done if out.side and out.began <= one.at + (one.back or 0) and one.at < out.ended]
        others = [out for out in ran if any(record.attempts > 1 for record in found.get(out.name, []))]
        if len(others) < one.must_move:
            wrong.append(f"{one.kind} ({one.where}) hit {one.must_move} streams, {len(others)} took another pair")
    return wrong


async def rooms(stage: Stage) -> list[str]:
    """No gateway has a request or a room open, or counts load."""
    wrong = []
    ends = time.monotonic() + SETTLE_S
    while True:
        try:
            wrong = [line for state in await _gateways(stage) for line in _open(state)]
        except HttpFailure as error:
            wrong = [f"a gateway does not tell what it has open: {error}"]
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


async def engines(stage: Stage) -> list[str]:
    """No engine has a request, and no KV but what its cache holds: when that is emptied, none."""
    try:
        await all_idle(lambda: stage.ready_urls, SETTLE_S, since=time.time())
    except NotInTime as error:
        return [str(error)]
    pool = Pool()
    wrong = []
    try:
        for name, url in stage.ready_urls.items():
            wrong += await _not_flushed(pool, name, url) or await _kv_left(pool, name, url)
    except HttpFailure as error:
        wrong.append(str(error))
    finally:
        await pool.close()
    return wrong


async def _not_flushed(pool: Pool, name: str, url: str) -> list[str]:
    """Empty its cache. An idle decode group refuses while it keeps the KV of a transfer that was aborted: until prefill
    says that it writes no more, or for 5 s (`tandem.engine.launch`)."""
    ends = time.monotonic() + _HELD_S
    while True:
        status, body = await pool.fetch("POST", f"{url}/flush_cache", within=20)
        if status == 200:
            return []
        if time.monotonic() > ends:
            return [f"{name} does not flush its cache: {body[:200].decode(errors='replace')}"]
        await asyncio.sleep(0.1)


async def _kv_left(pool: Pool, name: str, url: str) -> list[str]:
    ends = time.monotonic() + 5
    while True:
        left = {load.get("dp_rank", 0): load.get("num_used_tokens", 0) for load in await loads(pool, url)}
        if not any(left.values()):
            return []
        if time.monotonic() > ends:
            return [f"{name} keeps KV of {tokens} tokens on DP {rank}" for rank, tokens in left.items() if tokens]
        await asyncio.sleep(0.1)


async def groups(stage: Stage) -> list[str]:
    """All groups are ready, and all replicas are there."""
    try:
        await stage.whole()
    except NotInTime as error:
        return [str(error)]
    return []


async def leases(stage: Stage) -> list[str]:
    """The store has the leases of the replicas that live, and of no others."""
    ends = time.monotonic() + LEASES_S
    while True:
        try:
            wrong = await _strange_leases(stage)
        except StoreError as error:
            wrong = [str(error)]
        if not wrong or time.monotonic() > ends:
            return wrong
        await asyncio.sleep(_LEASES_LOOK_S)


async def _strange_leases(stage: Stage) -> list[str]:
    store = stage.watch.store
    replicas = [msgspec.json.decode(entry.value, type=GatewayReplica) for entry in await store.list("gateways/")]
    wrong = [f"gateways/{one.replica} is there, its process {one.pid} is not" for one in replicas if not _lives(one)]
    living = {one.incarnation for one in replicas}
    found = {entry.key.partition("/")[2] for entry in await store.list("incarnations/")}
    if found != living:
        wrong.append(f"incarnations/ has {sorted(found)}, living replicas are {sorted(living)}")
    if left := [entry.key for entry in await store.list("leaving/")]:
        wrong.append(f"no replica leaves, and the store has {left}")
    if strange := await asyncio.to_thread(_answer_leases, stage) - living:
        wrong.append(f"answers are still leased to {sorted(strange)}, which live no more")
    return wrong


def _lives(replica: GatewayReplica) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(replica.pid).status() != psutil.STATUS_ZOMBIE
    return False


def _answer_leases(stage: Stage) -> set[str]:
    """Incarnations that hold answers; without Redis each gateway keeps its own, in memory."""
    if stage.redis is None:
        return set()
    import redis

    with redis.Redis.from_url(stage.redis.url, decode_responses=True) as connection:
        keys = list(connection.scan_iter(match="tandem:*:answers:o:*"))
    return {key.rpartition(":")[2] for key in keys}


async def processes(stage: Stage) -> list[str]:
    """Of the engines only those live that belong to a group as it is now."""
    known: set[int] = set()
    for group in stage.watch.groups.values():
        for rank in group.ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # then the group is not ready, which another check tells
                main = psutil.Process(rank.pid)
                known |= {main.pid, *(child.pid for child in main.children(recursive=True))}
    return [
        f"process {process.pid} ({command}) belongs to no group"
        for process in stage.fleet.processes()
        if process.pid not in known and (command := title(process)).startswith("sglang::")
    ]


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
