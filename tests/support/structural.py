"""An API server's view of a custom resource, for tests without one: defaults, then validation by a structural schema.

After kube-apiserver's apiextensions (1.20 and later): unknown fields are errors here, as with `kubectl`'s strict field
validation; null stands only where it is allowed; defaults apply to fields of objects that are there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
_VALUE_RULES = {"pattern", "minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems", "enum", "format"}
_ALLOWED = _VALUE_RULES | {
    "type",
    "description",
    "default",
    "nullable",
    "properties",
    "additionalProperties",
    "items",
    "required",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
}


def not_structural(schema: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What an API server would not take, or ignore, in a schema."""
    for key in schema.keys() - _ALLOWED:
        yield f"{where}: {key}"
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-int-or-string")
    if "type" not in schema and not open_ended:
        yield f"{where}: no type"
    if "enum" in schema and (schema.get("nullable") or None in schema["enum"]):
        yield f"{where}: null can be no choice"
    if "properties" in schema and "additionalProperties" in schema:
        yield f"{where}: properties and additionalProperties"
    for bound in ("exclusiveMinimum", "exclusiveMaximum"):
        if bound in schema and (schema[bound] is not True or bound.removeprefix("exclusive").lower() not in schema):
            yield f"{where}: {bound} is no boolean beside its bound"
    if "default" in schema and list(errors(schema, with_defaults(schema, schema["default"]))):
        yield f"{where}: the default is not valid"
    for name, part in schema.get("properties", {}).items():
        yield from not_structural(part, f"{where}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from not_structural(schema[key], f"{where}.{key}")


def with_defaults(schema: Mapping[str, Any], value: Any) -> Any:
    """A copy of `value` with the defaults that the server puts in."""
    value = copy.deepcopy(value)
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if value.get(name) is None and not part.get("nullable"):
                value.pop(name, None)
                if "default" in part:
                    value[name] = copy.deepcopy(part["default"])
        parts = schema.get("properties", {})
        others = schema.get("additionalProperties")
        return {
            name: with_defaults(parts.get(name, others), inner) if parts.get(name, others) else inner
            for name, inner in value.items()
        }
    if isinstance(value, list) and "items" in schema:
        return [with_defaults(schema["items"], inner) for inner in value]
    return value


def errors(schema: Mapping[str, Any], value: Any, where: str = "") -> Iterator[str]:
    """What the server says about a value with its defaults; nothing = it is taken."""
    if value is None:
        if not schema.get("nullable"):
            yield f"{where}: null"
        return
    if schema.get("x-kubernetes-int-or-string"):
        if type(value) not in (int, str):
            yield f"{where}: neither integer nor string"
            return
    elif (kind := schema.get("type")) and not _is(value, kind):
        yield f"{where}: no {kind}"
        return
    yield from _value_errors(schema, value, where)
    if isinstance(value, dict):
        yield from _object_errors(schema, value, where)
    if isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            yield from errors(schema["items"], inner, f"{where}[{index}]")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def _object_errors(schema: Mapping[str, Any], value: Mapping[str, Any], where: str) -> Iterator[str]:
    parts = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where}.{name}: required"
    for name, inner in value.items():
        if name in parts:
            yield from errors(parts[name], inner, f"{where}.{name}")
        elif "additionalProperties" in schema:
            yield from errors(schema["additionalProperties"], inner, f"{where}.{name}")
        elif not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{where}.{name}: unknown field"


def _value_errors(schema: Mapping[str, Any], value: Any, where: str) -> Iterator[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: not one of {schema['enum']}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{where}: does not match {schema['pattern']}"
        if len(value) < schema.get("minLength", 0):
            yield f"{where}: too short"
    if isinstance(value, list) and not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{where}: {len(value)} items"
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, most = schema.get("minimum", value), schema.get("maximum", value)
        if value < least or (value == least and schema.get("exclusiveMinimum")):
            yield f"{where}: below {least}"
        if value > most or (value == most and schema.get("exclusiveMaximum")):
            yield f"{where}: above {most}"
