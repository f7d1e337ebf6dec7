"""What happens when parts of a real fleet are killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple

import pytest

from support.fleet import Fleet
from support.oracle import Oracle
from tandem.bench.client import stream
from tandem.engine.http1 import Pool
from tandem.gateway.replica import GatewayReplica

pytestmark = pytest.mark.timeout(180)

BACK_S = 60.0
LONG = 64
"""Tokens of an answer in the midst of which something is killed."""
PROMPT = [random.Random(11).randrange(300, 900) for _ in range(50)]


def whole(fleet: Fleet) -> bool:
    return all(group["state"] == "ready" for group in fleet.status()["groups"])


def pids(group: dict[str, Any]) -> list[int]:
    return [rank["pid"] for rank in group["ranks"]]


def until_answering(fleet: Fleet) -> None:
    """The gateway learns of a new epoch a moment after the status does."""
    fleet.until("the fleet is whole", lambda: whole(fleet), BACK_S)


@pytest.mark.parametrize(
    ("victim", "rank", "bystander"),
    [
        pytest.param("prefill-0", 0, "decode-0", id="prefill leader"),
        pytest.param("prefill-0", 1, "decode-0", id="prefill follower"),
        pytest.param("decode-0", 0, "prefill-0", id="decode leader"),
        pytest.param("decode-0", 1, "prefill-0", id="decode follower"),
    ],
)
def test_a_killed_rank_brings_its_group_back_at_the_next_epoch_and_no_other(
    fleet: Fleet, oracle: Oracle, victim: str, rank: int, bystander: str
) -> None:
    until_answering(fleet)
    before, other = fleet.group(victim), fleet.group(bystander)
    os.kill(before["ranks"][rank]["pid"], signal.SIGKILL)
    # There is no other group of its role: who asks meanwhile waits for this one.
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)
    fleet.until("the next epoch is ready", lambda: _ready_at(fleet, victim, before["epoch"] + 1), BACK_S)
    assert not set(pids(fleet.group(victim))) & set(pids(before))
    assert pids(fleet.group(bystander)) == pids(other)
    assert fleet.group(bystander)["epoch"] == other["epoch"]
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)


def _ready_at(fleet: Fleet, name: str, epoch: int) -> bool:
    group = fleet.group(name)
    return group["epoch"] == epoch and group["state"] == "ready"


class Outage(NamedTuple):
    """What came of three requests while decode's only group was dead."""

    begun: list[int]
    """Tokens of a stream that had some of them before."""
    asked: list[int]
    """Tokens of a request that came meanwhile."""
    hasty: tuple[int, str, str]
    """Status, error code and Retry-After where requests may not wait for so long."""


@pytest.fixture(scope="module")
def outage(fleet: Fleet) -> Outage:
    """Decode's only group is killed in the middle of a stream. Ends when it is back."""
    until_answering(fleet)
    limits = fleet.config.gateway.model_copy(update={"replicas": 1, "capacity_wait_s": 0.5})
    config = fleet.config.model_copy(update={"gateway": limits})
    assert fleet.config.model.path is not None
    second = GatewayReplica(
        config,
        model_path=fleet.config.model.path,
        store_url=fleet.record.store,
        folder=fleet.folder.store,
        replica="hasty",
    )
    url = second.start().url
    try:
        return asyncio.run(_outage(fleet, pids(fleet.group("decode-0")), url))
    finally:
        second.stop(1)


async def _outage(fleet: Fleet, victims: list[int], hasty: str) -> Outage:
    some, pool = asyncio.Event(), Pool()

    async def ask() -> list[int]:
        ids: list[int] = []
        async for piece in stream(pool, fleet.base, "/v1/completions", _body(fleet, LONG), within=BACK_S):
            ids += piece.token_ids
            if len(ids) > 3:
                some.set()
        return ids

    try:
        begun = asyncio.create_task(ask())
        async with asyncio.timeout(BACK_S):
            await some.wait()
        assert not begun.done(), "the stream was over before anything was killed"
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        asked = asyncio.create_task(ask())
        refused = await asyncio.to_thread(_refusal, hasty, json.dumps(_body(fleet, LONG)).encode())
        assert not begun.done()
        assert not asked.done()
        return Outage(await begun, await asked, refused)
    finally:
        await pool.close()


def _body(fleet: Fleet, tokens: int) -> dict[str, Any]:
    exact = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": fleet.status_model, "prompt": PROMPT, "max_tokens": tokens, **exact}


def _refusal(url: str, body: bytes) -> tuple[int, str, str]:
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=BACK_S)
    with refused.value as answer:
        return answer.code, json.load(answer)["error"]["code"], answer.headers.get("retry-after", "")


def test_a_stream_whose_only_decode_group_is_killed_goes_on_after_the_restart(outage: Outage, oracle: Oracle) -> None:
    assert outage.begun == oracle.complete(PROMPT, LONG)


def test_a_request_that_comes_meanwhile_waits_for_the_restart(outage: Outage, oracle: Oracle) -> None:
    assert outage.asked == oracle.complete(PROMPT, LONG)


def test_where_requests_may_not_wait_so_long_it_is_told_to_come_back(outage: Outage) -> None:
    status, code, after = outage.hasty
    assert (status, code) == (503, "no_capacity")
    assert int(after) > 0


def test_a_killed_controller_comes_back_and_restarts_no_group(fleet: Fleet, oracle: Oracle) -> None:
    until_answering(fleet)
    before = {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]}
    controller = next(process for process in fleet.processes() if "Controller" in _title(process))
    controller.kill()
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)
    fleet.until("the control service answers again", lambda: bool(fleet.status()["loads"]), 30)
    time.sleep(2)  # would a restart come, it would come now: nothing tells that none will
    assert {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]} == before
    assert whole(fleet)


def test_a_killed_gcs_is_replaced_and_ends_nothing(fleet: Fleet, oracle: Oracle) -> None:
    until_answering(fleet)
    before = {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]}
    gateways = fleet.status()["gateways"]
    gcs = next(process for process in fleet.processes() if "gcs_server" in _title(process))
    gcs.kill()
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)
    fleet.until("there is another GCS", lambda: any("gcs_server" in _title(one) for one in fleet.processes()), 30)
    assert {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]} == before
    assert fleet.status()["gateways"] == gateways
    # It knows the actors, and can place new ones.
    victim = fleet.group("decode-0")
    os.kill(victim["ranks"][1]["pid"], signal.SIGKILL)
    fleet.until("the next epoch is ready", lambda: _ready_at(fleet, "decode-0", victim["epoch"] + 1), BACK_S)
    assert pids(fleet.group("prefill-0")) == before["prefill-0"][1]
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)


def _title(process: Any) -> str:
    return " ".join(process.cmdline()) if process.is_running() else ""
