"""Whether an object on the server is already what was rendered: the rendered one is part of it.

The server adds defaults, and others (autoscalers, admission) add fields; only what the operator says is compared.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_KEYS = {"volumeMounts": "mountPath", "ownerReferences": "uid"}
"""Field by which the entries of a list are told apart, where it is not `name`."""
_SHARED = ("ownerReferences", "finalizers")
"""Lists to which others may add entries of their own."""
_AMOUNTS = {"limits", "requests", "sizeLimit"}
_UNITS = {
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|[kMGTPE]|[KMGTPE]i)?")


def covers(live: Any, rendered: Any, path: tuple[str, ...] = ()) -> bool:
    """Whether everything that was rendered stands in the live object."""
    if isinstance(rendered, dict):
        if live is None:
            return not rendered
        return isinstance(live, dict) and all(
            covers(live.get(name), value, (*path, name)) for name, value in rendered.items()
        )
    if isinstance(rendered, list):
        return _lists(live or [], rendered, path)
    if rendered == live or (rendered in ("", 0, False) and live is None):
        return True
    if set(path[-2:]) & _AMOUNTS:
        return _amount(rendered) == _amount(live) is not None
    return False


def _lists(live: Any, rendered: list[Any], path: tuple[str, ...]) -> bool:
    if not isinstance(live, list) or (len(live) != len(rendered) and path[-1] not in _SHARED):
        return False
    name = _KEYS.get(path[-1], "name")
    if rendered and all(isinstance(entry, dict) and name in entry for entry in rendered):
        known = {entry.get(name): entry for entry in live if isinstance(entry, dict)}
        return all(covers(known.get(entry[name]), entry, path) for entry in rendered)
    if path[-1] in _SHARED:
        return all(entry in live for entry in rendered)
    return all(covers(there, entry, path) for there, entry in zip(live, rendered, strict=True))


def _amount(value: Any) -> Decimal | None:
    found = _QUANTITY.fullmatch(str(value))
    return Decimal(found[1]) * _UNITS.get(found[2] or "", Decimal(1)) if found else None
