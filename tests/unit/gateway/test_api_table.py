"""The tables in docs/api.md are true: every row is sent to the parser, and no field is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from gateway_model import CARD, tokenizer
from gateway_world import world

from tandem.gateway.api import anthropic_api, openapi, responses_api, token_api
from tandem.gateway.api.params import HARMLESS, REFUSED, SAMPLING
from tandem.gateway.api.requests import CHAT_FIELDS, COMPLETION_FIELDS, Wanted, chat_request, completion_request
from tandem.gateway.errors import ApiError

DOCUMENT = Path(__file__).parents[3] / "docs" / "api.md"
LABELS = {"user": "", "metadata": {}}
"""What `Wanted` keeps of a request for others to read; it is no part of the answer's text."""
USER = [{"role": "user", "content": "hi"}]


class Endpoint(NamedTuple):
    parse: Callable[[Mapping[str, Any]], object]
    """What becomes of a body. Raises ApiError."""
    needed: dict[str, Any]
    fields: frozenset[str]
    labels: dict[str, Any] = LABELS


class Row(NamedTuple):
    path: str
    field: str
    example: dict[str, Any]
    verdict: str

    @property
    def top(self) -> str:
        """The field of the body that this is of: "tools" of "tools[].type"."""
        return re.split(r"[.\[]", self.field)[0]


_EVERY = frozenset({*SAMPLING, *HARMLESS, *REFUSED})
_RESPONSES = frozenset(
    {
        *responses_api._OWN,
        *responses_api._PASSED,
        *responses_api._HARMLESS,
        *responses_api._REFUSED,
        *SAMPLING,
    }
)
ENDPOINTS = {
    "/v1/chat/completions": Endpoint(
        lambda body: chat_request(body, CARD), {"model": "tiny", "messages": USER}, CHAT_FIELDS | _EVERY
    ),
    "/v1/completions": Endpoint(
        lambda body: completion_request(body, CARD), {"model": "tiny", "prompt": "hi"}, COMPLETION_FIELDS | _EVERY
    ),
    "/v1/responses": Endpoint(
        lambda body: responses_api.responses_request(body, CARD),
        {"model": "tiny", "input": "hi"},
        _RESPONSES,
        # The answer repeats what was asked for.
        {**LABELS, "asked": {}},
    ),
    "/v1/messages": Endpoint(
        lambda body: anthropic_api.messages_request(body, CARD),
        {"model": "tiny", "messages": USER, "max_tokens": 100},
        anthropic_api._FIELDS,
        # Its answers do not tell it.
        {**LABELS, "service_tier": None},
    ),
    "/v1/messages/count_tokens": Endpoint(
        lambda body: anthropic_api.count_tokens(body, CARD, tokenizer()),
        {"model": "tiny", "messages": USER},
        anthropic_api._COUNTED,
    ),
    "/tokenize": Endpoint(
        lambda body: token_api.tokenize(body, CARD, tokenizer()),
        {"prompt": "hi"},
        token_api._TOKENIZE | token_api._CHAT,
    ),
    "/detokenize": Endpoint(
        lambda body: token_api.detokenize(body, CARD, tokenizer()), {"tokens": [5]}, token_api._DETOKENIZE
    ),
}


def lines() -> list[str]:
    return DOCUMENT.read_text(encoding="utf-8").splitlines()


def rows() -> list[Row]:
    found: list[Row] = []
    path = ""
    for line in lines():
        if line.startswith("## "):
            path = line.removeprefix("## POST ")
        row = re.fullmatch(r"\| `([^`]+)` \| `(\{.*?\})` \| (yes|no effect|400) \|.*\|", line)
        if row is not None:
            found.append(Row(path, row[1], json.loads(row[2]), row[3]))
    return found


def pages() -> dict[str, str]:
    """Who may see each page."""
    return dict(re.findall(r"^\| GET `([^`]+)` \| (key|everyone) \| .+ \|$", "\n".join(lines()), re.MULTILINE))


def ask(row: Row, *, without: bool = False) -> object:
    """What becomes of the row's example, with all that changes no answer left out of it."""
    endpoint = ENDPOINTS[row.path]
    fields = {key: value for key, value in row.example.items() if not without or key != row.top}
    # A conversation is instead of a prompt.
    needed = {key: value for key, value in endpoint.needed.items() if key != "prompt" or not fields.get("messages")}
    found = endpoint.parse({**needed, **fields})
    return msgspec.structs.replace(found, **endpoint.labels) if isinstance(found, Wanted) else found


def of(verdict: str) -> Any:
    chosen = [row for row in rows() if row.verdict == verdict]
    return pytest.mark.parametrize("row", chosen, ids=[f"{row.path} {row.field}" for row in chosen])


@of("yes")
def test_what_is_supported_changes_the_request(row: Row) -> None:
    assert ask(row) != ask(row, without=True)


@of("no effect")
def test_what_has_no_effect_is_taken_and_changes_nothing(row: Row) -> None:
    assert ask(row) == ask(row, without=True)


@of("no effect")
def test_what_has_no_effect_is_checked_all_the_same(row: Row) -> None:
    with pytest.raises(ApiError) as caught:
        ask(row._replace(example={row.field: [5]}))
    assert (caught.value.status, caught.value.param) == (400, row.field)


@of("400")
def test_what_is_refused_is_named(row: Row) -> None:
    with pytest.raises(ApiError) as caught:
        ask(row)
    assert caught.value.status == (404 if row.field == "model" else 400)
    assert str(caught.value.param).startswith(row.field.split("[")[0])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_null_is_the_same_as_leaving_a_field_out(path: str) -> None:
    endpoint = ENDPOINTS[path]
    for field in endpoint.fields - endpoint.needed.keys():
        row = Row(path, field, {field: None}, "")
        assert ask(row) == ask(row, without=True), field


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_has_a_row(path: str) -> None:
    assert {row.field for row in rows() if row.path == path and row.field == row.top} == ENDPOINTS[path].fields


@pytest.mark.parametrize("path", ENDPOINTS)
def test_no_field_has_two_rows(path: str) -> None:
    fields = [row.field for row in rows() if row.path == path]
    assert len(fields) == len(set(fields))


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_field_without_a_row_is_unknown(path: str) -> None:
    with pytest.raises(ApiError) as caught:
        ask(Row(path, "temprature", {"temprature": 1}, "400"))
    assert (caught.value.status, caught.value.code) == (400, "unknown_parameter")


def test_no_row_is_written_so_that_it_is_overlooked() -> None:
    assert len([line for line in lines() if line.startswith("| `")]) == len(rows())
    assert len([line for line in lines() if line.startswith("| GET")]) == len(pages())


def test_every_path_of_the_description_has_its_section_or_row() -> None:
    paths = json.loads(openapi.page(CARD, "1"))["paths"]
    described = {(method, path.replace("{model}", "tiny")) for path, methods in paths.items() for method in methods}
    assert described == {("post", path) for path in ENDPOINTS} | {("get", path) for path in pages()}


@pytest.mark.parametrize(("path", "who"), pages().items())
async def test_a_page_is_for_whom_its_row_says(path: str, who: str) -> None:
    async with world("p0", "d0", fleet={"tenants": {"acme": {}}}, auth="required") as w:
        assert (await w.get(path)).status == (200 if who == "everyone" else 401)
        assert (await w.call(path, headers=await w.key("acme")).run()).status == 200
