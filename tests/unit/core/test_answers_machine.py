"""Whoever claims, adds, lets go and takes in any order: a log has one writer at a time, and nothing twice."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.core.answers import OVERHEAD, AnswerState, AnswerTable, Appended, Limits, Standing

NAMES = st.sampled_from(["a", "b", "c"])
LIMITS = Limits(keep_s=5, open_s=10, tenant_bytes=4 * OVERHEAD, total_bytes=5 * OVERHEAD)


class Answers(RuleBasedStateMachine):
    """The model: of each answer, who may write, and what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.table = AnswerTable(LIMITS)
        self.numbers = itertools.count(1)
        self.owner: dict[str, str] = {}
        self.state: dict[str, AnswerState] = {}
        self.log: dict[str, list[bytes]] = {}
        self.former: dict[str, set[str]] = {}
        self.left: set[tuple[str, int, str]] = set()
        """Name, place, owner: what an answer was let go of with."""

    def forget(self, name: str) -> None:
        for kept in (self.owner, self.state, self.log, self.former):
            kept.pop(name, None)
        self.left = {key for key in self.left if key[0] != name}

    def sync(self) -> None:
        """What has expired or had to make room is no longer there."""
        for name in list(self.owner):
            if self.table.news(name, after=0, now=self.now) is None:
                self.forget(name)

    def owned(self, name: str, owner: str) -> None:
        if name in self.owner:
            self.former[name].add(self.owner[name])
        self.owner[name], self.state[name] = owner, AnswerState.OPEN
        self.log.setdefault(name, [])
        self.former.setdefault(name, set())

    @rule(name=NAMES)
    def claim(self, name: str) -> None:
        owner = f"o{next(self.numbers)}"
        self.sync()
        found = self.table.claim(
            name, tenant=f"t{name}", fingerprint="f", number=owner, created=1, owner=owner, now=self.now
        )
        if self.state.get(name) in (AnswerState.OPEN, AnswerState.DONE):
            wanted = Standing.JOINED if self.state[name] is AnswerState.OPEN else Standing.DONE
            assert (found.standing, found.log) == (wanted, self.log[name])
        elif self.state.get(name) is AnswerState.VOID:
            assert (found.standing, found.log, found.number, found.born) == (Standing.OWNED, [], owner, owner)
            self.forget(name)
            self.owned(name, owner)
        else:
            assert (found.standing, found.log) == (Standing.OWNED, self.log.get(name, []))
            self.owned(name, owner)

    @rule(name=NAMES)
    def take(self, name: str) -> None:
        self.sync()
        owner, before = f"o{next(self.numbers)}", self.owner.get(name, "")
        taken = self.table.take(name, before=before, owner=owner, now=self.now)
        assert taken == (self.state.get(name) is AnswerState.FREE)
        if taken:
            self.owned(name, owner)

    @precondition(lambda self: self.owner)
    @rule(name=NAMES, state=st.sampled_from(AnswerState), size=st.sampled_from([1, 40, OVERHEAD]))
    def append(self, name: str, state: AnswerState, size: int) -> None:
        self.sync()
        if name not in self.owner:
            return
        place, entry = len(self.log[name]) + 1, b"x" * size
        found = self.table.append(name, owner=self.owner[name], place=place, entry=entry, state=state, now=self.now)
        if self.state[name] is not AnswerState.OPEN:
            assert found is Appended.FENCED
            return
        if found is Appended.WRITTEN:
            self.log[name].append(entry)
            self.state[name] = state
            if state is AnswerState.FREE:
                self.left.add((name, place, self.owner[name]))
        else:
            assert found is Appended.GONE

    @rule(name=NAMES, place=st.integers(1, 3))
    def append_again(self, name: str, place: int) -> None:
        self.sync()
        if name not in self.owner or place > len(self.log[name]):
            return
        state = self.state[name]
        found = self.table.append(name, owner=self.owner[name], place=place, entry=b"?", state=state, now=self.now)
        assert found is Appended.WRITTEN

    @rule(name=NAMES)
    def append_late(self, name: str) -> None:
        """Former owners add nothing."""
        self.sync()
        for owner in self.former.get(name, ()):
            place = len(self.log[name]) + 1
            found = self.table.append(name, owner=owner, place=place, entry=b"?", state=AnswerState.OPEN, now=self.now)
            assert found is Appended.FENCED

    @rule()
    def let_go_again(self) -> None:
        """Who has not heard that it was written writes it once more."""
        self.sync()
        for name, place, owner in self.left:
            if self.owner[name] == owner and self.state[name] is AnswerState.OPEN:
                continue
            found = self.table.append(name, owner=owner, place=place, entry=b"?", state=AnswerState.FREE, now=self.now)
            assert found is Appended.WRITTEN

    @rule(name=NAMES)
    def restart(self, name: str) -> None:
        self.sync()
        done = self.table.restart(name, owner=self.owner.get(name, ""), now=self.now)
        assert done == (self.state.get(name) is AnswerState.OPEN)
        if done:
            self.log[name] = []
            # What former owners let go with is gone as well.
            self.left = {key for key in self.left if key[0] != name}

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def what_is_kept_is_what_was_written(self) -> None:
        self.sync()
        sizes = {name: OVERHEAD + sum(map(len, log)) for name, log in self.log.items()}
        for name, log in self.log.items():
            news = self.table.news(name, after=0, now=self.now)
            assert news is not None
            assert (news.log, news.owner, news.state) == (log, self.owner[name], self.state[name])
        assert self.table.size == sum(sizes.values()) <= LIMITS.total_bytes
        assert max(sizes.values(), default=0) <= LIMITS.tenant_bytes


TestAnswers = Answers.TestCase
