"""The weights that a revision declares, and those that a group which declares them is given.

They differ once somebody has refreshed the weights in place (`refresh.py`): what declares the old ones is given the new
ones from then on, and what declares others is given those. So a declaration is a name, and `Replaced` says what it
stands for. One that was never replaced stands for itself.

Pure: what the fleet's record says in, weights out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from tandem.core.group_record import Weights
from tandem.core.types import Group, GroupSpec

_LONGEST_NAME = 40


class Replaced(msgspec.Struct, frozen=True, kw_only=True):
    """What a declaration stands for. The fleet's record holds them."""

    declared_path: str
    """Empty = the folder that the fleet began with."""
    declared_version: str
    path: str
    version: str

    @property
    def declared(self) -> Weights:
        """What was declared."""
        return Weights(self.declared_path, self.declared_version)

    @property
    def weights(self) -> Weights:
        """What groups that declare it are given."""
        return Weights(self.path, self.version)


def version_of(path: str) -> str:
    """The version of the weights in a folder for which nobody has given one: no other folder has it.

    The folder's name, for people, and 8 hex digits of its whole path.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.rstrip("/").rpartition("/")[2])[:_LONGEST_NAME]
    return f"{name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def declared_by(spec: GroupSpec) -> Weights | None:
    """What a wish declares; None = nothing: such a group has what the fleet has."""
    return Weights(spec.declared_path, spec.declared_version) if spec.declared_version else None


def stands_for(declared: Weights, replaced: Iterable[Replaced]) -> Weights:
    """What a group that declares this is given."""
    return next((one.weights for one in replaced if one.declared == declared), declared)


def with_replaced(replaced: Sequence[Replaced], declared: Iterable[Weights], weights: Weights) -> tuple[Replaced, ...]:
    """From now on these declarations stand for `weights`."""
    names = set(declared)
    others = [one for one in replaced if one.declared not in names]
    changed = [
        Replaced(declared_path=name.path, declared_version=name.version, path=weights.path, version=weights.version)
        for name in names
        if name != weights
    ]
    return tuple(sorted([*others, *changed], key=lambda one: one.declared))


def declarations(specs: Iterable[GroupSpec]) -> set[Weights]:
    """What those groups declare that are to stay."""
    return {declared for spec in specs if not spec.draining and (declared := declared_by(spec)) is not None}


def taken_version(weights: Weights, known: Iterable[Weights]) -> str:
    """The other folder that has this version already; empty = none has. Groups of one version work together, so two
    folders must never share one."""
    others = (one.path for one in known if one.version == weights.version and one.path not in ("", weights.path))
    return min(others, default="")


def known_weights(
    current: Weights, replaced: Iterable[Replaced], specs: Iterable[GroupSpec], groups: Iterable[Group]
) -> set[Weights]:
    """All weights of which the fleet knows. `current`: its own."""
    pairs = [pair for one in replaced for pair in (one.declared, one.weights)]
    wished = [Weights(spec.weights_path, spec.weight_version) for spec in specs]
    served = [Weights(group.weights_path, group.weight_version) for group in groups]
    return {one for one in (current, *pairs, *wished, *served) if one.version}


def contradiction(spec: GroupSpec, now: GroupSpec) -> str:
    """Why a group that exists cannot become what `spec` says, as a sentence; empty = it can."""
    before, after = declared_by(now), declared_by(spec)
    if before is None or after is None or before == after:
        return ""
    where = f" in {before.path}" if before.path else ""
    return f"{spec.group} was made with the weights{where}, version {before.version}; drain it, then create it anew."


def kept(spec: GroupSpec, now: GroupSpec) -> GroupSpec:
    """A wish for a group that exists: it keeps its weights and what it declares, unless it is told others."""
    path, version = declared_by(spec) or declared_by(now) or Weights("", "")
    named = replace(spec, declared_path=path, declared_version=version)
    if spec.weight_version:
        return named
    return replace(named, weights_path=now.weights_path, weight_version=now.weight_version)


def given(spec: GroupSpec, weights: Weights) -> GroupSpec:
    """A wish for a new group: it has these weights, unless it is told others."""
    return spec if spec.weight_version else replace(spec, weights_path=weights.path, weight_version=weights.version)
