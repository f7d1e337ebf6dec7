"""Tools of a request: what is accepted, and how an answer is made to use them."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.gateway.api.tools import Choice, ToolFormat, calls_grammar, checked_choice, checked_tools, format_of
from tandem.gateway.errors import ApiError
from tandem.models.tokenizer import chat_template

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


def grammar(choice: Choice, *tools: dict[str, Any], form: ToolFormat = ToolFormat.R1, parallel: bool = True) -> Any:
    return calls_grammar(tools or [tool()], choice, form, parallel=parallel)


def test_tools_are_kept_as_they_are() -> None:
    assert checked_tools([tool(description="d", strict=None)]) == [tool(description="d")]
    assert checked_tools(None) == []


@pytest.mark.parametrize(
    ("tools", "param", "code"),
    [
        ({}, "tools", "invalid_type"),
        ([tool(str(n)) for n in range(129)], "tools", "array_above_max_length"),
        (["f"], "tools[0]", "invalid_type"),
        ([{"type": "retrieval"}], "tools[0].type", "unsupported_parameter"),
        ([{"type": "function"}], "tools[0].function", "invalid_type"),
        ([tool("a b")], "tools[0].function.name", "invalid_value"),
        ([tool("x" * 65)], "tools[0].function.name", "invalid_value"),
        ([tool(), tool(description=5)], "tools[1].function.description", "invalid_type"),
        ([tool(strict="yes")], "tools[0].function.strict", "invalid_type"),
        ([tool(parameters=[])], "tools[0].function.parameters", "invalid_type"),
        ([tool(parameters={"type": "string"})], "tools[0].function.parameters", "invalid_json_schema"),
        ([tool(parameters={"properties": 5})], "tools[0].function.parameters", "invalid_json_schema"),
        ([tool(parameters={"$schema": {}})], "tools[0].function.parameters", "invalid_json_schema"),
    ],
)
def test_other_tools_are_refused_by_name(tools: Any, param: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        checked_tools(tools)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_a_schema_that_is_nested_too_deep_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"properties": {"a": deep}}
    with pytest.raises(ApiError, match="nested deeper"):
        checked_tools([tool(parameters=deep)])


def test_schemas_that_the_engine_would_compile_for_ever_are_refused() -> None:
    many = {"properties": {"a": {"enum": [str(n) for n in range(1000)]}}}
    with pytest.raises(ApiError, match="1001 properties and enum values"):
        checked_tools([tool(parameters=many)])
    many["properties"]["a"]["enum"].pop()
    with pytest.raises(ApiError, match="6000 properties and enum values"):
        checked_tools([tool(str(n), parameters=many) for n in range(6)])


@pytest.mark.parametrize(
    ("choice", "tools", "expected"),
    [
        (None, [tool()], Choice("auto")),
        (None, [], Choice("none")),
        ("auto", [], Choice("none")),
        ("none", [tool()], Choice("none")),
        ("required", [tool()], Choice("required")),
        ({"type": "function", "function": {"name": "weather"}}, [tool()], Choice("function", "weather")),
    ],
)
def test_a_tool_choice_is_understood(choice: Any, tools: Any, expected: Choice) -> None:
    assert checked_choice(choice, tools) == expected


@pytest.mark.parametrize(
    ("choice", "tools", "param"),
    [
        ("required", [], "tool_choice"),
        ("any", [tool()], "tool_choice"),
        (5, [tool()], "tool_choice"),
        ({"type": "custom"}, [tool()], "tool_choice.type"),
        ({"type": "function"}, [tool()], "tool_choice.function"),
        ({"type": "function", "function": {"name": "news"}}, [tool()], "tool_choice.function.name"),
    ],
)
def test_another_tool_choice_is_refused(choice: Any, tools: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        checked_choice(choice, tools)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_an_answer_is_left_alone_unless_a_call_must_hold() -> None:
    assert grammar(Choice("none")) is None
    assert grammar(Choice("auto")) is None


def test_a_required_call_is_one_of_the_tools() -> None:
    form = grammar(Choice("required"), tool("a"), tool("b"))
    assert (form["begin"], form["end"]) == ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    content = form["content"]
    assert (content["at_least_one"], content["stop_after_first"]) == (True, False)
    assert [tag["begin"] for tag in content["tags"]] == [
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>a\n```json\n",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>b\n```json\n",
    ]
    assert content["tags"][0]["content"] == {"type": "json_schema", "json_schema": SCHEMA}


def test_a_named_function_is_called_once() -> None:
    content = grammar(Choice("function", "b"), tool("a"), tool("b"), form=ToolFormat.V31)["content"]
    assert [tag["begin"] for tag in content["tags"]] == ["<｜tool▁call▁begin｜>b<｜tool▁sep｜>"]
    assert content["stop_after_first"]


def test_without_parallel_calls_there_is_one() -> None:
    assert grammar(Choice("required"), parallel=False)["content"]["stop_after_first"]


def test_a_strict_function_holds_its_schema_once_it_is_called() -> None:
    form = grammar(Choice("auto"), tool("a", strict=True), tool("b"))
    assert form["type"] == "triggered_tags"
    schemas = [tag["content"]["json_schema"] for tag in form["tags"][0]["content"]["tags"]]
    assert schemas == [SCHEMA, {"type": "object"}]


def test_the_template_says_how_the_model_calls() -> None:
    assert format_of(chat_template()) is ToolFormat.R1
    assert format_of("{{ '<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments }}") is ToolFormat.V31
    assert format_of("no tools here") is ToolFormat.R1
