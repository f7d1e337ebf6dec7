"""Loading other weights: which answers are held against those of the pairs before, on a CPU and on GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from support.canary_engine import engine
from tandem.config import FleetConfig, PoolConfig
from tandem.core.refresh import Refresh
from tandem.core.types import GroupSpec, Role
from tandem.fleet.canary import TOKENS
from tandem.fleet.engines import SglangEngines
from tandem.fleet.weights import DETERMINISTIC, WeightLoader, WeightsError, answers_exactly
from tandem.models.tiny import tiny_config
from tandem.state import open_store

SAID = tuple(range(7, 7 + TOKENS))
"""What the engines here answer."""
REFRESH = Refresh(path="/second", version="2", old_path="/first", old_version="1", prompt=(1, 2))
SURE = PoolConfig(args=(DETERMINISTIC,))
CPU, GPU = FleetConfig(), FleetConfig(device="cuda")


class Engines(SglangEngines):
    """SGLang's, with a tokenizer whose words are numbers."""

    def decode(self, path: str, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    return tmp_path


async def load(model: Path, config: FleetConfig, refresh: Refresh) -> Refresh:
    """Let a decode group take the weights that a prefill group has already. Raises WeightsError."""
    store = await open_store("embedded", fleet="test", folder=model)
    loader = WeightLoader(store, Engines(config, model=model, name="tiny"), within=5)
    try:
        async with engine(Role.PREFILL, 1) as prefill, engine(Role.DECODE, 1) as decode:
            partner = replace(prefill.group, weight_version="2")
            await store.put("groups/prefill-0", msgspec.json.encode(partner))
            for role in Role:
                await store.put(f"desired/{role}-0", msgspec.json.encode(spec(role)))
            await store.put("refresh", msgspec.json.encode(refresh))
            await loader.load(decode.group, "/second", "2")
        entry = await store.get("refresh")
        assert entry is not None
        return msgspec.json.decode(entry.value, type=Refresh)
    finally:
        await loader.close()
        await store.close()


def spec(role: Role) -> GroupSpec:
    return GroupSpec(group=f"{role}-0", role=role, nodes=1)


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (CPU, True),
        (GPU, False),
        (GPU.model_copy(update={"prefill": SURE}), False),
        (GPU.model_copy(update={"prefill": SURE, "decode": SURE}), True),
    ],
)
def test_gpus_answer_exactly_only_where_both_pools_have_the_flag(model: Path, config: FleetConfig, exact: bool) -> None:
    engines = SglangEngines(config, model=model, name="tiny")
    assert all(answers_exactly(engines, spec(role)) for role in Role) is exact


@pytest.mark.parametrize("config", [CPU, GPU])
async def test_the_first_pair_notes_its_answer_and_the_next_one_may_say_the_same(
    model: Path, config: FleetConfig
) -> None:
    noted = await load(model, config, REFRESH)
    assert noted.answer == SAID
    assert await load(model, config, noted) == noted


async def test_an_answer_that_differs_later_on_fails_on_a_cpu_and_not_on_gpus(model: Path) -> None:
    before = replace(REFRESH, answer=(*SAID[:-1], 99))
    with pytest.raises(WeightsError, match="is another one than that of the first pair"):
        await load(model, CPU, before)
    assert await load(model, GPU, before) == before


async def test_an_answer_that_begins_otherwise_fails_on_gpus_too(model: Path) -> None:
    with pytest.raises(WeightsError, match="is another one than that of the first pair"):
        await load(model, GPU, replace(REFRESH, answer=(99, *SAID[1:])))


@pytest.mark.parametrize("config", [CPU, GPU])
async def test_what_is_expected_is_held_against_the_whole_answer_everywhere(model: Path, config: FleetConfig) -> None:
    await load(model, config, replace(REFRESH, expect="7 8 9"))
    with pytest.raises(WeightsError, match="does not begin with what is expected"):
        await load(model, config, replace(REFRESH, expect="7 8 8"))
