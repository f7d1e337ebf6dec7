"""What the translators of other APIs into ours have in common: the chat body's names turned back into the client's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tandem.gateway.errors import ApiError


class Translated(NamedTuple):
    """A request of another API as a chat request."""

    body: dict[str, Any]
    """The same request as `POST /v1/chat/completions` takes it."""
    names: dict[str, str]
    """Field of the chat body → the field of the client's request that it comes from."""


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error of a chat request, told in the names that the client used.

    The longest field in `names` that the error's own begins with decides; what follows it is kept
    ("tools[0].function.name" and {"tools[0].function": "tools.0"} are "tools.0.name").
    """
    param = error.param
    if param is None:
        return error
    fields = [field for field in names if param == field or param.startswith((field + ".", field + "["))]
    if not fields:
        return error
    field = max(fields, key=len)
    return ApiError(
        error.status,
        error.message.replace(f"'{field}", f"'{names[field]}"),
        type=error.type,
        param=names[field] + param[len(field) :],
        code=error.code,
        retry_after=error.retry_after,
    )


def wanted_fields(wanted: object) -> dict[str, Any]:
    """The fields of a checked request, to make another of a subclass; values are shared, not copied."""
    names: tuple[str, ...] = getattr(wanted, "__struct_fields__", ())
    return {name: getattr(wanted, name) for name in names}
