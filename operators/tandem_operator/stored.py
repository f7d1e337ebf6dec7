"""Specs that the operator itself has written, read as they were stored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tandem_operator.names import Object

_Spec = TypeVar("_Spec", bound=BaseModel)
_UNKNOWN = "extra_forbidden"
"""pydantic's type of the error that a field has no name in the class."""
log = logging.getLogger(__name__)


def stored_spec(kind: type[_Spec], spec: Object) -> _Spec:
    """A spec as `kind`, without fields that it does not know.

    After an operator has gone back to an older version the CRDs, and what was stored meanwhile, are the newer one's.
    Groups must still drain then. Raises ValidationError for whatever else is wrong.
    """
    try:
        return kind.model_validate(spec)
    except ValidationError as error:
        places = [one["loc"] for one in error.errors(include_input=False) if one["type"] == _UNKNOWN]
        if not places:
            raise
    names = sorted({".".join(map(str, place)) for place in places})
    log.debug("a stored %s has fields that this version does not know: %s", kind.__name__, ", ".join(names))
    known: Any = deepcopy(spec)
    for place in places:
        _remove(known, place)
    return kind.model_validate(known)


def _remove(spec: Any, place: Sequence[str | int]) -> None:
    for step in place[:-1]:
        spec = spec[step]
    del spec[place[-1]]
