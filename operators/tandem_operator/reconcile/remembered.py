"""What rollouts remember, and the templates of the revisions that may be needed again: one ConfigMap of a fleet."""

from __future__ import annotations

import msgspec

from tandem.core.rollout_types import Memory
from tandem.core.types import Role
from tandem_operator.names import CONFIG_MAP, Key, Object
from tandem_operator.reconcile.context import Context


class Revision(msgspec.Struct, frozen=True):
    """What groups of a revision are made of."""

    kv_format: str
    spec: Object
    """A PoolSpec of that time."""


class Remembered(msgspec.Struct, frozen=True):
    """What the ConfigMap holds."""

    memories: dict[Role, Memory] = {}
    revisions: dict[str, Revision] = {}


def memory_key(key: Key) -> Key:
    """The ConfigMap of a fleet."""
    return Key(CONFIG_MAP, key.namespace, f"{key.name}-rollout")


def remembered(ctx: Context, key: Key) -> Remembered:
    """What it holds."""
    found = ctx.cache.get(memory_key(key))
    text = ((found or {}).get("data") or {}).get("rollout.json")
    if text is None:
        return Remembered()
    try:
        return msgspec.json.decode(text, type=Remembered)
    except msgspec.DecodeError:  # somebody has edited it: without it a pool still does the right thing
        return Remembered()
