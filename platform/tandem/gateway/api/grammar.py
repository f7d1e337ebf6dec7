"""What an answer must look like, as a grammar for the engine.

SGLang's grammar backend, XGrammar, compiles a *structural tag*: a tree of formats that describes the answer from its
first token. So the reasoning is part of it, and a budget for it as well: free text of at most N tokens, then
`</think>`, then the content. That needs no flag of the engine, and prefill and decode follow it alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from tandem.gateway.api.params import flag, object_of, text
from tandem.gateway.api.schemas import checked_schema
from tandem.gateway.api.tools import NAME
from tandem.gateway.errors import bad_value, unsupported
from tandem.gateway.text.reasoning import END

MAX_GRAMMAR = 64 * 1024

Format = dict[str, Any]

ANY_TEXT: Format = {"type": "any_text"}
# R1 puts one empty line between its reasoning and the answer.
_LINE_ENDS: Format = {"type": "regex", "pattern": r"\n{0,2}"}


def response_grammar(body: Mapping[str, Any]) -> Format | None:
    """The format of `response_format`, `regex` or `ebnf`; None where any text will do. Raises ApiError."""
    found: dict[str, Format] = {}
    if body.get("response_format") is not None:
        form = _response_format(object_of("response_format", body["response_format"]))
        if form is not None:
            found["response_format"] = form
    for field, kind, key in (("regex", "regex", "pattern"), ("ebnf", "grammar", "grammar")):
        if body.get(field) is not None:
            found[field] = {"type": kind, key: _bounded(field, body[field])}
    if len(found) > 1:
        fields = " and ".join(f"'{field}'" for field in found)
        raise bad_value(next(iter(found)), f"{fields} exclude each other: give one of them.")
    return next(iter(found.values()), None)


def structural_tag(content: Format | None, *, thinking: bool, budget: int | None) -> str | None:
    """SGLang's `structural_tag`; None if nothing is to be held.

    Args:
        content: what must follow the reasoning; None = any text.
        thinking: the answer begins as reasoning.
        budget: tokens of reasoning at most; the marker that ends it is one more.
    """
    if content is None and (budget is None or not thinking):
        return None
    elements: list[Format] = []
    if thinking:
        # The marker as text, not as a token: what ends the reasoning here then ends it for our parser, too.
        free = ANY_TEXT if budget is None else {**ANY_TEXT, "max_tokens": budget}
        elements.append({"type": "tag", "begin": "", "content": free, "end": END})
        if content is not None:
            elements.append(_LINE_ENDS)
    elements.append(content or ANY_TEXT)
    form = elements[0] if len(elements) == 1 else {"type": "sequence", "elements": elements}
    return msgspec.json.encode({"type": "structural_tag", "format": form}).decode()


def _only(where: str, found: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ApiError if there is a field that nobody knows."""
    for field in found:
        if field not in known:
            param = f"{where}.{field:.80}"
            raise bad_value(param, f"Unknown parameter: '{param}'.", "unknown_parameter")


def _response_format(wanted: Mapping[str, Any]) -> Format | None:
    _only("response_format", wanted, ("type", "json_schema"))
    kind = text("response_format.type", wanted.get("type"))
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if kind != "json_schema":
        raise unsupported("response_format.type", "only 'text', 'json_object' and 'json_schema' are")
    param = "response_format.json_schema"
    given = object_of(param, wanted.get("json_schema"))
    _only(param, given, ("name", "description", "schema", "strict"))
    name = text(f"{param}.name", given.get("name"))
    if not NAME.fullmatch(name):
        raise bad_value(f"{param}.name", f"'{param}.name' must have 1 to 64 of a-z, A-Z, 0-9, _ and -.")
    if given.get("description") is not None:
        text(f"{param}.description", given["description"])
    flag(given, "strict", where=f"{param}.")
    schema = given.get("schema")
    schema = {"type": "object"} if schema is None else checked_schema(f"{param}.schema", schema)
    return {"type": "json_schema", "json_schema": schema}


def _bounded(field: str, value: Any) -> str:
    if not text(field, value):
        raise bad_value(field, f"'{field}' is empty.")
    if len(value) > MAX_GRAMMAR:
        raise bad_value(field, f"'{field}' is longer than {MAX_GRAMMAR} characters.", "string_above_max_length")
    return str(value)
