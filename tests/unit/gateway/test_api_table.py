"""The tables in docs/api.md are true: every row is sent to the parser, and no field is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from gateway_model import CARD

from tandem.gateway.errors import ApiError
from tandem.gateway.model_card import ModelCard
from tandem.gateway.params import HARMLESS, REFUSED, SAMPLING
from tandem.gateway.requests import CHAT_FIELDS, COMPLETION_FIELDS, Wanted, chat_request, completion_request

DOCUMENT = Path(__file__).parents[3] / "docs" / "api.md"
LABELS = {"user": "", "metadata": {}}
"""What `Wanted` keeps of a request for others to read; it is no part of the answer."""


class Endpoint(NamedTuple):
    parse: Callable[[Mapping[str, Any], ModelCard], Wanted]
    needed: dict[str, Any]
    fields: frozenset[str]


class Row(NamedTuple):
    path: str
    field: str
    example: dict[str, Any]
    verdict: str


_EVERY = frozenset({*SAMPLING, *HARMLESS, *REFUSED})
ENDPOINTS = {
    "/v1/chat/completions": Endpoint(
        chat_request, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}, CHAT_FIELDS | _EVERY
    ),
    "/v1/completions": Endpoint(completion_request, {"model": "tiny", "prompt": "hi"}, COMPLETION_FIELDS | _EVERY),
}


def rows() -> list[Row]:
    found: list[Row] = []
    path = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            path = line.removeprefix("## POST ")
        row = re.fullmatch(r"\| `([^`]+)` \| `(\{.*?\})` \| (yes|no effect|400) \|.*\|", line)
        if row is not None:
            found.append(Row(path, row[1], json.loads(row[2]), row[3]))
    return found


def ask(row: Row, *, without: bool = False) -> Wanted:
    endpoint = ENDPOINTS[row.path]
    fields = {key: value for key, value in row.example.items() if not without or key != row.field}
    return endpoint.parse({**endpoint.needed, **fields}, CARD)


def of(verdict: str) -> Any:
    chosen = [row for row in rows() if row.verdict == verdict]
    return pytest.mark.parametrize("row", chosen, ids=[f"{row.path} {row.field}" for row in chosen])


@of("yes")
def test_what_is_supported_changes_the_request(row: Row) -> None:
    assert ask(row) != ask(row, without=row.field in row.example) or row.field.startswith("messages[]")


@of("no effect")
def test_what_has_no_effect_is_taken_and_changes_nothing(row: Row) -> None:
    assert msgspec.structs.replace(ask(row), **LABELS) == ask(row, without=True)


@of("no effect")
def test_what_has_no_effect_is_checked_all_the_same(row: Row) -> None:
    with pytest.raises(ApiError) as caught:
        ask(row._replace(example={row.field: {"a": 5}}))
    assert (caught.value.status, str(caught.value.param).split(".")[0]) == (400, row.field)


@of("400")
def test_what_is_refused_is_named(row: Row) -> None:
    with pytest.raises(ApiError) as caught:
        ask(row)
    assert caught.value.status == (404 if row.field == "model" else 400)
    assert str(caught.value.param).startswith(row.field.split("[")[0])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_has_a_row(path: str) -> None:
    assert {row.field for row in rows() if row.path == path and "[" not in row.field} == ENDPOINTS[path].fields


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_field_without_a_row_is_unknown(path: str) -> None:
    with pytest.raises(ApiError) as caught:
        ask(Row(path, "temprature", {"temprature": 1}, "400"))
    assert (caught.value.status, caught.value.code) == (400, "unknown_parameter")


def test_no_row_is_written_so_that_it_is_overlooked() -> None:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(lines) == len(rows())
