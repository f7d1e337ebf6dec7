"""A group is asked a prompt: alone, with a partner, and beside a pair that serves; and who is to blame for what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from support.canary_engine import Engine, Reply, engine, good, saying
from tandem.config import FleetConfig
from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.types import Group, GroupSpec, GroupState, Role
from tandem.fleet.canary import FAKE_HOST
from tandem.fleet.check import GroupChecker
from tandem.fleet.engines import SglangEngines
from tandem.models.tiny import tiny_config
from tandem.state import Store, open_store

OK, WRONG, SILENT = CheckVerdict.OK, CheckVerdict.WRONG, CheckVerdict.SILENT
ALONE, UNKNOWN = CheckVerdict.ALONE, CheckVerdict.UNKNOWN


class Engines(SglangEngines):
    """SGLang's, with a tokenizer that knows one prompt."""

    def encode(self, path: str, text: str) -> list[int]:
        return [1, 2, 3]


def other(body: dict[str, Any]) -> dict[str, Any]:
    """Begins as the good ones, and goes on otherwise."""
    return saying(body, [7, *[99] * (body["sampling_params"]["max_new_tokens"] - 1)])


def mute(body: dict[str, Any]) -> dict[str, Any]:
    answer = good(body)
    answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "no KV"}
    return answer


def elsewhere(body: dict[str, Any]) -> dict[str, Any]:
    """Begins with another token than the good ones."""
    return saying(body, [50 + n for n in range(body["sampling_params"]["max_new_tokens"])])


def moody(body: dict[str, Any]) -> dict[str, Any]:
    """Begins as the good ones when it is asked alone, and otherwise in a pair."""
    return good(body) if body["bootstrap_host"] == FAKE_HOST else elsewhere(body)


def shy(body: dict[str, Any]) -> dict[str, Any]:
    """Answers alone, and in no pair."""
    return good(body) if body["bootstrap_host"] == FAKE_HOST else mute(body)


class Fleet:
    """Groups in a store, with engines that answer."""

    def __init__(self, store: Store, model: Path, stack: AsyncExitStack) -> None:
        self.store, self.model, self.stack = store, model, stack
        self.engines: dict[str, Engine] = {}
        self.config = FleetConfig()

    async def add(self, name: str, reply: Reply = good, dp_size: int = 1, **fields: Any) -> Engine:
        role = Role(name.partition("-")[0])
        made = await self.stack.enter_async_context(engine(role, dp_size, reply))
        made.group = replace(made.group, **{"group": name, "weight_version": "1", "kv_format": "a", **fields})
        self.engines[name] = made
        await self.put(made.group)
        spec = GroupSpec(group=name, role=role, nodes=1)
        await self.store.put(f"desired/{name}", msgspec.json.encode(spec))
        return made

    async def put(self, group: Group) -> None:
        await self.store.put(f"groups/{group.group}", msgspec.json.encode(group))

    async def check(self, name: str, **limits: float) -> GroupCheck:
        engines = Engines(self.config, model=self.model, name="tiny")
        return await GroupChecker(self.store, engines, **limits).check(self.engines[name].group)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    store = await open_store("embedded", fleet="test", folder=tmp_path)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        yield Fleet(store, tmp_path, stack)


CANARY: dict[str, Any] = {"state": GroupState.CORDONED, "epoch": 4}


async def test_a_group_that_answers_as_those_that_serve_is_well(fleet: Fleet) -> None:
    for name in ("prefill-0", "decode-0"):
        await fleet.add(name)
    await fleet.add("decode-1", dp_size=3, **CANARY)
    assert await fleet.check("decode-1") == GroupCheck(verdict=OK, epoch=4, partner="prefill-0")
    asked = sorted(body["routed_dp_rank"] for body in fleet.engines["decode-1"].asked)
    assert asked == [0, 0, 1, 1, 2, 2]  # each alone and in a pair
    assert len(fleet.engines["decode-0"].asked) == 1


@pytest.mark.parametrize(("device", "verdict"), [("cpu", WRONG), ("cuda", OK)])
async def test_another_answer_is_wrong_and_on_gpus_another_first_token(
    fleet: Fleet, device: Any, verdict: CheckVerdict
) -> None:
    fleet.config = FleetConfig(device=device)
    for name in ("prefill-0", "decode-0"):
        await fleet.add(name)
    await fleet.add("decode-1", other, **CANARY)
    check = await fleet.check("decode-1")
    assert check.verdict is verdict
    assert ("does not answer as prefill-0 and decode-0 do, which serve" in check.message) is (verdict is WRONG)


async def test_a_prefill_group_whose_first_token_is_another_is_wrong_on_gpus_too(fleet: Fleet) -> None:
    fleet.config = FleetConfig(device="cuda")
    for name in ("prefill-0", "decode-0"):
        await fleet.add(name)
    await fleet.add("prefill-1", elsewhere, **CANARY)
    check = await fleet.check("prefill-1")
    assert (check.verdict, check.message) == (WRONG, "decode-0 did not begin with the token that prefill-1 computed")


async def test_with_nothing_to_compare_two_new_groups_check_each_other(fleet: Fleet) -> None:
    for name in ("prefill-0", "decode-0"):
        await fleet.add(name, other, **CANARY)
    assert (await fleet.check("prefill-0")).verdict is OK
    assert (await fleet.check("decode-0")).verdict is OK


async def test_two_new_groups_of_another_format_are_compared_with_the_old_pair(fleet: Fleet) -> None:
    for name in ("prefill-0", "decode-0"):
        await fleet.add(name)
    for name in ("prefill-1", "decode-1"):
        await fleet.add(name, other, kv_format="b", **CANARY)
    check = await fleet.check("decode-1")
    assert (check.verdict, check.partner) == (WRONG, "prefill-1")
    check = await fleet.check("prefill-1")
    assert (check.verdict, check.partner) == (UNKNOWN, "decode-1")
    blame = "does not answer well with decode-1, which serves nobody either, and is to blame: it does not answer as"
    assert check.message.startswith(blame)


@pytest.mark.parametrize(
    ("prefill", "decode", "verdicts"),
    [
        (good, good, (OK, OK)),
        (good, other, (UNKNOWN, WRONG)),
        (good, elsewhere, (UNKNOWN, WRONG)),
        (elsewhere, good, (WRONG, UNKNOWN)),
        (elsewhere, elsewhere, (WRONG, UNKNOWN)),
        (moody, elsewhere, (WRONG, UNKNOWN)),
        (good, shy, (UNKNOWN, SILENT)),
        (shy, good, (UNKNOWN, SILENT)),
        (good, mute, (UNKNOWN, SILENT)),
        (mute, good, (SILENT, UNKNOWN)),
    ],
)
async def test_of_two_new_groups_at_most_one_is_to_blame(
    fleet: Fleet, prefill: Reply, decode: Reply, verdicts: tuple[CheckVerdict, CheckVerdict]
) -> None:
    for name in ("prefill-0", "decode-0"):
        await fleet.add(name)
    await fleet.add("prefill-1", prefill, kv_format="b", **CANARY)
    await fleet.add("decode-1", decode, kv_format="b", **CANARY)
    assert ((await fleet.check("prefill-1")).verdict, (await fleet.check("decode-1")).verdict) == verdicts


async def test_without_a_pair_that_serves_the_decode_group_is_to_blame(fleet: Fleet) -> None:
    await fleet.add("prefill-1", **CANARY)
    await fleet.add("decode-1", elsewhere, **CANARY)
    assert ((await fleet.check("prefill-1")).verdict, (await fleet.check("decode-1")).verdict) == (UNKNOWN, WRONG)


async def test_a_partner_that_serves_is_asked_rather_than_one_on_trial(fleet: Fleet) -> None:
    await fleet.add("prefill-0", **CANARY)
    await fleet.add("prefill-1")
    await fleet.add("decode-1", **CANARY)
    assert (await fleet.check("decode-1")).partner == "prefill-1"


@pytest.mark.parametrize("change", [{"kv_format": "b"}, {"weight_version": "2"}, {"state": GroupState.STARTING}])
async def test_without_a_partner_it_answers_alone(fleet: Fleet, change: dict[str, Any]) -> None:
    await fleet.add("prefill-0", **change)
    await fleet.add("decode-1", **CANARY)
    check = await fleet.check("decode-1")
    assert (check.verdict, check.epoch, check.partner) == (ALONE, 4, "")
    assert check.message.startswith('answers alone, and no prefill group that is up has its KV format "a"')


async def test_no_answer_is_silence_and_not_a_wrong_answer(fleet: Fleet) -> None:
    await fleet.add("prefill-0")
    await fleet.add("decode-1", mute, **CANARY)
    check = await fleet.check("decode-1")
    assert check.verdict is SILENT
    assert "the canary on decode-1 failed" in check.message


async def test_a_partner_that_serves_and_is_silent_itself_is_to_blame(fleet: Fleet) -> None:
    await fleet.add("prefill-0", mute)
    await fleet.add("decode-1", **CANARY)
    check = await fleet.check("decode-1")
    assert check.verdict is UNKNOWN
    assert "cannot be asked as a pair: the canary on prefill-0 failed" in check.message


async def test_a_pair_that_serves_and_does_not_answer_says_nothing_of_the_new_group(fleet: Fleet) -> None:
    await fleet.add("prefill-0")
    await fleet.add("decode-0", mute)
    await fleet.add("decode-1", **CANARY)
    check = await fleet.check("decode-1")
    assert check.verdict is UNKNOWN
    assert check.message.startswith("cannot be compared with prefill-0 and decode-0: the canary on decode-0 failed")


@pytest.mark.parametrize("name", ["prefill-0", "decode-1"])
async def test_whoever_restarts_meanwhile_makes_the_answer_worthless(fleet: Fleet, name: str) -> None:
    restarts: list[asyncio.Task[None]] = []

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        if body["bootstrap_host"] == "10.0.0.1" and not restarts:
            restarts.append(asyncio.create_task(fleet.put(replace(fleet.engines[name].group, epoch=9))))
        return other(body)

    for one in ("prefill-0", "decode-0"):
        await fleet.add(one)
    await fleet.add("decode-1", reply, **CANARY)
    check = await fleet.check("decode-1")
    await asyncio.gather(*restarts)
    assert (check.verdict, check.message) == (UNKNOWN, f"was being asked when {name} restarted or left")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": GroupState.FAILED}, "is failed"),
        ({"loading": "2"}, "takes weight version 2"),
        ({"url": ""}, "tells no"),
    ],
)
async def test_a_group_that_is_not_up_is_not_asked(fleet: Fleet, change: dict[str, Any], message: str) -> None:
    made = await fleet.add("decode-1", **{**CANARY, **change})
    made.group = replace(made.group, **change)
    check = await fleet.check("decode-1")
    assert (check.verdict, made.asked) == (UNKNOWN, [])
    assert check.message.startswith(message)


async def test_a_check_that_takes_too_long_is_silence(fleet: Fleet) -> None:
    class Hangs(Engine):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

    made = await fleet.add("decode-1", **CANARY)
    hangs = Hangs(Role.DECODE, 1, good)
    server = await asyncio.start_server(hangs.serve, "127.0.0.1", 0)
    made.group = replace(made.group, url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await fleet.put(made.group)
    check = await fleet.check("decode-1", within=0.05)
    assert (check.verdict, check.message) == (SILENT, "the canary on decode-1 gave no answer within 0.05 s")
    check = await fleet.check("decode-1", longest=0.05)
    assert (check.verdict, check.message) == (SILENT, "the known prompt took more than 0.05 s")
    server.close()


async def test_one_that_answers_alone_and_is_slow_in_a_pair_is_not_silent(fleet: Fleet) -> None:
    await fleet.add("prefill-0")
    made = await fleet.add("decode-1", **CANARY)
    send = made._send

    async def slow(writer: asyncio.StreamWriter, text: str) -> None:
        if made.asked[-1]["bootstrap_host"] == FAKE_HOST:
            await send(writer, text)
        else:
            await writer.wait_closed()  # until it is given up

    made._send = slow  # type: ignore[method-assign]
    check = await fleet.check("decode-1", longest=1.0)
    assert (check.verdict, check.message) == (UNKNOWN, "could not be asked as a pair within 1 s")
