"""`fleet.yaml`: what a user who gets it wrong is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.config import FleetConfig
from tandem.config_file import ConfigError, load_config, parse_config


def mistake(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "fleet.yaml")
    return str(caught.value)


def test_an_empty_file_is_the_laptop_fleet() -> None:
    assert parse_config("", "fleet.yaml") == FleetConfig()


def test_values_of_the_file_are_taken() -> None:
    assert parse_config("prefill: {groups: 3}", "fleet.yaml").prefill.groups == 3


def test_an_unknown_field_is_answered_with_its_line_and_what_is_allowed() -> None:
    said = mistake("name: a\nprefill:\n  groups: 1\n  gpus: 2\n")
    assert said.startswith("fleet.yaml:4: prefill.gpus: no such field; allowed here: groups, nodes, gpus_per_node")


@pytest.mark.parametrize(
    ("text", "field", "allowed"),
    [
        ("gateway: {tls: {cert: a}}", "gateway.tls.cert", "certificate, key"),
        ("tenants: {acme: {rpm: 3}}", "tenants.acme.rpm", "priority, weight"),
        ("oidc: {url: x}", "oidc.url", "issuer, audience"),
    ],
)
def test_what_is_allowed_is_told_also_deep_within(text: str, field: str, allowed: str) -> None:
    assert f"fleet.yaml:1: {field}: no such field; allowed here: {allowed}" in mistake(text)


def test_a_value_out_of_range_is_answered_with_its_line_and_the_range() -> None:
    said = mistake("gateway:\n  port: 70000\n")
    assert said == "fleet.yaml:2: gateway.port: Input should be less than or equal to 65535 (got 70000)"


def test_a_wrong_choice_is_answered_with_the_choices() -> None:
    assert "fleet.yaml:1: device: Input should be 'cpu' or 'cuda' (got 'tpu')" in mistake("device: tpu")


def test_every_mistake_is_named_not_only_the_first() -> None:
    assert len(mistake("device: tpu\nname: A_B\n").splitlines()) == 2


def test_broken_yaml_is_answered_with_line_and_column() -> None:
    assert mistake("name: [a\ndevice: cpu\n").startswith("fleet.yaml:2:")


def test_a_list_is_not_a_fleet() -> None:
    assert "a fleet is a mapping of fields: name, device" in mistake("- a\n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_relative_certificates_are_beside_the_file_wherever_the_gateway_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "fleet.yaml").write_text(
        "gateway: {tls: {certificate: tls/crt.pem, key: /etc/key.pem, client_ca: ../ca.pem}}\n"
        "oidc: {issuer: 'https://i', audience: a, ca: ca.pem}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = load_config(Path("a/fleet.yaml"))
    assert found.gateway.tls is not None
    assert found.oidc is not None
    assert (found.gateway.tls.certificate, found.gateway.tls.key) == (tmp_path / "a/tls/crt.pem", Path("/etc/key.pem"))
    assert (found.gateway.tls.client_ca, found.oidc.ca) == (tmp_path / "a/../ca.pem", tmp_path / "a/ca.pem")


def test_a_field_that_is_given_twice_is_a_mistake() -> None:
    assert mistake("decode:\n  groups: 2\n  groups: 3\n") == "fleet.yaml:3: groups: is given twice"


def test_a_file_that_is_not_text_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "fleet.yaml")


def test_yaml_with_forbidden_characters_is_a_mistake_not_a_crash() -> None:
    assert "not valid YAML" in mistake("name: a\0b")
