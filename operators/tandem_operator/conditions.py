"""Conditions by Kubernetes' conventions: a condition's time changes only with its status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tandem_operator.names import Object


@dataclass(frozen=True)
class Told:
    """What is to be told of an object: `reason` is one word for programs, `message` one sentence for people."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""


def told(kind: str, holds: bool | None, reason: str, message: str = "") -> Told:
    """A condition that holds, does not hold, or of which nobody knows (None)."""
    status: Literal["True", "False", "Unknown"] = "Unknown" if holds is None else "True" if holds else "False"
    return Told(kind, status, reason, message)


def conditions(before: Object, wanted: Iterable[Told], now: str) -> list[dict[str, Any]]:
    """The conditions of an object as its status should have them. `now`: RFC 3339. Others' conditions stay."""
    known = {entry["type"]: entry for entry in (before.get("status") or {}).get("conditions") or ()}
    generation = before["metadata"].get("generation", 0)
    fresh = {}
    for entry in wanted:
        old = known.get(entry.type)
        fresh[entry.type] = {
            "type": entry.type,
            "status": entry.status,
            "reason": entry.reason,
            "message": entry.message,
            "lastTransitionTime": old["lastTransitionTime"] if old and old["status"] == entry.status else now,
            "observedGeneration": generation,
        }
    return [fresh.pop(kind, entry) for kind, entry in known.items()] + list(fresh.values())


def holds(obj: Object, kind: str) -> bool:
    """Whether an object's condition of that type is True."""
    entries: Sequence[Object] = (obj.get("status") or {}).get("conditions") or ()
    return any(entry["type"] == kind and entry["status"] == "True" for entry in entries)
