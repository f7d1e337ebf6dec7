"""What the ranks of a fleet are started with, and how many rooms their engines say they have."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from pathlib import Path

import msgspec
import pytest

from tandem.config import FleetConfig, PoolConfig, RayConfig
from tandem.core.types import EngineSettings, GroupSpec, Role
from tandem.engine.http1 import HttpFailure
from tandem.engine.launch import RankEndpoints
from tandem.fleet.engines import NoEngineError, SglangEngines
from tandem.fleet.rooms import RoomCounter, Rooms
from tandem.models.tiny import tiny_config

WHERE = RankEndpoints(host="127.0.0.1", http_port=16000, dist_init="127.0.0.1:16002", bootstrap_port=16001)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    return tmp_path


def group(role: Role, nodes: int = 2) -> GroupSpec:
    return GroupSpec(group=f"{role}-0", role=role, nodes=nodes)


def test_a_cpu_fleet_runs_our_server_with_the_pools_own_flags_last(model: Path) -> None:
    config = FleetConfig(decode=PoolConfig(args=("--log-level", "debug"), env={"WORD": "hello"}))
    command = SglangEngines(config, model=model, name="tiny").command(group(Role.DECODE), 1, WHERE)
    assert command.argv[:3] == (sys.executable, "-m", "tandem.engine.cpu.launch_server")
    assert command.argv[-2:] == ("--log-level", "debug")
    assert command.argv[command.argv.index("--node-rank") + 1] == "1"
    assert command.env["WORD"] == "hello"


def test_a_groups_own_engine_settings_come_in_place_of_the_pools(model: Path) -> None:
    config = FleetConfig(decode=PoolConfig(args=("--log-level", "debug"), env={"WORD": "hello"}))
    own = EngineSettings(args=("--page-size", "32"), env={"NAME": "b"}, max_total_tokens=512)
    command = SglangEngines(config, model=model, name="tiny").command(
        msgspec.structs.replace(group(Role.DECODE), engine=own), 1, WHERE
    )
    assert command.argv[-2:] == ("--page-size", "32")
    assert command.argv[command.argv.index("--max-total-tokens") + 1] == "512"
    assert (command.env["NAME"], "WORD" in command.env) == ("b", False)


def test_where_nodes_belong_to_groups_each_rank_asks_for_one_of_its_group(model: Path) -> None:
    config = FleetConfig(ray=RayConfig(group_resources=True))
    bundle = SglangEngines(config, model=model, name="tiny").bundle(group(Role.DECODE))
    assert bundle == {"tandem-rank": 1, "tandem-group-decode-0": 1}


def test_only_a_prefill_rank_tells_what_it_caches(model: Path) -> None:
    engines = SglangEngines(FleetConfig(), model=model, name="tiny")
    where = msgspec.structs.replace(WHERE, kv_events_port=16032, kv_topic="prefill-0/1/")
    prefill, decode = (engines.command(group(role), 1, where) for role in (Role.PREFILL, Role.DECODE))
    assert [(source.dp_rank, source.events) for source in prefill.kv_events] == [(1, "tcp://127.0.0.1:16032")]
    assert decode.kv_events == ()


def test_a_gpu_fleet_runs_sglang_itself_and_takes_gpus(model: Path) -> None:
    engines = SglangEngines(FleetConfig(device="cuda"), model=model, name="tiny")
    assert engines.command(group(Role.DECODE, nodes=1), 0, WHERE).argv[2] == "sglang.launch_server"
    assert engines.bundle(group(Role.DECODE, nodes=1))["GPU"] == 1


def test_only_a_prefill_group_tells_a_bootstrap_server(model: Path) -> None:
    engines = SglangEngines(FleetConfig(), model=model, name="tiny")
    prefill, decode = (engines.service(group(role), WHERE) for role in (Role.PREFILL, Role.DECODE))
    assert (prefill.url, prefill.dp_size, prefill.bootstrap_port) == ("http://127.0.0.1:16000", 2, 16001)
    assert (decode.bootstrap_host, decode.bootstrap_port) == ("", 0)


def test_a_group_runs_the_weights_that_its_wish_names_and_else_the_fleets_own(model: Path) -> None:
    engines = SglangEngines(FleetConfig(), model=model, name="tiny")
    own, other = group(Role.DECODE), msgspec.structs.replace(group(Role.DECODE), weights_path="/b", weight_version="2")
    given = [engines.command(spec, 0, WHERE).argv for spec in (own, other)]
    assert [argv[argv.index("--model-path") + 1] for argv in given] == [str(model), "/b"]
    assert [argv[argv.index("--weight-version") + 1] for argv in given] == ["1", "2"]
    assert [engines.service(spec, WHERE).weight_version for spec in (own, other)] == ["1", "2"]


def test_a_checkpoint_that_running_engines_cannot_take_is_one_sentence(model: Path, tmp_path: Path) -> None:
    engines = SglangEngines(FleetConfig(), model=model, name="tiny")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(NoEngineError, match="the checkpoint in /no/model cannot be read"):
        engines.check_weights("/no/model")
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(NoEngineError, match=r"holds no weights \(\*\.safetensors\)"):
        engines.check_weights(str(other))
    (other / "model.safetensors").touch()
    (model / "tokenizer.json").write_text('{"vocab": {"a": 1, "b": 2}}')
    with pytest.raises(NoEngineError, match=r"other/tokenizer\.json cannot be read"):
        engines.check_weights(str(other))
    (other / "tokenizer.json").write_text('{"vocab": {"a": 2, "b": 1}}')
    with pytest.raises(NoEngineError, match=r"the tokenizer in .*/other is another one than the fleet's"):
        engines.check_weights(str(other))
    (other / "tokenizer.json").write_text('{"vocab": {"b": 2,\n "a": 1}}')
    engines.check_weights(str(other))
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(NoEngineError, match="has another shape than the fleet's"):
        engines.check_weights(str(other))


def test_a_group_that_cannot_work_and_a_model_that_is_not_there_are_one_sentence(model: Path) -> None:
    with pytest.raises(NoEngineError, match="decode-0 cannot run: "):
        SglangEngines(FleetConfig(), model=model, name="tiny").check(group(Role.DECODE, nodes=7))
    with pytest.raises(NoEngineError, match="the checkpoint in /no/model cannot be read"):
        SglangEngines(FleetConfig(), model=Path("/no/model"), name="tiny").check(group(Role.DECODE))


def test_they_travel_to_the_controller(model: Path) -> None:
    there = pickle.loads(pickle.dumps(SglangEngines(FleetConfig(), model=model, name="tiny")))
    assert there.service(group(Role.DECODE), WHERE).dp_size == 2


async def test_rooms_are_counted_in_every_queue_and_on_every_dp_rank() -> None:
    loads = [
        {"num_running_reqs": 1, "num_waiting_reqs": 2, "disaggregation": {"prefill_inflight_queue_reqs": 3}},
        {"num_running_reqs": 4, "num_waiting_reqs": 0, "queues": {"grammar": 5}},
    ]
    assert await count(json.dumps({"loads": loads})) == 15


async def test_a_prompt_between_two_of_its_chunks_is_a_room_although_it_is_in_no_queue() -> None:
    assert await count(json.dumps({"loads": [{"num_waiting_uncached_tokens": 7}]})) == 1


def test_every_dp_rank_must_have_reported_again() -> None:
    before = Rooms(0, (1.0, 5.0))
    assert Rooms(0, (2.0, 6.0)).later_than(before)
    assert not Rooms(0, (2.0, 5.0)).later_than(before)
    assert not Rooms(0, (2.0,)).later_than(before)


async def test_an_answer_that_makes_no_sense_is_not_taken_for_no_rooms() -> None:
    with pytest.raises(HttpFailure, match="makes no sense"):
        await count("{}")


async def count(answer: str) -> int:
    """What a counter makes of an engine that answers so."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(answer)}\r\n\r\n{answer}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    counter = RoomCounter()
    try:
        return (await counter.look(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")).requests
    finally:
        await counter.close()
        server.close()
