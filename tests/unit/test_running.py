"""Which fleet a command speaks to: one of this machine, or that whose control service the environment names."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tandem.cli.main import app
from tandem.cli.running import NotRunning, elsewhere
from tandem.core.types import GroupSpec, Role
from tandem.fleet.backend import StoreBackend
from tandem.fleet.control_service import serve_control
from tandem.fleet.snapshot import FLEET_KEY, FleetRecord
from tandem.state import Store, open_store

SPEC = GroupSpec(group="decode-0", role=Role.DECODE, nodes=2)


class NoEngines:
    """`Engines` that nobody asks for anything."""

    def check(self, spec: GroupSpec) -> None:
        raise NotImplementedError

    bundle = command = service = folder = check_weights = encode = decode = check


class Remote:
    """A fleet elsewhere: its store, and its control service in a thread, as commands have event loops of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = self.do(self._start())

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> int:
        self.store: Store = await open_store("embedded", fleet="r1", folder=self._folder)
        await self.store.put(FLEET_KEY, msgspec.json.encode(FleetRecord(name="r1", model_name="tiny")))
        await self.store.put("desired/decode-0", msgspec.json.encode(SPEC))
        backend = StoreBackend(self.store, NoEngines(), drain_s=60)  # type: ignore[arg-type]
        self._server, port = await serve_control(backend, "127.0.0.1", 0)
        return port

    def wish(self) -> GroupSpec:
        return msgspec.json.decode(self.do(self.store.get("desired/decode-0")).value, type=GroupSpec)

    def end(self) -> None:
        self.do(self._server.stop(0))
        self.do(self.store.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


@pytest.fixture(autouse=True)
def _nothing_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    for name in ("TANDEM_CONTROL", "TANDEM_CONFIG", "TANDEM_STATE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    remote = Remote(tmp_path / "remote")
    monkeypatch.setenv("TANDEM_CONTROL", f"127.0.0.1:{remote.port}")
    yield remote
    remote.end()


def tandem(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def head(folder: Path, **config: Any) -> str:
    file = folder / "fleet.json"
    file.write_text(json.dumps({"name": "r1", **config}))
    return str(file)


def test_without_a_word_of_the_environment_it_is_a_fleet_of_this_machine() -> None:
    assert elsewhere() == ""
    assert "no fleet named laptop runs on this machine" in tandem("status").stderr


@pytest.mark.parametrize(("config", "port"), [({}, 9000), ({"control": {"host": "0.0.0.0", "port": 9100}}, 9100)])
def test_in_the_pod_of_a_head_it_is_that_heads(
    config: dict[str, Any], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_CONFIG", head(tmp_path, **config))
    assert elsewhere() == f"127.0.0.1:{port}"
    monkeypatch.setenv("TANDEM_CONTROL", "r1-head:9000")
    assert elsewhere() == "r1-head:9000"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("TANDEM_CONTROL", "r1-head", "write host:port"), ("TANDEM_CONFIG", "/nowhere.json", "cannot be read")],
)
def test_an_environment_that_names_none_is_told(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(NotRunning, match=said):
        elsewhere()
    assert tandem("status").exit_code == 1


@pytest.mark.usefixtures("remote")
def test_status_tells_of_the_fleet_elsewhere() -> None:
    told = json.loads(tandem("status", "--json").stdout)
    assert (told["name"], [wish["group"] for wish in told["desired"]], told["host"]) == ("r1", ["decode-0"], None)
    assert tandem("status", "--fleet", "r1").exit_code == 0


def test_drain_reaches_the_fleet_elsewhere(remote: Remote) -> None:
    assert not remote.wish().draining
    assert tandem("drain", "decode-0", "--no-wait").exit_code == 0
    assert remote.wish().draining


def test_a_fleet_of_another_name_is_left_alone(remote: Remote) -> None:
    result = tandem("drain", "decode-0", "--no-wait", "--fleet", "r2")
    assert result.exit_code == 1
    assert "is r1, not r2" in result.stderr
    assert not remote.wish().draining


@pytest.mark.usefixtures("remote")
def test_refresh_asks_the_fleet_elsewhere() -> None:
    assert "refresh" in tandem("refresh").stderr
    assert "on this machine" not in tandem("refresh").stderr


def test_scale_is_refused_there_since_the_operator_would_take_it_back(remote: Remote) -> None:
    result = tandem("scale", "decode", "2")
    assert result.exit_code == 1
    assert "kubectl scale epp" in result.stderr
    assert not remote.wish().draining


def test_a_control_service_that_is_away_is_told_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CONTROL", "127.0.0.1:1")
    assert "127.0.0.1:1 is not available" in tandem("status").stderr
