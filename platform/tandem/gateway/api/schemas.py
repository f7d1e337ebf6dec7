"""JSON schemas that a request brings: checked before an engine compiles them."""

from __future__ import annotations

from typing import Any

import jsonschema.exceptions
import jsonschema.validators
import msgspec

from tandem.gateway.api.params import object_of
from tandem.gateway.errors import bad_value

MAX_BYTES = 128 * 1024
MAX_NAMES = 1000
"""Properties and values of enumerations, all together. The engine compiles a thousand in a fraction of a second, but
twenty thousand in longer than anyone waits."""
MAX_DEPTH = 64
"""Levels of nesting; the engine's grammar compiler recurses."""

_CODE = "invalid_json_schema"


def checked_schema(param: str, schema: Any, *, kind: str = "") -> dict[str, Any]:
    """A schema as the engine may have it; `kind` is the type that its values must have. Raises ApiError."""
    found = object_of(param, schema)
    if _deeper_than(found, MAX_DEPTH):
        raise bad_value(param, f"'{param}' is nested deeper than {MAX_DEPTH} levels.", _CODE)
    if len(msgspec.json.encode(found)) > MAX_BYTES:
        raise bad_value(param, f"'{param}' is larger than {MAX_BYTES} bytes.", _CODE)
    if (names := count_names(found)) > MAX_NAMES:
        message = f"'{param}' has {names} properties and enum values; the most is {MAX_NAMES}."
        raise bad_value(param, message, _CODE)
    if kind and found.get("type", kind) != kind:
        raise bad_value(param, f"'{param}' must have type '{kind}', not {found['type']!r:.40}.", _CODE)
    if not isinstance(found.get("$schema", ""), str):
        raise bad_value(param, f"'{param}.$schema' must be a string.", _CODE)
    try:
        validator = jsonschema.validators.validator_for(found, default=jsonschema.validators.Draft202012Validator)
        validator.check_schema(found)
    except jsonschema.exceptions.SchemaError as error:
        place = ".".join(str(step) for step in error.absolute_path)
        raise bad_value(
            param, f"'{param}' is no JSON schema: {error.message:.200} (at '{place:.100}').", _CODE
        ) from error
    return found


def _deeper_than(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def count_names(schema: Any) -> int:
    """Properties and enum values that a schema has, at any depth."""
    found, left = 0, [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found += sum(len(one[key]) for key in ("enum", "properties") if isinstance(one.get(key), list | dict))
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found
