"""`tandem chat` and `tandem status` at a gateway that wants TLS, keys, certificates: a whole replica, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tandem.cli.https import Access, AccessError, GatewayClient
from tandem.cli.main import app
from tandem.config import FleetConfig
from tandem.config_file import parse_config
from tandem.core.types import GatewayReplica as Record
from tandem.core.types import Group, GroupState, Role
from tandem.fleet.run_folder import HostRecord, RunFolder
from tandem.fleet.snapshot import FLEET_KEY, FleetRecord
from tandem.gateway.access.keys import keep, mint
from tandem.gateway.replica import GatewayReplica
from tandem.state import open_store
from unit.gateway.certificates import Authority, Signed
from unit.gateway.engine_standin import Script, engine
from unit.gateway.gateway_model import ids_of, model_folder


@dataclass
class World:
    """A fleet of this machine, its gateway, and what users of it have."""

    record: Record
    folder: RunFolder
    config: FleetConfig
    ca: Authority
    stranger: Authority
    key: str


@contextlib.asynccontextmanager
async def fleet(at: Path, **tls: Any) -> AsyncIterator[World]:
    """Run one replica whose answer to everything is "hi there"; `tls`: more of `gateway.tls`, as files of the CA."""
    ca, stranger = Authority(at), Authority(at, "stranger")
    server = ca.server()
    config = FleetConfig.model_validate(
        {
            "name": "t",
            "tenants": {"acme": {"certificate_subjects": ["CN:acme"]}},
            "gateway": {
                "port": 0,
                "grpc_port": 0,
                "auth": "required",
                "tls": {
                    "certificate": server.certificate,
                    "key": server.key,
                    **({"client_ca": ca.file, **tls} if tls else {}),
                },
            },
        }
    )
    folder = RunFolder("t")
    folder.make()
    folder.write_config(config)
    folder.write(
        HostRecord(pid=os.getpid(), created=psutil.Process().create_time(), run="r", scratch="", store=config.state.url)
    )
    model_folder(at / "tiny")
    store = await open_store("embedded", fleet="t", folder=folder.store)
    async with engine("prefill") as prefill, engine("decode") as decode:
        decode.default = Script(ids=ids_of("hi there"))
        for one in (prefill, decode):
            group = Group(group=one.role, role=Role(one.role), epoch=1, state=GroupState.READY, url=one.url)
            await store.put(f"groups/{one.role}", msgspec.json.encode(group))
        await store.put(FLEET_KEY, msgspec.json.encode(FleetRecord(name="t", model_name="tiny")))
        kept, key = mint("acme", now=time.time())
        assert await keep(store, kept)
        replica = GatewayReplica(config, model_path=at / "tiny", folder=folder.store)
        record = await asyncio.to_thread(replica.start, 10)
        try:
            yield World(record, folder, config, ca, stranger, key)
        finally:
            await asyncio.to_thread(replica.stop, 2)
            await store.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    for name in ("TANDEM_API_KEY", "TANDEM_CA", "TANDEM_CERT", "TANDEM_CERT_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with fleet(tmp_path) as made:
        yield made


async def tandem(*arguments: str, typed: str | None = None, **environment: str) -> Result:
    return await asyncio.to_thread(
        CliRunner().invoke, app, [*arguments, "--fleet", "t"], input=typed, env=environment, catch_exceptions=False
    )


async def refusal(*arguments: str, **environment: str) -> str:
    result = await tandem("chat", "hello", *arguments, **environment)
    assert result.exit_code == 1
    assert not result.stdout
    return result.stderr


def shown(signed: Signed) -> list[str]:
    return ["--cert", str(signed.certificate), "--cert-key", str(signed.key)]


async def test_chat_trusts_the_fleets_own_certificate_and_takes_the_key_from_the_environment(world: World) -> None:
    result = await tandem("chat", "hello", TANDEM_API_KEY=world.key)
    assert (result.exit_code, result.stdout.strip()) == (0, "hi there")


async def test_chat_without_a_key_is_told_where_to_put_one(world: World) -> None:
    told = await refusal()
    assert "HTTP 401" in told
    assert "set TANDEM_API_KEY" in told


async def test_a_key_that_is_no_good_is_not_repeated(world: World) -> None:
    bad = world.key[:-1] + ("a" if world.key[-1] != "a" else "b")
    told = await refusal(TANDEM_API_KEY=bad)
    assert "is that key still good?" in told
    assert bad[12:] not in told


async def test_a_dash_asks_for_the_key_and_does_not_show_it(world: World) -> None:
    result = await tandem("chat", "hello", "--key", "-", typed=f"{world.key}\n")
    assert result.stdout.strip() == "hi there"
    assert world.key not in result.output


async def test_a_gateway_with_another_certificate_than_the_fleets_is_not_talked_to(
    world: World, tmp_path: Path
) -> None:
    tls = world.config.gateway.tls
    assert tls is not None
    other = world.ca.server("other")
    pinned = tls.model_copy(update={"certificate": other.certificate})
    gateway = world.config.gateway.model_copy(update={"tls": pinned})
    world.folder.write_config(world.config.model_copy(update={"gateway": gateway}))
    assert "is not trusted" in await refusal(TANDEM_API_KEY=world.key)


async def test_a_ca_that_is_named_decides_alone(world: World) -> None:
    good = await tandem("chat", "hello", "--ca", str(world.ca.file), TANDEM_API_KEY=world.key)
    assert good.stdout.strip() == "hi there"
    told = await refusal("--ca", str(world.stranger.file), TANDEM_API_KEY=world.key)
    assert "is not trusted" in told
    assert "--ca" in told


async def test_any_gateway_can_be_named_by_its_url(world: World, tmp_path: Path) -> None:
    url = world.record.url.replace("127.0.0.1", "localhost") + "/v1"
    options = ["--url", url, "--ca", str(world.ca.file)]
    result = await tandem("chat", "hello", *options, TANDEM_API_KEY=world.key)
    assert (result.exit_code, result.stdout.strip()) == (0, "hi there")
    assert "set TANDEM_API_KEY" in await refusal(*options)
    assert "is not trusted" in await refusal("--url", url, TANDEM_API_KEY=world.key)


async def test_a_ca_does_not_vouch_for_a_name_that_the_certificate_lacks(world: World) -> None:
    port = world.record.url.rpartition(":")[2]
    told = await refusal("--url", f"https://127.0.0.2:{port}", "--ca", str(world.ca.file), TANDEM_API_KEY=world.key)
    # Nobody listens there on some systems; where 127.0.0.2 is this machine too, the name is what is wrong.
    assert "is not trusted" in told or "no connection" in told


async def test_where_certificates_are_required_one_gets_in_and_none_is_told_so(tmp_path: Path) -> None:
    async with fleet(tmp_path, client_certificates="required") as world:
        result = await tandem("chat", "hello", *shown(world.ca.client("acme")))
        assert (result.exit_code, result.stdout.strip()) == (0, "hi there")
        assert "--cert" in await refusal(TANDEM_API_KEY=world.key)
        assert "--cert" in await refusal(*shown(world.stranger.client("acme")))


async def test_status_shows_where_each_gateway_answers_http_and_grpc(world: World) -> None:
    result = await tandem("status")
    line = next(line for line in result.stdout.splitlines() if world.record.replica in line)
    assert world.record.url in line
    assert f"gRPC {world.record.grpc}" in line
    assert not world.record.grpc.endswith(":0")


async def test_status_as_json_has_what_a_gateway_with_tls_has_counted(world: World) -> None:
    result = await tandem("status", "--json")
    told = json.loads(result.stdout)
    assert told["gateways"][0]["grpc"] == world.record.grpc
    assert told["counters"][f"{world.record.url}/metrics"]


async def test_a_file_that_cannot_be_read_is_named(world: World, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.pem'} cannot be read" in await refusal("--ca", str(tmp_path / "none.pem"))
    told = await refusal("--cert", str(world.ca.file))
    assert "no certificate and its key" in told


async def test_a_key_with_a_line_break_goes_nowhere() -> None:
    with pytest.raises(AccessError, match="copy it again") as caught:
        await GatewayClient(Access(key="tdm-x\r\nhost: evil")).request("GET", "http://127.0.0.1:9/")
    assert "evil" not in str(caught.value)


def test_what_is_printed_of_the_access_has_no_key() -> None:
    assert "tdm-secret" not in repr(Access(key="tdm-secret"))


def test_the_examples_of_the_documentation_are_configurations() -> None:
    text = (Path(__file__).parents[2] / "docs" / "access.md").read_text(encoding="utf-8")
    examples = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    configs = [parse_config(example, "access.md") for example in examples]
    assert len(configs) == 3
    assert set(configs[-1].tenants) == {"acme", "nightly", "trial"}
