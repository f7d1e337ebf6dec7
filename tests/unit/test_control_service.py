"""The control service and its client over a real loopback connection, with a fleet in memory behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.refresh import Refresh, RefreshPhase
from tandem.core.traffic import TrafficReport
from tandem.core.types import DpLoad, FleetSnapshot, Group, GroupSpec, GroupState, Rank, Role
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.control_service import SERVICE, NoRefresh, Refused, UnknownGroup, serve_control
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.state import StoreError
from tandem.v1 import control_pb2, control_pb2_grpc

SPEC = GroupSpec(group="decode-0", role=Role.DECODE, nodes=2)
ASK = RefreshAsk(path="/second", version="2", canary="One and", expect="two", rollback=False, drain_s=7)


class MemoryFleet:
    """A `FleetBackend`: desired groups in a dictionary."""

    def __init__(self) -> None:
        self.desired: dict[str, GroupSpec] = {}
        self.error: Exception | None = None
        self.hang = False
        self.revision = 0
        self.watchers = 0
        self.asked: RefreshAsk | None = None
        self.unwatched = asyncio.Event()
        self._changed = asyncio.Condition()

    async def _note(self, spec: GroupSpec) -> GroupSpec:
        async with self._changed:
            self.desired[spec.group] = spec
            self.revision += 1
            self._changed.notify_all()
        return spec

    def _known(self, group: str) -> GroupSpec:
        if group not in self.desired:
            raise UnknownGroup(group)
        return self.desired[group]

    async def fleet(self) -> FleetSnapshot:
        if self.error:
            raise self.error
        if self.hang:
            await asyncio.Event().wait()
        desired = tuple(self.desired.values())
        group = Group(group="decode-0", role=Role.DECODE, epoch=3, state=GroupState.READY, ranks=(Rank(rank=0),))
        return FleetSnapshot(name="f", model_name="tiny", groups=(group,), desired=desired, revision=self.revision)

    async def watch(self) -> AsyncIterator[FleetSnapshot]:
        self.watchers += 1
        try:
            while True:
                yield await self.fleet()
                async with self._changed:
                    await self._changed.wait()
        finally:
            self.watchers -= 1
            self.unwatched.set()

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        if spec.group in self.desired and self.desired[spec.group].draining:
            raise Refused("decode-0 is draining; wait until it is gone.")
        return await self._note(spec)

    async def cordon(self, group: str, cordoned: bool) -> GroupSpec:
        return await self._note(msgspec.structs.replace(self._known(group), cordoned=cordoned))

    async def drain(self, group: str, deadline_s: float | None, *, migrate: bool, force: bool) -> GroupSpec:
        if force:
            raise Refused("Nobody forces this fleet.")
        deadline = 1000 + (60 if deadline_s is None else deadline_s)
        at = 1000.0 if migrate else 0.0
        known = self._known(group)
        return await self._note(msgspec.structs.replace(known, draining=True, drain_deadline=deadline, migrate_at=at))

    async def remove(self, group: str) -> None:
        del self.desired[self._known(group).group]

    async def load(self, group: str | None) -> Mapping[str, Sequence[DpLoad]]:
        groups = [self._known(group).group] if group else sorted(self.desired)
        return {name: [DpLoad(dp_rank=0, running=2), DpLoad(dp_rank=1, token_usage=0.5)] for name in groups}

    async def traffic(self) -> Sequence[TrafficReport]:
        return [TrafficReport(replica="b", incarnation="2"), TrafficReport(replica="a", incarnation="1", ttft=(0, 3))]

    async def check(self, group: str) -> GroupCheck:
        return GroupCheck(verdict=CheckVerdict.WRONG, message="it says Rome", epoch=3, partner=self._known(group).group)

    async def check_weights(self, path: str, version: str) -> None:
        if path == "/none":
            raise Refused(f"The weights of version {version} in {path} cannot be taken.")

    async def refresh(self, ask: RefreshAsk) -> Refresh:
        self.asked = ask
        return await self.refresh_state()

    async def refresh_state(self) -> Refresh:
        if self.asked is None:
            raise NoRefresh()
        return Refresh(path=self.asked.path, version=self.asked.version, prompt=(1, 2), began=5.0)

    async def stop_refresh(self) -> Refresh:
        return msgspec.structs.replace(await self.refresh_state(), phase=RefreshPhase.ROLLING_BACK, stop=True)


@dataclass
class Served:
    backend: MemoryFleet
    client: ControlClient
    channel: grpc.aio.Channel
    server: grpc.aio.Server
    port: int


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    backend = MemoryFleet()
    server, port = await serve_control(backend, "127.0.0.1", 0)
    async with ControlClient(f"127.0.0.1:{port}") as client, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(backend, client, channel, server, port)
    await server.stop(0)


@pytest.fixture
def client(served: Served) -> ControlClient:
    return served.client


async def test_the_fleet_arrives_as_it_was(served: Served) -> None:
    await served.client.put_group(SPEC)
    assert await served.client.fleet() == await served.backend.fleet()


async def test_a_group_is_put_cordoned_drained_and_removed(client: ControlClient) -> None:
    assert await client.put_group(SPEC) == SPEC
    assert (await client.cordon("decode-0")).cordoned
    assert not (await client.cordon("decode-0", False)).cordoned
    assert (await client.drain("decode-0", 5)).drain_deadline == 1005
    await client.remove("decode-0")
    assert (await client.fleet()).desired == ()


async def test_a_drain_without_a_deadline_gets_the_fleets_own(client: ControlClient) -> None:
    await client.put_group(SPEC)
    assert (await client.drain("decode-0")).drain_deadline == 1060


async def test_a_drain_may_move_streams_at_once_and_may_be_forced(client: ControlClient) -> None:
    await client.put_group(SPEC)
    assert (await client.drain("decode-0", migrate=True)).migrate_at == 1000
    with pytest.raises(ControlError, match="Nobody forces this fleet"):
        await client.drain("decode-0", force=True)


async def test_a_group_is_checked_and_the_answer_arrives_as_it_was(client: ControlClient) -> None:
    await client.put_group(SPEC)
    check = GroupCheck(verdict=CheckVerdict.WRONG, message="it says Rome", epoch=3, partner="decode-0")
    assert await client.check("decode-0") == check
    with pytest.raises(ControlError) as caught:
        await client.check("decode-9")
    assert caught.value.code == "NOT_FOUND"


async def test_weights_are_looked_at_before_there_are_groups_with_them(client: ControlClient) -> None:
    await client.check_weights("/second", "2")
    await client.check_weights("", "1")
    for path, version, code in (
        ("/none", "2", "FAILED_PRECONDITION"),
        ("second", "2", "INVALID_ARGUMENT"),
        ("/second", "", "INVALID_ARGUMENT"),
    ):
        with pytest.raises(ControlError) as caught:
            await client.check_weights(path, version)
        assert caught.value.code == code


async def test_a_refresh_is_asked_for_followed_and_stopped(served: Served) -> None:
    begun = await served.client.refresh(ASK)
    assert served.backend.asked == ASK
    assert begun == Refresh(path="/second", version="2", prompt=(1, 2), began=5.0)
    assert await served.client.refresh_state() == begun
    assert (await served.client.stop_refresh()).phase is RefreshPhase.ROLLING_BACK


async def test_a_fleet_without_a_refresh_says_so(client: ControlClient) -> None:
    with pytest.raises(ControlError, match="have not been refreshed") as caught:
        await client.refresh_state()
    assert caught.value.code == "NOT_FOUND"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": ""}, "version is ''; it must be 1 to 64 printable"),
        ({"version": "a\nb"}, "it must be 1 to 64 printable"),
        ({"path": "second"}, "model_path is 'second'; it must be an absolute path"),
        ({"canary": "x" * 5000}, "may have 4096 characters"),
        ({"drain_s": 0.0}, "drain_seconds is 0; it must be more than 0"),
    ],
)
async def test_a_refresh_that_can_never_be_right_is_refused(
    client: ControlClient, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ControlError, match=sentence) as caught:
        await client.refresh(msgspec.structs.replace(ASK, **change))
    assert caught.value.code == "INVALID_ARGUMENT"


async def test_load_is_told_by_group_and_dp_rank(client: ControlClient) -> None:
    await client.put_group(SPEC)
    await client.put_group(msgspec.structs.replace(SPEC, group="decode-1"))
    assert list((await client.load()).groups) == ["decode-0", "decode-1"]
    loads = (await client.load("decode-1")).groups
    assert loads == {"decode-1": (DpLoad(dp_rank=0, running=2), DpLoad(dp_rank=1, token_usage=0.5))}


async def test_the_load_of_all_comes_with_what_the_gateways_have_counted(client: ControlClient) -> None:
    await client.put_group(SPEC)
    first, second = (await client.load()).traffic
    assert (first.replica, first.ttft, second.replica) == ("a", (0, 3), "b")
    assert (await client.load("decode-0")).traffic == ()


async def test_a_watch_tells_the_fleet_now_and_after_each_change(served: Served) -> None:
    async with asyncio.timeout(5):
        async with contextlib.aclosing(served.client.watch()) as watch:
            assert (await anext(watch)).desired == ()
            await served.client.put_group(SPEC)
            assert (await anext(watch)).desired == (SPEC,)
        await served.backend.unwatched.wait()


async def test_many_watch_at_once(served: Served) -> None:
    async with asyncio.timeout(5):
        watches = [served.client.watch() for _ in range(20)]
        for watch in watches:
            await anext(watch)
        await served.client.put_group(SPEC)
        assert all([(await anext(watch)).revision == 1 for watch in watches])


@pytest.mark.parametrize("group", ["", "UPPER", "-a", "a/b", "x" * 64])
async def test_an_id_that_cannot_be_one_is_refused(client: ControlClient, group: str) -> None:
    with pytest.raises(ControlError, match="cannot be a group's id: use 1 to 63") as caught:
        await client.remove(group)
    assert caught.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nodes": 0}, r"spec\.nodes is 0; it must be from 1 to 64"),
        ({"gpus_per_node": 17}, r"spec\.gpus_per_node is 17; it must be from 1 to 16"),
        ({"draining": True}, "call DrainGroup"),
        ({"migrate_at": 5.0}, "call DrainGroup"),
        ({"weights_path": "/second"}, r"weights_path is set, but not spec\.weight_version"),
        ({"declared_path": "/second"}, r"spec\.declared_version is ''; it must be 1 to 64 printable"),
        ({"declared_path": "second", "declared_version": "2"}, r"spec\.declared_path is 'second'; it must be an absol"),
    ],
)
async def test_a_spec_that_can_never_be_right_is_refused(
    client: ControlClient, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ControlError, match=sentence) as caught:
        await client.put_group(msgspec.structs.replace(SPEC, **change))
    assert caught.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
async def test_a_drain_deadline_that_cannot_be_one_is_refused(client: ControlClient, seconds: float) -> None:
    with pytest.raises(ControlError, match="it must be more than 0"):
        await client.drain("decode-0", seconds)


async def test_a_spec_without_a_role_or_none_at_all_is_refused(served: Served) -> None:
    stub = control_pb2_grpc.FleetControlStub(served.channel)
    for spec, sentence in ((None, "spec is missing"), (control_pb2.GroupSpec(group="g"), "spec.role is ROLE_UNSPEC")):
        with pytest.raises(grpc.aio.AioRpcError, match=sentence) as caught:
            await stub.PutGroup(control_pb2.PutGroupRequest(spec=spec))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_group_is_not_found(client: ControlClient) -> None:
    for call in (client.cordon("no"), client.drain("no"), client.remove("no"), client.load("no")):
        with pytest.raises(ControlError, match="The fleet has no group 'no'; `tandem status` lists them") as caught:
            await call
        assert caught.value.code == "NOT_FOUND"


async def test_what_the_fleets_state_forbids_is_a_failed_precondition(client: ControlClient) -> None:
    await client.put_group(SPEC)
    await client.drain("decode-0")
    with pytest.raises(ControlError, match="is draining; wait") as caught:
        await client.put_group(SPEC)
    assert caught.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (StoreError("Redis is away."), "UNAVAILABLE", "is not available: Redis is away. See that it is up"),
        (KeyError("x"), "INTERNAL", "KeyError in the controller: 'x'"),
    ],
)
async def test_a_failure_behind_the_service_reaches_the_caller(
    served: Served, error: Exception, code: str, sentence: str
) -> None:
    served.backend.error = error
    for call in (served.client.fleet(), anext(served.client.watch())):
        with pytest.raises(ControlError, match=sentence) as caught:
            await call
        assert caught.value.code == code


async def test_a_fleet_that_does_not_answer_is_given_up_at_the_deadline(served: Served) -> None:
    served.backend.hang = True
    async with ControlClient(f"127.0.0.1:{served.port}", deadline=0.1) as hasty:
        for call in (hasty.fleet(), anext(hasty.watch())):
            with pytest.raises(ControlError, match=r"did not answer within 0\.1 s") as caught:
                await asyncio.wait_for(call, 5)
            assert caught.value.code == "DEADLINE_EXCEEDED"


async def test_no_fleet_at_the_address_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with ControlClient(f"127.0.0.1:{taken.getsockname()[1]}") as client:
            for call in (client.fleet(), anext(client.watch())):
                with pytest.raises(ControlError, match=r"is not available: .*See that it is up") as caught:
                    await asyncio.wait_for(call, 5)
                assert caught.value.code == "UNAVAILABLE"


async def test_a_watch_notices_that_the_service_stops(served: Served) -> None:
    watch = served.client.watch()
    await anext(watch)
    await served.server.stop(0)
    with pytest.raises(ControlError):
        await asyncio.wait_for(anext(watch), 5)
    assert served.backend.watchers == 0


async def test_closing_the_client_ends_its_watches(served: Served) -> None:
    watch = served.client.watch()
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch, None))
    await asyncio.sleep(0)
    await served.client.close()
    assert await asyncio.wait_for(waiting, 5) is None


async def test_a_taken_port_is_an_error_with_an_address(served: Served) -> None:
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{served.port}"):
        await serve_control(served.backend, "127.0.0.1", served.port)


async def test_health_and_reflection_know_the_service(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    for name in ("", SERVICE):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == 1
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    replies = reflection_pb2_grpc.ServerReflectionStub(served.channel).ServerReflectionInfo(requests)
    names = [service.name async for reply in replies for service in reply.list_services_response.service]
    assert "tandem.v1.FleetControl" in names
