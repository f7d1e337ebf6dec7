"""Names for what groups are made of: which are alike (revision), and which work together (KV format and weights)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from tandem.core.declared import version_of
from tandem.core.group_record import Weights
from tandem_operator.api.fleet import Model
from tandem_operator.api.pool import EngineTemplate

KV_FLAGS = ("--kv-cache-dtype", "--page-size", "--dtype")
"""SGLang's flags that change what a KV page is."""
UNNAMED = str(Model.model_fields["version"].default)
"""The version of a Fleet that names none. (Its default is written into every Fleet by the server.)"""


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


def weights_version(path: str | None, version: str | None) -> str:
    """The version of the weights in `path`: the one that somebody has named, else one that no other path has."""
    if version is not None and version != UNNAMED:
        return version
    return version_of(path) if path else UNNAMED


def weights_of(template: EngineTemplate) -> Weights:
    """What groups of this template declare to serve. The path is empty for the model that needs none."""
    return Weights(template.model_path or "", weights_version(template.model_path, template.model_version))


def weights_in(template: Mapping[str, object]) -> Weights:
    """The same of a template as it is on the server."""
    path, version = template.get("modelPath"), template.get("modelVersion")
    return Weights(str(path or ""), weights_version(str(path or ""), str(version) if version else None))


def weights_name(weights: Weights) -> str:
    """One word for both."""
    return f"{weights.version}@{weights.path}"


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
