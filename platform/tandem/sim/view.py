"""What a gateway knows of the groups, and so whether an error for want of capacity was due; the router is not asked."""

from __future__ import annotations

from tandem.core.types import Group, GroupState, Role

COMING = frozenset({GroupState.STARTING, GroupState.FAILED})


class View:
    """The groups as one gateway knows them."""

    def __init__(self, now: float) -> None:
        self.groups: dict[str, Group] = {}
        self._dry: dict[str | None, float] = {None: now}
        """Weight version → since when no pair of it is known; None = of any."""

    def put(self, name: str, group: Group | None, versions: list[str], now: float) -> None:
        """A group is so; None = it is gone. `versions`: all that there are."""
        if group is None:
            self.groups.pop(name, None)
        else:
            self.groups[name] = group
        roles: dict[str, set[Role]] = {}
        for one in self.groups.values():
            if one.routable:
                roles.setdefault(one.weight_version, set()).add(one.role)
        paired: set[str | None] = {version for version, found in roles.items() if len(found) == len(Role)}
        if paired:
            paired.add(None)
        for version in (None, *versions):
            if version in paired:
                self._dry.pop(version, None)
            else:
                self._dry.setdefault(version, now)

    def dry_s(self, version: str | None, now: float) -> float | None:
        """For how long there has been no pair of this version (None = of any); None = there is one."""
        since = self._dry.get(version)
        return None if since is None else now - since

    def coming(self, version: str | None) -> bool:
        """Whether groups start that could end a shortage."""
        groups = self.groups.values()
        ready = {one.role for one in groups if one.routable and version in (None, one.weight_version)}
        coming = {one.role for one in groups if one.state in COMING}
        return bool(coming) and ready | coming == set(Role)
