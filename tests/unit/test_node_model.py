"""Another model in the configuration of a head that runs, or that starts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from tandem.config import FleetConfig, GatewayConfig, ModelConfig
from tandem.fleet.fleet_record import read_record
from tandem.fleet.host_steps import HostError, ServedModel, fleet_record
from tandem.fleet.node_model import ModelFollower, what_serves
from tandem.fleet.snapshot import FLEET_KEY
from tandem.models.tiny import tiny_config
from tandem.state import Store, open_store
from unit.test_fleet_backend import SmallEngines

FIRST = FleetConfig(model=ModelConfig(path=Path("/first"), name="r1"))


def naming(path: str, **more: object) -> FleetConfig:
    return FIRST.model_copy(update={"model": ModelConfig(path=Path(path), name="r1", version="2"), **more})


@dataclass
class Told:
    """What gateways and controller were told; the controller fails as often as it should."""

    follower: ModelFollower
    gateways: list[str] = field(default_factory=list)
    controller: list[str] = field(default_factory=list)
    failures: int = 0


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store("embedded", fleet="test", folder=tmp_path)
    await store.put(FLEET_KEY, msgspec.json.encode(fleet_record(FIRST, ServedModel.of(FIRST, tmp_path))))
    yield store
    await store.close()


@pytest.fixture
def told(store: Store, tmp_path: Path) -> Told:
    async def controller(config: FleetConfig, model: ServedModel) -> None:
        if made.failures:
            made.failures -= 1
            raise HostError("the controller did not start")
        made.controller.append(str(model.path))

    def gateways(config: FleetConfig, path: Path) -> None:
        made.gateways.append(f"{config.gateway.replicas} with {path}")

    model = ServedModel.of(FIRST, tmp_path)
    follower = ModelFollower(
        store, FIRST, model, folder=tmp_path, engines=SmallEngines(), gateways=gateways, controller=controller
    )
    made = Told(follower)
    return made


async def test_a_model_that_fits_is_taken_by_gateways_and_controller(told: Told, store: Store) -> None:
    await told.follower.carry_out(naming("/second"))
    assert (told.gateways, told.controller) == (["1 with /second"], ["/second"])
    record = await read_record(store)
    assert (record.model_path, record.model_name) == ("/first", "r1")  # its groups have what they had


async def test_a_model_that_does_not_fit_is_told_and_keeps_nothing_else_back(told: Told) -> None:
    for _ in range(3):
        with pytest.raises(HostError, match="weights that the fleet cannot take: the checkpoint in /none cannot be"):
            await told.follower.carry_out(naming("/none", gateway=GatewayConfig(replicas=2)))
    assert (told.gateways, told.controller) == (["2 with /first"], ["/first"])
    await told.follower.carry_out(FIRST)
    assert told.gateways[1:] == ["1 with /first"]


async def test_a_controller_that_did_not_take_it_is_told_again_and_nobody_else(told: Told) -> None:
    told.failures = 1
    with pytest.raises(HostError, match="did not start"):
        await told.follower.carry_out(naming("/second"))
    await told.follower.carry_out(naming("/second"))
    assert (told.gateways, told.controller) == (["1 with /second"], ["/second"])


async def test_a_name_in_the_api_may_change_alone(told: Told, store: Store) -> None:
    await told.follower.carry_out(FIRST.model_copy(update={"model": ModelConfig(path=Path("/first"), name="r2")}))
    assert (await read_record(store)).model_name == "r2"


WRONG = HostError("/none holds no model")


async def test_a_head_that_starts_with_a_model_that_is_not_there_goes_by_the_one_that_the_fleet_has(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(tiny_config()))
    has = msgspec.structs.replace(await read_record(store), model_path=str(tmp_path), model_version="7")
    await store.put(FLEET_KEY, msgspec.json.encode(has))
    config, model = await what_serves(store, naming("/none"), tmp_path, WRONG)
    assert (config.model.path, config.model.version, model.name) == (tmp_path, "7", "r1")


@pytest.mark.parametrize("has", ["", "/none", "/gone"])
async def test_a_head_whose_fleet_has_no_other_model_says_what_is_wrong(store: Store, tmp_path: Path, has: str) -> None:
    await store.put(FLEET_KEY, msgspec.json.encode(msgspec.structs.replace(await read_record(store), model_path=has)))
    with pytest.raises(HostError, match=f"{has if has == '/gone' else '/none'} holds no model"):
        await what_serves(store, naming("/none"), tmp_path, WRONG)
