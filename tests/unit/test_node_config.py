"""The configuration of a head in a pod."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.fleet.host_steps import HostError
from tandem.fleet.node_config import read_config

REDIS = {"state": {"url": "redis://r:6379/0"}}


def written(folder: Path, **config: object) -> Path:
    file = folder / "fleet.json"
    file.write_text(json.dumps({**REDIS, **config}))
    return file


def test_a_file_of_tenants_comes_before_the_configurations_own(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("acme: {subjects: [a]}\nnew: {}\n")
    file = written(tmp_path, tenants={"acme": {"subjects": ["b"]}, "old": {}})
    config = read_config(file, tenants=tenants)
    assert sorted(config.tenants) == ["acme", "new", "old"]
    assert tuple(config.tenants["acme"].subjects) == ("a",)
    tenants.write_text("")
    assert sorted(read_config(file, tenants=tenants).tenants) == ["acme", "old"]


def test_a_secret_url_takes_the_place_of_the_configurations_own(tmp_path: Path) -> None:
    assert read_config(written(tmp_path), state_url="redis://x:1/2").state.url == "redis://x:1/2"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"state": {"url": "embedded"}}, "other nodes cannot see"),
        ({"ray": {"address": "h:1"}}, "on all nodes of that cluster"),
        ({"ray": {"address": "auto"}}, "needs host:port"),
        ({"name": "BAD"}, "fleet.json is no fleet's configuration: name"),
    ],
)
def test_what_a_head_cannot_use_is_refused(tmp_path: Path, config: dict[str, object], why: str) -> None:
    with pytest.raises(HostError, match=why):
        read_config(written(tmp_path, **config))


def test_a_mistake_among_the_tenants_is_told_without_their_words(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("acme: {secret: hush}\n")
    with pytest.raises(HostError, match=r"acme\.secret") as told:
        read_config(written(tmp_path), tenants=tenants)
    assert "hush" not in str(told.value)
    tenants.write_text("acme: [hush\n")
    with pytest.raises(HostError, match="is not YAML") as told:
        read_config(written(tmp_path), tenants=tenants)
    assert "hush" not in str(told.value)
