"""`tandem keys` against a fleet's real (embedded) store; the fleet's host process is this test's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tandem.cli.keys import app
from tandem.config import FleetConfig
from tandem.fleet.run_folder import HostRecord, RunFolder
from tandem.gateway.access.keys import KEY_PATTERN


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    for name in ("TANDEM_CONTROL", "TANDEM_CONFIG", "TANDEM_STATE_URL", "TANDEM_TENANTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def start(**values: Any) -> RunFolder:
    """A run folder whose host lives: it is this process."""
    config = FleetConfig.model_validate({"tenants": {"acme": {}, "beta": {}}, **values})
    folder = RunFolder(config.name)
    folder.make()
    folder.write_config(config)
    created = psutil.Process().create_time()
    folder.write(HostRecord(pid=os.getpid(), created=created, run="r", scratch="", store=config.state.url))
    return folder


@pytest.fixture
def fleet() -> RunFolder:
    return start()


def tandem(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def made(*arguments: str) -> dict[str, Any]:
    result = tandem("create", "--tenant", "acme", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def listed(*arguments: str) -> list[dict[str, Any]]:
    return list(json.loads(tandem("list", "--json", *arguments).stdout))


def failure(*arguments: str) -> str:
    result = tandem(*arguments)
    assert result.exit_code == 1
    assert not result.stdout
    return result.stderr


@pytest.mark.usefixtures("fleet")
def test_create_prints_the_key_alone_to_stdout() -> None:
    result = tandem("create", "--tenant", "acme")
    assert KEY_PATTERN.fullmatch(result.stdout.strip().encode())
    assert "of tenant acme, good until it is revoked" in result.stderr


def test_the_key_is_nowhere_in_the_store(fleet: RunFolder) -> None:
    secret = made()["key"].rpartition("-")[2].encode()
    files = [file.read_bytes() for file in fleet.store.iterdir()]
    assert files
    assert not any(secret in content for content in files)


@pytest.mark.usefixtures("fleet")
def test_list_shows_a_key_but_neither_secret_nor_hash() -> None:
    key = made("--comment", "for ci", "--expires", "30d")
    (shown,) = listed()
    assert shown == {name: value for name, value in key.items() if name != "key"}
    assert (shown["tenant"], shown["state"], shown["comment"]) == ("acme", "valid", "for ci")
    assert shown["expires"] - shown["created"] == 30 * 86400
    assert "hash" not in shown


@pytest.mark.usefixtures("fleet")
def test_list_is_a_table_for_people() -> None:
    key = made("--comment", "[bold]x[/bold]")
    said = tandem("list").stdout
    assert key["id"] in said
    assert "[bold]x[/bold]" in said
    assert key["key"] not in said


@pytest.mark.usefixtures("fleet")
def test_an_empty_list_says_how_to_make_a_key() -> None:
    assert "tandem keys create --tenant NAME" in tandem("list").stdout


@pytest.mark.parametrize("form", ["{id}", "tdm-{id}", "{key}"])
@pytest.mark.usefixtures("fleet")
def test_a_key_is_revoked_by_its_id_or_by_itself(form: str) -> None:
    key = made()
    said = tandem("revoke", form.format(**key)).stdout
    assert said == f"key {key['id']} of tenant acme is revoked\n"
    assert listed()[0]["state"] == "revoked"


@pytest.mark.usefixtures("fleet")
def test_an_unknown_id_is_answered_with_where_to_look() -> None:
    assert "there is no key aaaaaaaa; `tandem keys list` shows" in failure("revoke", "aaaaaaaa")


@pytest.mark.usefixtures("fleet")
def test_what_is_no_id_is_not_repeated_for_it_may_be_a_secret() -> None:
    said = failure("revoke", "tdm-abcdefgh-mistypedsecret")
    assert "this is no id of a key" in said
    assert "mistyped" not in said


@pytest.mark.usefixtures("fleet")
def test_an_unknown_tenant_is_answered_with_those_known() -> None:
    assert "has no tenant 'x'; its fleet.yaml has: acme, beta" in failure("create", "--tenant", "x")


def test_a_fleet_without_tenants_says_how_to_name_them() -> None:
    start(tenants={})
    assert "`tenants: {acme: {}}`" in failure("create", "--tenant", "acme")


@pytest.mark.parametrize("life", ["0d", "30", "d", "-1d", "11y", "1.5h", "99999999d"])
@pytest.mark.usefixtures("fleet")
def test_a_life_that_is_none_is_answered_with_examples(life: str) -> None:
    assert "such as 30d" in failure("create", "--tenant", "acme", f"--expires={life}")


@pytest.mark.usefixtures("fleet")
def test_a_comment_has_its_limit() -> None:
    assert "at most 200" in failure("create", "--tenant", "acme", "--comment", "x" * 201)


@pytest.mark.parametrize("command", [("create", "--tenant", "acme"), ("list",), ("revoke", "aaaaaaaa")])
def test_without_a_running_fleet_the_user_is_told_to_start_one(command: tuple[str, ...]) -> None:
    assert "no fleet named laptop runs on this machine" in failure(*command)


def test_another_fleet_has_other_keys() -> None:
    start()
    start(name="other")
    made()
    assert listed("--fleet", "other") == []


def test_a_fleet_that_runs_elsewhere_is_named_by_its_file(home: Path) -> None:
    file = home / "fleet.yaml"
    file.write_text(f"name: far\nstate: {{url: 'embedded:{home}/shared'}}\ntenants: {{acme: {{}}}}\n")
    key = made("--file", str(file))
    assert [shown["id"] for shown in listed("--file", str(file))] == [key["id"]]


def test_a_file_with_an_embedded_store_needs_its_fleet_to_run_here(home: Path) -> None:
    file = home / "fleet.yaml"
    file.write_text("name: far\ntenants: {acme: {}}\n")
    assert "no fleet named far runs" in failure("create", "--tenant", "acme", "--file", str(file))


def test_in_the_pod_of_a_head_store_and_tenants_are_those_of_its_secrets(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tenants = home / "fleet.json", home / "tenants.yaml"
    file.write_text(json.dumps({"name": "r1", "state": {"url": "redis://TANDEM_STATE_URL/0"}}))
    tenants.write_text("acme: {}\n")
    monkeypatch.setenv("TANDEM_CONFIG", str(file))
    monkeypatch.setenv("TANDEM_STATE_URL", f"embedded:{home}/shared")
    assert "has no tenants" in failure("create", "--tenant", "acme")
    monkeypatch.setenv("TANDEM_TENANTS", str(tenants))
    key = made()
    assert [shown["id"] for shown in listed()] == [key["id"]]
    assert [shown["id"] for shown in listed("-f", str(file))] == [key["id"]]


@pytest.mark.parametrize(
    ("url", "tenants"),
    [("hush://x", "acme: {}"), ("redis://:hush@127.0.0.1:1/0", "acme: {}"), ("embedded:x", "acme: {hush: 1hush}")],
)
def test_secrets_of_the_pod_are_not_told_when_they_are_wrong(
    url: str, tenants: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, further = home / "fleet.json", home / "tenants.yaml"
    file.write_text(json.dumps({"name": "r1", "state": {"url": "redis://TANDEM_STATE_URL/0"}}))
    further.write_text(tenants)
    monkeypatch.setenv("TANDEM_STATE_URL", url)
    monkeypatch.setenv("TANDEM_TENANTS", str(further))
    said = failure("create", "--tenant", "acme", "-f", str(file))
    assert ":hush" not in said
    assert "1hush" not in said
    assert "hush://" not in said
