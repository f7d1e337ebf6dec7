"""Tools that a request offers, the two ways in which DeepSeek's models call them, and grammars that make them do so.

R1 (and V3): `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a line end, and the arguments in a block of ```json.
V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS`.
Both end a call with `<｜tool▁call▁end｜>`, and put calls between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from tandem.gateway.api.params import boolean, object_of, text, wrong_type
from tandem.gateway.api.schemas import checked_schema, count_names
from tandem.gateway.errors import bad_value, unsupported

CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"

MAX_TOOLS = 128
MAX_TOOL_NAMES = 5000
"""Properties and enum values of all tools together."""
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class ToolFormat(Enum):
    """How a model writes a call."""

    R1 = "deepseek-r1"
    V31 = "deepseek-v3.1"


class Choice(NamedTuple):
    """`tool_choice`, checked."""

    mode: str
    """"none", "auto", "required" or "function"."""
    name: str = ""
    """Of the function, for "function"."""


def format_of(template: str) -> ToolFormat:
    """The format that a chat template shows calls in."""
    return ToolFormat.V31 if SEP in template and "```json" not in template else ToolFormat.R1


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a request. Raises ApiError."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise wrong_type("tools", "an array", tools)
    if len(tools) > MAX_TOOLS:
        message = f"'tools' has {len(tools)} functions; the most is {MAX_TOOLS}."
        raise bad_value("tools", message, "array_above_max_length")
    found = [_tool(f"tools[{place}]", tool) for place, tool in enumerate(tools)]
    names = sum(count_names(tool["function"].get("parameters")) for tool in found)
    if names > MAX_TOOL_NAMES:
        message = f"The schemas of 'tools' have {names} properties and enum values; the most is {MAX_TOOL_NAMES}."
        raise bad_value("tools", message, "invalid_json_schema")
    return found


def checked_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> Choice:
    """`tool_choice`. Raises ApiError."""
    if choice is None:
        return Choice("auto" if tools else "none")
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            message = f"'tool_choice' is '{choice:.40}'; it must be 'none', 'auto', 'required' or an object."
            raise bad_value("tool_choice", message)
        if choice == "required" and not tools:
            raise bad_value("tool_choice", "'tool_choice' is only allowed when 'tools' are specified.")
        return Choice(choice if tools else "none")
    object_of("tool_choice", choice)
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type", "only 'function' is")
    function = object_of("tool_choice.function", choice.get("function"))
    name = text("tool_choice.function.name", function.get("name"))
    if all(tool["function"]["name"] != name for tool in tools):
        message = f"'tool_choice.function.name' is '{name:.64}', which none of the 'tools' has."
        raise bad_value("tool_choice.function.name", message)
    return Choice("function", name)


def instructions(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    """What to tell a model of its tools whose own template has no place for them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    call = opening("NAME", form) + "ARGUMENTS" + closing(form)
    return (
        f"## Tools\nThese functions can be called:\n{listed}\n\nTo call some, answer with\n"
        f"{CALLS_BEGIN}{call}{CALLS_END}\nwhere ARGUMENTS is a JSON object."
    )


def opening(name: str, form: ToolFormat) -> str:
    """What stands before a call's arguments."""
    if form is ToolFormat.R1:
        return f"{CALL_BEGIN}function{SEP}{name}\n```json\n"
    return f"{CALL_BEGIN}{name}{SEP}"


def closing(form: ToolFormat) -> str:
    """What stands after them."""
    return f"\n```{CALL_END}" if form is ToolFormat.R1 else CALL_END


def calls_grammar(
    tools: Sequence[Mapping[str, Any]], choice: Choice, form: ToolFormat, *, parallel: bool
) -> dict[str, Any] | None:
    """XGrammar's structural-tag format of an answer with these tools; None where anything goes.

    "required" and a named function: nothing but calls. "auto": free text, but once a call begins it has the right form
    and, for functions with `strict`, the right arguments.
    """
    strict = any(tool["function"].get("strict") for tool in tools)
    if choice.mode == "none" or (choice.mode == "auto" and not strict):
        return None
    forced = choice.mode != "auto"
    chosen = [
        tool["function"] for tool in tools if choice.mode != "function" or tool["function"]["name"] == choice.name
    ]
    tags = [
        {
            "type": "tag",
            "begin": opening(function["name"], form),
            "content": {
                "type": "json_schema",
                "json_schema": function.get("parameters") or {"type": "object"}
                if forced or function.get("strict")
                else {"type": "object"},
            },
            "end": closing(form),
        }
        for function in chosen
    ]
    calls = {
        "type": "tag",
        "begin": CALLS_BEGIN,
        "content": {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": "\n" if form is ToolFormat.R1 else "",
            "at_least_one": True,
            "stop_after_first": not parallel or choice.mode == "function",
        },
        "end": CALLS_END,
    }
    if forced:
        return calls
    return {"type": "triggered_tags", "triggers": [CALLS_BEGIN], "tags": [calls], "stop_after_first": True}


def _tool(where: str, tool: Any) -> dict[str, Any]:
    object_of(where, tool)
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type", f"only 'function' is, not {tool.get('type')!r:.40}")
    function = object_of(f"{where}.function", tool.get("function"))
    name = text(f"{where}.function.name", function.get("name"))
    if not NAME.fullmatch(name):
        param = f"{where}.function.name"
        raise bad_value(param, f"'{param}' is {name!r:.80}; it must have 1 to 64 of a-z, A-Z, 0-9, _ and -.")
    if function.get("description") is not None:
        text(f"{where}.function.description", function["description"])
    if function.get("strict") is not None:
        boolean(f"{where}.function.strict", function["strict"])
    if function.get("parameters") is not None:
        checked_schema(f"{where}.function.parameters", function["parameters"], kind="object")
    kept = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": kept}
