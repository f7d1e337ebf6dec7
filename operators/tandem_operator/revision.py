"""Names for what groups are made of: which are alike (revision), and which understand each other's KV (format)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from tandem_operator.api.pool import EngineTemplate

KV_FLAGS = ("--kv-cache-dtype", "--page-size", "--dtype")
"""SGLang's flags that change what a KV page is."""


def revision_of(template: EngineTemplate, nodes: int, gpus_per_node: int) -> str:
    """10 hex digits; groups of equal template and shape have the same.

    What is at its default is left out, as if nobody had written it, so a new operator whose schema has a further field
    does not roll every fleet. The reverse: if a default changes, groups that exist keep the old one.
    """
    made_of = template.model_dump(mode="json", exclude_defaults=True)
    return _digest({"template": made_of, "nodes": nodes, "gpus_per_node": gpus_per_node})


def kv_format_of(template: EngineTemplate) -> str:
    """What prefill and decode groups must have in common: `kv_format` if somebody has said it.

    Else it is made of image, device and KV flags. So every other image counts as another format, until somebody who
    knows better gives both the same `kv_format`: wrong KV would be worse than a roll of both pools.
    """
    if template.kv_format:
        return template.kv_format
    flags = {flag: value for flag in KV_FLAGS if (value := _last_value(template.args, flag)) is not None}
    return _digest({"image": template.image.name, "device": template.device, "flags": flags})


def _last_value(args: Sequence[str], flag: str) -> str | None:
    """As `--flag value` or `--flag=value`; SGLang takes the last one."""
    value = None
    for index, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            value = arg.partition("=")[2]
        elif arg == flag and index + 1 < len(args):
            value = args[index + 1]
    return value


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]
