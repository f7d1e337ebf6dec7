"""Structural schemas: the part of OpenAPI v3 that a CustomResourceDefinition may use.

https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/ says which. A keyword
that is not known here is refused, so that no rule of a class gets lost without a word; those that cannot be said
(rules between fields, patterns of keys) are checked by the operator when it reads a resource.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tandem_operator.cel import RULES
from tandem_operator.json_schema import CLASS, whole_schema

_AS_THEY_ARE = (
    "type",
    "description",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)
_DROPPED = ("additionalProperties", "patternProperties", "propertyNames", "default", "format", "required", CLASS)
"""Said in another way below, or implied: a structural schema takes no unknown fields."""


class SchemaError(ValueError):
    """A class says something that no structural schema can."""


def structural_schema(model: type[BaseModel], *, defaults: bool = True, cel: bool = False) -> dict[str, Any]:
    """The structural schema of `model`, by alias.

    With `defaults` a field that is left out of an object that is there gets its default from the server. `cel` adds
    rules between fields, which servers before Kubernetes 1.25 do not know. Raises SchemaError.
    """
    return _converted(whole_schema(model), model.__name__, defaults=defaults, cel=cel)


def _converted(node: Mapping[str, Any], where: str, *, defaults: bool, cel: bool) -> dict[str, Any]:
    if "anyOf" in node:
        node = _one_of_many(node, where)
    if "const" in node:
        node = {key: value for key, value in node.items() if key != "const"} | {"enum": [node["const"]]}
    result: dict[str, Any] = {}
    for key, value in node.items():
        if key in _AS_THEY_ARE:
            result[key] = value
        elif key == "nullable":
            result[key] = True
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            result[key.removeprefix("exclusive").lower()] = value
            result[key] = True
        elif key == "properties":
            result[key] = {
                name: _converted(part, f"{where}.{name}", defaults=defaults, cel=cel) for name, part in value.items()
            }
        elif key == "items":
            result[key] = _converted(value, f"{where}[]", defaults=defaults, cel=cel)
        elif key not in _DROPPED:
            raise SchemaError(f"{where}: a structural schema cannot say {key}; write the field in another way")
    if "enum" in result:
        # Servers hold null to the enumeration too, and clients take none in one. Where a field is not nullable, null
        # is dropped, which is the same here.
        result.pop("nullable", None)
    if node.get("required"):
        result["required"] = node["required"]
    if node.get("format") == "date-time":
        result["format"] = "date-time"
    if node.get("type") == "object" and "properties" not in node:
        result |= _map(node, where, defaults=defaults, cel=cel)
    # An empty default says nothing, and would stand in every resource.
    if defaults and node.get("default") not in (None, "", [], {}):
        result["default"] = _default(node)
    if cel and (rules := RULES.get(node.get(CLASS, ""))):
        result["x-kubernetes-validations"] = [rule.as_json() for rule in rules]
    return result


def _one_of_many(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`X | None` is a nullable X, and a Decimal (number, or text of one) a number: all else cannot be said."""
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    choices = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
    nullable = {"nullable": True} if len(choices) < len(node["anyOf"]) else {}
    numbers = [choice for choice in choices if choice.get("type") == "number"]
    if len(choices) == 2 and numbers and any(choice.get("type") == "string" for choice in choices):
        choices = numbers
    if len(choices) != 1:
        raise SchemaError(f"{where}: may be of several types, which a structural schema cannot say")
    inner = choices[0]
    if "anyOf" in inner:
        inner = _one_of_many(inner, where)
    return {**inner, **rest, **nullable}


def _map(node: Mapping[str, Any], where: str, *, defaults: bool, cel: bool) -> dict[str, Any]:
    names = node.get("propertyNames", {}).get("enum")
    patterns = node.get("patternProperties")
    value = next(iter(patterns.values())) if patterns else node.get("additionalProperties", True)
    if not isinstance(value, Mapping):
        return {"x-kubernetes-preserve-unknown-fields": True}
    schema = _converted(value, f"{where}.*", defaults=defaults, cel=cel)
    return {"properties": dict.fromkeys(names, schema)} if names else {"additionalProperties": schema}


def _default(node: Mapping[str, Any]) -> Any:
    # A Decimal's default is text in JSON schema.
    return float(node["default"]) if node.get("type") == "number" else node["default"]
