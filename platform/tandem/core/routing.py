"""The router: the pair with the least cost, DP rank by DP rank, of the groups that are ready. Pure.

A prefill rank costs the time until the prompt's uncached tokens are computed there; a decode rank the time between
tokens that the stream would see (`route_cost.py`). What is cached where, the prefix index knows (`prefix_index.py`),
what is open where the accounts of the ranks (`rank_load.py`): own rooms as they come and go, those of the other gateway
replicas as the engines report them. Equal costs go round in turn, so that an idle fleet is used evenly and a run can be
repeated exactly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence

from tandem.core.prefix_index import PrefixIndex, Worker
from tandem.core.rank_load import RankAccount
from tandem.core.route_cost import Choice, RouteSettings, cached_tokens, joint_cost
from tandem.core.route_pick import Picked, allowed, pick_decode, pick_prefill
from tandem.core.route_types import NoCapacity, Pair, RankLoad, RankView, RoutableRank, RouteAsk, Target
from tandem.core.types import DpLoad, Group, GroupState, Role

__all__ = ["NoCapacity", "Pair", "RankLoad", "RankView", "RouteAsk", "Router", "Target"]

_LOST = frozenset({GroupState.FAILED, GroupState.GONE})
_COMING = frozenset({GroupState.STARTING, GroupState.FAILED})
"""A group that failed starts again. So does, in a way, one that is being given other weights."""
_HAS_ENGINES = frozenset({GroupState.READY, GroupState.CORDONED, GroupState.DRAINING})


class _Lease:
    __slots__ = ("account", "ahead", "first", "key", "opened", "prompt", "tokens", "waiting")

    def __init__(self, key: Worker, account: RankAccount, tokens: int, waiting: int, opened: float | None) -> None:
        self.key = key
        self.account = account
        self.prompt = tokens
        self.tokens = tokens
        self.waiting = waiting
        """Of its prompt, what the account counts as not computed yet."""
        self.ahead = account.queued
        """Uncached tokens that waited before it."""
        self.opened = opened
        self.first: float | None = None
        """When its first token came."""


class Router:
    """Chooses pairs, and keeps the account of what is open where.

    `put` and `remove` say which groups exist; `open`, `grow`, `prefilled` and `release` say what runs on them. A group
    may leave while rooms are still open on it: their account goes with their last release. Times are of any clock that
    never goes back, in seconds; where one may be left out, the last that was told counts.
    """

    def __init__(self, settings: RouteSettings | None = None, index: PrefixIndex | None = None) -> None:
        self.settings = settings or RouteSettings()
        self.index = PrefixIndex() if index is None else index
        self.summoned: frozenset[Role] = frozenset()
        """Roles whose groups come when somebody asks, also where none exists (autoscaling from none)."""
        self._groups: dict[str, Group] = {}
        self._accounts: dict[Worker, RankAccount] = {}
        self._ready: dict[tuple[str, str], dict[Role, list[RoutableRank]]] = {}
        """Weight version and KV format → role → ranks, of the groups that are ready."""
        self._leases: dict[tuple[int, Role], _Lease] = {}
        self._sessions: OrderedDict[str, Worker] = OrderedDict()
        self._turn = 0
        self._now = 0.0
        self._look_again = 0.0

    # Groups

    def put(self, group: Group) -> None:
        """Learn of a group, or of its new state or epoch."""
        before = self._groups.get(group.group)
        self._groups[group.group] = group
        if before is not None and (before.epoch != group.epoch or group.state in _LOST):
            self._forget(before)
        self._rebuild()

    def remove(self, group: str) -> None:
        """Forget a group; nothing is routed to it any more."""
        before = self._groups.pop(group, None)
        if before is not None:
            self._forget(before)
            self._rebuild()

    def put_load(self, group: str, loads: Iterable[DpLoad], now: float, *, epoch: int | None = None) -> None:
        """What a group's engine reports of its DP ranks, ours and others' together.

        `epoch` is the one that was asked; a report of another is dropped.
        """
        self._advance(now)
        known = self._groups.get(group)
        if known is None or (epoch is not None and epoch != known.epoch):
            return
        for load in loads:
            account = self._accounts.get(Worker(group, known.epoch, load.dp_rank))
            if account is not None:
                account.hear(load, now)

    # Choosing

    def choose(
        self,
        ask: RouteAsk | None = None,
        *,
        avoid: Collection[str] = (),
        version: str | None = None,
        now: float | None = None,
    ) -> Pair | NoCapacity:
        """The pair with the least cost; groups in `avoid` only if a role has no other.

        Both halves have the same weights and KV format: the KV of others means nothing to them. `version`: only these.
        """
        self._advance(now)
        keys = ask.keys(self.index) if ask is not None else []
        depths = self.index.match(keys, self._now) if keys else []
        prompt, whole = (len(ask.prompt), len(ask.prompt) + ask.output_tokens) if ask is not None else (0, 0)
        home = self._sessions.get(ask.session) if ask is not None and ask.session else None
        best: tuple[tuple[int, float], Picked, Picked] | None = None
        for ready in self._pairable(version):
            prefill = pick_prefill(
                allowed(ready[Role.PREFILL], avoid),
                prompt,
                depths,
                block_tokens=self.index.block_tokens,
                settings=self.settings,
                turn=self._turn,
                home=home,
            )
            decode = pick_decode(allowed(ready[Role.DECODE], avoid), whole, settings=self.settings, turn=self._turn)
            avoided = sum(picked.rank.target.group in avoid for picked in (prefill, decode))
            cost = (avoided, joint_cost(prefill.cost, decode.cost, self.settings.slo))
            if best is None or cost < best[0]:
                best = (cost, prefill, decode)
        if best is None:
            return self.shortage(version) or NoCapacity(reason="no pair is ready")
        self._turn += 1
        (avoided, _), prefill, decode = best
        blocks = depths[prefill.rank.slot] if depths else 0
        choice = self._choice(prefill, decode, prompt, keys[:blocks], last_resort=avoided > 0)
        if ask is not None:
            self.index.note(prefill.rank.worker, keys, self._now)
            self._remember(ask.session, prefill.rank.worker)
        source = self._groups[prefill.rank.target.group]
        return Pair(
            prefill=prefill.rank.target,
            decode=decode.rank.target,
            bootstrap_host=source.bootstrap_host,
            bootstrap_port=source.bootstrap_port,
            choice=choice,
        )

    def shortage(self, version: str | None = None) -> NoCapacity | None:
        """Why `choose` would find no pair; None if it would find one. Takes no turn."""
        if next(self._pairable(version), None) is not None:
            return None
        ready = {role for (name, _), roles in self._ready.items() if version in (None, name) for role in roles}
        missing = [role for role in Role if role not in ready]
        # What a group that starts will hold is not known before it is ready.
        coming = {group.role for group in self._groups.values() if group.state in _COMING or group.loading}
        if missing:
            names = " and no ".join(role.value for role in missing)
            weights = "" if version is None else f" with the weights {version!r}"
            coming |= self.summoned
            return NoCapacity(
                reason=f"no {names} group{weights} is ready",
                coming=coming.issuperset(missing),
                asleep=self.summoned.issuperset(missing),
            )
        reason = "the prefill and decode groups that are ready have different weight versions or KV formats"
        return NoCapacity(reason=reason, coming=bool(coming))

    # What runs

    def open(
        self, room: int, target: Target, tokens: int, *, uncached: int | None = None, now: float | None = None
    ) -> None:
        """A leg of the room, with `tokens` prompt tokens, was opened on the target.

        `uncached`: how many of them prefill has to compute, as the choice expected; None = all.
        """
        key = Worker(target.group, target.epoch, target.dp_rank)
        account = self._account(key, target.role)
        waiting = 0 if target.role is Role.DECODE else tokens if uncached is None else min(tokens, uncached)
        self._leases[room, target.role] = _Lease(key, account, tokens, waiting, now)
        account.add(tokens, waiting)

    def grow(self, room: int, tokens: int, now: float | None = None) -> None:
        """The room's decode leg holds `tokens` more. With `now`, the rank's pace is learned from it."""
        lease = self._leases.get((room, Role.DECODE))
        if lease is not None:
            lease.tokens += tokens
            lease.account.grow(tokens)
            if lease.first is None:
                lease.first = now

    def prefilled(self, room: int, *, cached: int, now: float | None = None) -> None:
        """The room's prompt is computed; the engine found `cached` tokens of it. The rank's rate is learned from it."""
        lease = self._leases.get((room, Role.PREFILL))
        if lease is None:
            return
        lease.account.waiting -= lease.waiting
        lease.waiting = 0
        if now is not None and lease.opened is not None:
            uncached = max(0, lease.prompt - cached)
            self.observed(lease.key, tokens=lease.ahead + uncached, seconds=now - lease.opened)

    def observed(self, worker: Worker, *, tokens: int, seconds: float) -> None:
        """A prefill rank worked through so many uncached tokens in this time."""
        account = self._accounts.get(worker)
        if account is not None:
            account.prefilled(tokens, seconds)

    def release(self, room: int, role: Role, now: float | None = None) -> None:
        """One leg of the room is over."""
        lease = self._leases.pop((room, role), None)
        if lease is None:
            return
        account = lease.account
        if now is not None and lease.first is not None:
            account.decoded(lease.tokens - lease.prompt - 1, now - lease.first)
        account.rooms -= 1
        account.tokens -= lease.tokens
        account.waiting -= lease.waiting
        if account.rooms == 0 and not self._exists(lease.key):
            self._accounts.pop(lease.key, None)

    def loads(self) -> list[RankLoad]:
        """What is open on each DP rank, as this gateway knows it; ranks with nothing open are left out."""
        return [
            RankLoad(group=group, epoch=epoch, dp_rank=rank, rooms=account.rooms, tokens=account.tokens)
            for (group, epoch, rank), account in sorted(self._accounts.items(), key=lambda item: item[0])
            if account.rooms
        ]

    def ranks(self) -> list[RankView]:
        """What the router goes by, for each DP rank of the groups that are ready."""
        return [
            RankView(
                role=rank.target.role,
                group=rank.target.group,
                epoch=rank.target.epoch,
                dp_rank=rank.target.dp_rank,
                rooms=rank.account.rooms,
                other_rooms=rank.account.other_rooms,
                waiting_tokens=rank.account.queued,
                kv_used=rank.account.used(),
                tokens_per_second=rank.account.rate.value,
                pace_s=rank.account.pace.value,
            )
            for ready in self._ready.values()
            for ranks in ready.values()
            for rank in ranks
        ]

    @property
    def open_legs(self) -> int:
        """Legs that are open now; 0 when traffic has ended."""
        return len(self._leases)

    # Inside: choosing

    def _pairable(self, version: str | None) -> Iterator[dict[Role, list[RoutableRank]]]:
        """The ranks by role, of each weight version and KV format that both roles have."""
        for kind in sorted(self._ready):
            if version in (None, kind[0]) and len(self._ready[kind]) == len(Role):
                yield self._ready[kind]

    def _choice(
        self, prefill: Picked, decode: Picked, prompt: int, held: Sequence[bytes], *, last_resort: bool
    ) -> Choice:
        slo = self.settings.slo
        return Choice(
            prompt_tokens=prompt,
            cached_tokens=cached_tokens(len(held), self.index.block_tokens, prompt),
            confirmed=bool(held) and self.index.confirmed(prefill.rank.worker, held[-1]),
            ttft_s=prefill.cost,
            itl_s=decode.cost,
            keeps_slo=prefill.cost <= slo.ttft_s and decode.cost <= slo.itl_s and decode.fits,
            by="last resort" if last_resort else prefill.by,
        )

    def _remember(self, session: str, worker: Worker) -> None:
        if not session:
            return
        self._sessions[session] = worker
        self._sessions.move_to_end(session)
        if len(self._sessions) > self.settings.sessions:
            self._sessions.popitem(last=False)

    # Inside: groups

    def _rebuild(self) -> None:
        """Sort the ranks of the groups that are ready, so that a choice need not."""
        self._ready = {}
        for group in self._groups.values():
            if group.role is Role.PREFILL and group.state in _HAS_ENGINES:
                # One that is cordoned keeps what it holds: it may come back.
                for worker in _workers(group):
                    self.index.join(worker)
            if not (group.routable and group.url):
                continue
            kind = group.weight_version, group.kv_format
            ranks = self._ready.setdefault(kind, {}).setdefault(group.role, [])
            for worker in _workers(group):
                slot = self.index.join(worker) if group.role is Role.PREFILL else -1
                ranks.append(RoutableRank(_target(group, worker), worker, self._account(worker, group.role), slot))
        for ready in self._ready.values():
            for ranks in ready.values():
                ranks.sort(key=lambda rank: (rank.target.dp_rank, rank.target.group))

    def _forget(self, group: Group) -> None:
        for worker in _workers(group):
            self.index.leave(worker)
            account = self._accounts.get(worker)
            if account is not None and account.rooms == 0:
                del self._accounts[worker]

    def _account(self, worker: Worker, role: Role) -> RankAccount:
        account = self._accounts.get(worker)
        if account is None:
            # A rank of which nothing is known is taken for as fast as its like.
            like = [one for one in self._accounts.values() if one.role is role]
            rate = sum(one.rate.value for one in like) / len(like) if like else self.settings.prefill_rate
            pace = sum(one.pace.value for one in like) / len(like) if like else self.settings.pace_s
            account = self._accounts[worker] = RankAccount(role, rate=rate, pace=pace)
        return account

    def _exists(self, worker: Worker) -> bool:
        group = self._groups.get(worker.group)
        return group is not None and group.epoch == worker.epoch and group.state not in _LOST

    def _advance(self, now: float | None) -> None:
        if now is None or now <= self._now:
            return
        self._now = now
        if now >= self._look_again:
            # Not at every choice: it is no matter if a report lives a little longer.
            self._look_again = now + self.settings.stale_s / 4
            for account in self._accounts.values():
                if account.heard < now - self.settings.stale_s:
                    account.forget_others()


def _workers(group: Group) -> Iterable[Worker]:
    return (Worker(group.group, group.epoch, rank) for rank in range(max(1, group.dp_size)))


def _target(group: Group, worker: Worker) -> Target:
    return Target(
        role=group.role,
        group=worker.group,
        epoch=worker.epoch,
        dp_rank=worker.dp_rank,
        dp_size=max(1, group.dp_size),
        url=group.url,
    )
