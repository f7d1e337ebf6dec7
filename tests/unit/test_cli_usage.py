"""`tandem usage` reads what gateways wrote and adds it up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from tandem.cli import usage as command
from tandem.cli.usage import IdsOnDisk
from tandem.core.usage import UsageRecord

NOW = 1_795_485_600.0  # 2026-11-24T02:00 UTC

cli = typer.Typer()
cli.command()(command.usage)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    for name in ("TANDEM_CONTROL", "TANDEM_CONFIG", "TANDEM_STATE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command.time, "time", lambda: NOW)
    return tmp_path / "home"


def record(number: int, **fields: object) -> UsageRecord:
    given = {
        "id": f"r{number}",
        "at": NOW - 60,
        "model": "deepseek-r1",
        "tenant": "a",
        "prompt_tokens": 10**6,
        **fields,
    }
    return UsageRecord(**given)  # type: ignore[arg-type]


def write(folder: Path, *records: UsageRecord, name: str = "g", tail: bytes = b"") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"usage-20261124T000000Z-{name}-0000000000000000.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in records) + tail)
    return folder


def usage(*options: str) -> Result:
    return CliRunner().invoke(cli, list(options))


def answer(*options: str) -> dict[str, Any]:
    result = usage(*options, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_tenants_are_shown_with_what_they_used_and_what_it_costs(tmp_path: Path) -> None:
    folder = write(tmp_path / "u", record(1), record(2, tenant="b", completion_tokens=10**6))
    found = answer("--by", "tenant", "--folder", str(folder))
    assert [(group["tenant"], group["dollars"]) for group in found["groups"]] == [
        ("a", "0.550000000000"),
        ("b", "2.740000000000"),
    ]
    assert found["total"]["dollars"] == "3.290000000000"
    assert found["total"]["requests"] == 2


def test_a_record_in_two_files_counts_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "u", record(1), record(2), name="g1")
    write(folder, record(2), record(3), name="g2")
    found = answer("--folder", str(folder))
    assert (found["total"]["requests"], found["duplicates"]) == (3, 1)


def test_a_torn_last_line_is_no_matter_and_garbage_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "u", record(1), tail=b'{"id":"r2","at"')
    assert answer("--folder", str(folder))["total"]["requests"] == 1
    write(folder, record(1), tail=b"garbage\n")
    result = usage("--folder", str(folder))
    assert result.exit_code == 0
    assert "1 lines are no usage records" in result.stderr


@pytest.mark.parametrize(
    ("options", "requests"),
    [
        (["--since", "1h"], 1),
        (["--since", "1d"], 2),
        (["--since", "2026-11-24"], 2),
        (["--until", "2026-11-24T01:30"], 1),
        (["--until", "2026-11-24T02:00+01:00"], 1),
        (["--since", "2026-11-24T01:58", "--until", "2026-11-24T02:00"], 1),
        (["--tenant", "b"], 1),
        ([], 2),
    ],
)
def test_only_the_wanted_time_and_tenant_are_counted(tmp_path: Path, options: list[str], requests: int) -> None:
    folder = write(tmp_path / "u", record(1), record(2, at=NOW - 5400, tenant="b"))
    assert answer("--folder", str(folder), *options)["total"]["requests"] == requests


def test_prices_of_the_command_line_come_before_those_of_the_configuration(home: Path) -> None:
    write(home / "laptop" / "usage", record(1), record(2, model="other"))
    price = {"hit": "1", "miss": "2", "output": "3"}
    (home / "laptop" / "config.json").write_text(json.dumps({"metering": {"prices": {"other": price}}}))
    assert answer()["total"]["dollars"] == "2.550000000000"
    assert answer("--price", "other=0/7/0", "--price", "0/1/0")["total"]["dollars"] == "8.000000000000"


def test_the_files_of_a_fleet_that_has_ended_are_found_by_its_name(home: Path) -> None:
    write(home / "mine" / "usage", record(1))
    (home / "mine" / "config.json").write_text("{}")
    assert answer("--fleet", "mine")["total"]["requests"] == 1


def test_gpu_hours_are_those_of_the_whole_time_and_of_both_pools(home: Path) -> None:
    write(home / "laptop" / "usage", record(1))
    pools = {"prefill": {"groups": 2, "nodes": 4, "gpus_per_node": 8}, "decode": {"groups": 1, "nodes": 1}}
    (home / "laptop" / "config.json").write_text(json.dumps({**pools, "metering": {"gpu_hour_price": 2}}))
    gpu = answer("--gpu-hours", "--since", "1h")["gpu"]
    assert (gpu["hours"], gpu["money"], gpu["per_million_tokens"]) == ("65.000000", "130.000000", "130.000000")
    assert answer("--gpu-hours", "--since", "1h", "--gpus", "8", "--gpu-price", "0.5")["gpu"]["money"] == "4.000000"


def test_in_the_pod_of_a_head_it_reads_the_stream_that_the_secret_names(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    file = home / "fleet.json"
    pools = {"prefill": {"groups": 0}, "decode": {"groups": 0}}
    file.write_text(json.dumps({"name": "r1", "state": {"url": "redis://TANDEM_STATE_URL/0"}, **pools}))
    monkeypatch.setenv("TANDEM_CONFIG", str(file))
    monkeypatch.setenv("TANDEM_STATE_URL", "redis://:hush@127.0.0.1:1/0")
    result = usage()
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert "hush" not in result.stderr
    assert "is of fleet r1, not r2" in usage("--fleet", "r2").stderr.replace("\n", " ")
    folder = write(home / "u", record(1))
    said = usage("--folder", str(folder), "--gpu-hours", "--gpu-price", "2").stderr
    assert "say with --gpus" in said


def test_csv_has_a_line_a_group_and_no_formula(tmp_path: Path) -> None:
    folder = write(tmp_path / "u", record(1, user="=1+1"), record(2, user="ann"))
    rows = list(csv.DictReader(usage("--by", "user", "--folder", str(folder), "--csv").stdout.splitlines()))
    assert [row["user"] for row in rows] == ["'=1+1", "ann"]
    assert {row["dollars"] for row in rows} == {"0.550000000000"}


def test_people_see_a_table_with_a_total(tmp_path: Path) -> None:
    folder = write(tmp_path / "u", record(1), record(2, tenant="[b]"))
    shown = usage("--by", "tenant", "--by", "day", "--folder", str(folder)).stdout
    assert all(word in shown for word in ("[b]", "2026-11-24", "1,000,000", "$0.5500", "total", "$1.1000"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no fleet named laptop ever ran here"),
        (["--folder", "/nowhere"], "no folder /nowhere"),
        (["--since", "yesterday"], "is no time"),
        (["--price", "0.1"], "HIT/MISS/OUTPUT"),
        (["--price", "0.1/cheap/1"], "is not a price"),
        (["--redis", "http://x"], "not a Redis URL"),
    ],
)
def test_a_question_that_cannot_be_answered_says_what_to_do(options: list[str], said: str, tmp_path: Path) -> None:
    result = usage(*options)
    assert result.exit_code == 1
    assert said in result.stderr.replace("\n", " ")


def test_ids_are_remembered_on_disk() -> None:
    ids = IdsOnDisk()
    assert [ids.first(one) for one in ("a", "b", "a", "b", "c")] == [True, True, False, False, True]
