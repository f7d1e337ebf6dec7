"""The first router: the least-loaded pair, rank by rank, of the groups that are ready. Pure.

Load is what this gateway itself has open: rooms and their tokens, per DP rank. A prefill rank is judged by the prompt
tokens that it still has to work through, a decode rank by how many streams share its steps. Ties go round in turn, so
that an idle fleet is used evenly and a run can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from tandem.core.types import Group, Role


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where one leg goes: a DP rank of one epoch of one group."""

    role: Role
    group: str
    epoch: int
    dp_rank: int
    dp_size: int
    url: str


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """The two targets of one attempt, and where decode finds prefill's KV bootstrap server."""

    prefill: Target
    decode: Target
    bootstrap_host: str
    bootstrap_port: int

    def target(self, role: Role) -> Target:
        return self.prefill if role is Role.PREFILL else self.decode


class NoCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """Why no pair could be chosen; `retry_after` is in seconds."""

    reason: str
    retry_after: float = 2.0


class RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Open rooms of one DP rank, and the tokens of their prompts and answers so far."""

    group: str
    epoch: int
    dp_rank: int
    rooms: int
    tokens: int


class _Load:
    __slots__ = ("rooms", "tokens")

    def __init__(self) -> None:
        self.rooms = 0
        self.tokens = 0


_IDLE = _Load()


class _Lease:
    __slots__ = ("key", "tokens")

    def __init__(self, key: tuple[str, int, int], tokens: int) -> None:
        self.key = key
        self.tokens = tokens


class Router:
    """Chooses pairs, and keeps the account of what is open where.

    `put` and `remove` say which groups exist; `open`, `grow` and `release` say what runs on them. A group may leave
    while rooms are still open on it: their account goes with their last release.
    """

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self._load: dict[tuple[str, int, int], _Load] = {}
        self._leases: dict[tuple[int, Role], _Lease] = {}
        self._turn = 0

    def put(self, group: Group) -> None:
        """Learn of a group, or of its new state or epoch."""
        self._groups[group.group] = group

    def remove(self, group: str) -> None:
        """Forget a group; nothing is routed to it any more."""
        self._groups.pop(group, None)

    def choose(self, *, avoid: Collection[str] = ()) -> Pair | NoCapacity:
        """The least-loaded pair; groups in `avoid` only if a role has no other.

        Both halves hold the same weights: the KV of one weight version means nothing to another.
        """
        found: dict[str, dict[Role, list[Target]]] = {}
        for group in self._ready():
            ranks = found.setdefault(group.weight_version, {}).setdefault(group.role, [])
            ranks.extend(_targets(group))
        best: tuple[tuple[int, ...], Target, Target] | None = None
        for version in sorted(found):
            prefill = self._least(found[version].get(Role.PREFILL, []), avoid)
            decode = self._least(found[version].get(Role.DECODE, []), avoid)
            if prefill is None or decode is None:
                continue
            cost = tuple(a + b for a, b in zip(prefill[0], decode[0], strict=True))
            if best is None or cost < best[0]:
                best = (cost, prefill[1], decode[1])
        if best is None:
            return self.shortage() or NoCapacity(reason="no pair is ready")
        self._turn += 1
        home = self._groups[best[1].group]
        return Pair(
            prefill=best[1], decode=best[2], bootstrap_host=home.bootstrap_host, bootstrap_port=home.bootstrap_port
        )

    def shortage(self) -> NoCapacity | None:
        """Why `choose` would find no pair; None if it would find one. Takes no turn."""
        roles: dict[str, set[Role]] = {}
        for group in self._ready():
            roles.setdefault(group.weight_version, set()).add(group.role)
        if any(len(found) == len(Role) for found in roles.values()):
            return None
        ready = {role for found in roles.values() for role in found}
        missing = [role.value for role in Role if role not in ready]
        if missing:
            return NoCapacity(reason=f"no {' and no '.join(missing)} group is ready")
        return NoCapacity(reason="the prefill and decode groups that are ready have different weight versions")

    def open(self, room: int, target: Target, tokens: int) -> None:
        """A leg of the room, with `tokens` prompt tokens, was opened on the target."""
        key = (target.group, target.epoch, target.dp_rank)
        load = self._load.setdefault(key, _Load())
        load.rooms += 1
        load.tokens += tokens
        self._leases[room, target.role] = _Lease(key, tokens)

    def grow(self, room: int, tokens: int) -> None:
        """The room's decode leg holds `tokens` more."""
        lease = self._leases.get((room, Role.DECODE))
        if lease is not None:
            lease.tokens += tokens
            self._load[lease.key].tokens += tokens

    def release(self, room: int, role: Role) -> None:
        """One leg of the room is over."""
        lease = self._leases.pop((room, role), None)
        if lease is None:
            return
        load = self._load[lease.key]
        load.rooms -= 1
        load.tokens -= lease.tokens
        if load.rooms == 0:
            del self._load[lease.key]

    def loads(self) -> list[RankLoad]:
        """What is open on each DP rank, as this gateway knows it; ranks with nothing open are left out."""
        return [
            RankLoad(group=group, epoch=epoch, dp_rank=rank, rooms=load.rooms, tokens=load.tokens)
            for (group, epoch, rank), load in sorted(self._load.items())
        ]

    @property
    def open_legs(self) -> int:
        """Legs that are open now; 0 when traffic has ended."""
        return len(self._leases)

    def _ready(self) -> Iterator[Group]:
        for group in self._groups.values():
            if group.routable and group.url:
                yield group

    def _least(self, ranks: list[Target], avoid: Collection[str]) -> tuple[tuple[int, ...], Target] | None:
        best: tuple[tuple[int, ...], Target] | None = None
        for place, target in enumerate(sorted(ranks, key=lambda t: (t.dp_rank, t.group))):
            load = self._load.get((target.group, target.epoch, target.dp_rank), _IDLE)
            prefill = target.role is Role.PREFILL
            work = (load.tokens, load.rooms) if prefill else (load.rooms, load.tokens)
            cost = (int(target.group in avoid), *work, (place - self._turn) % len(ranks))
            if best is None or cost < best[0]:
                best = (cost, target)
        return best


def _targets(group: Group) -> Iterator[Target]:
    for rank in range(max(1, group.dp_size)):
        yield Target(
            role=group.role,
            group=group.group,
            epoch=group.epoch,
            dp_rank=rank,
            dp_size=max(1, group.dp_size),
            url=group.url,
        )
