"""The JSON schema of a pydantic class, in one piece: without references, under the names that Kubernetes uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tandem.config import kubernetes_name

CLASS = "x-class"
"""Names the class that an object's schema was made of; for what is added to single classes."""

_KEYWORDS_OF_SCHEMAS = ("items", "additionalProperties")
_LISTS_OF_SCHEMAS = ("anyOf", "allOf", "oneOf")
_MAPS_OF_SCHEMAS = ("properties", "patternProperties")
_FIELD = re.compile(r"\b[a-z]+(?:_[a-z0-9]+)+\b")


def whole_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema (draft 7 and later) of what `model` reads, by alias; what it refers to stands where it is used."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs", {})
    return {CLASS: model.__name__, **_inlined(schema, definitions, _field_names(model, set()))}


def _field_names(model: type[BaseModel], seen: set[type[BaseModel]]) -> frozenset[str]:
    """Python names of all fields in it that have another name in Kubernetes."""
    if model in seen:
        return frozenset()
    seen.add(model)
    names = set()
    for name, field in model.model_fields.items():
        names.add(name)
        for part in _models(field.annotation):
            names |= _field_names(part, seen)
    return frozenset(name for name in names if kubernetes_name(name) != name)


def _models(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in getattr(annotation, "__args__", ()) for model in _models(part)}


def _inlined(node: Mapping[str, Any], definitions: Mapping[str, Any], fields: frozenset[str]) -> dict[str, Any]:
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[-1]
        node = {CLASS: name, **definitions[name], **{key: value for key, value in node.items() if key != "$ref"}}
    result: dict[str, Any] = {}
    for key, value in node.items():
        if key == "title" and isinstance(value, str):
            continue
        if key in _KEYWORDS_OF_SCHEMAS and isinstance(value, Mapping):
            result[key] = _inlined(value, definitions, fields)
        elif key in _LISTS_OF_SCHEMAS:
            result[key] = [_inlined(part, definitions, fields) for part in value]
        elif key in _MAPS_OF_SCHEMAS:
            result[key] = {name: _inlined(part, definitions, fields) for name, part in value.items()}
        elif key == "description":
            result[key] = _renamed(value, fields)
        else:
            result[key] = value
    return result


def _renamed(text: str, fields: frozenset[str]) -> str:
    """Descriptions name fields as Python does; readers of a resource know them by their other names."""
    return _FIELD.sub(lambda match: kubernetes_name(match[0]) if match[0] in fields else match[0], text)
