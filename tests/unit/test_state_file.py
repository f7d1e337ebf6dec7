"""The embedded store's file against a dictionary, with a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tandem.state import statefile
from tandem.state.statefile import StateFile

KEYS = st.sampled_from(["a/1", "a/2", "b/1"])
TTLS = st.one_of(st.none(), st.integers(1, 5))


class StateFileAgainstADictionary(RuleBasedStateMachine):
    """The model holds (value, version, expires); a follower of `since` must end up with the same entries."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.file = StateFile(Path(":memory:"), busy_timeout=1, on_change=lambda: None)
        self.model: dict[str, tuple[bytes, int, float | None]] = {}
        self.cursor = 0
        self.followed: dict[str, tuple[bytes, int]] = {}
        self.counter = 0

    @initialize(kept=st.sampled_from([2, 4096]))
    def limit_history(self, kept: int) -> None:
        statefile._KEPT_CHANGES = kept

    def teardown(self) -> None:
        statefile._KEPT_CHANGES = 4096
        self.file.close()

    def _value(self) -> bytes:
        self.counter += 1
        return b"%d" % self.counter

    def _expires(self, ttl: int | None) -> float | None:
        return None if ttl is None else self.now + ttl

    @rule(key=KEYS, ttl=TTLS)
    def put(self, key: str, ttl: int | None) -> None:
        value, expires = self._value(), self._expires(ttl)
        version = self.file.write(key, value, expected=None, expires=expires, now=self.now)
        assert version is not None
        assert version > max((held[1] for held in self.model.values()), default=0)
        self.model[key] = value, version, expires

    @rule(key=KEYS, ttl=TTLS, stale=st.booleans(), delete=st.booleans())
    def compare_and_set(self, key: str, ttl: int | None, stale: bool, delete: bool) -> None:
        held = self.model.get(key)
        value, expires = None if delete else self._value(), self._expires(ttl)
        expected = (held[1] if held else 0) + stale
        version = self.file.write(key, value, expected=expected, expires=expires, now=self.now)
        assert (version is None) == stale
        if version is None:
            return
        if value is None:
            self.model.pop(key, None)
        else:
            self.model[key] = value, version, expires

    @rule(key=KEYS, ttl=st.integers(1, 5))
    def touch(self, key: str, ttl: int) -> None:
        expires = self.now + ttl
        assert self.file.touch(key, expires=expires, now=self.now) == (key in self.model)
        if key in self.model:
            self.model[key] = (*self.model[key][:2], expires)

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.model = {key: held for key, held in self.model.items() if held[2] is None or held[2] > self.now}

    @rule()
    def follow(self) -> None:
        revision, changes, next_expiry = self.file.since("a/", self.cursor, now=self.now)
        if changes is None:
            entries = self.file.entries("a/", now=self.now)[1]
            self.followed = {entry.key: (entry.value, entry.version) for entry in entries}
        for key, value, version in changes or ():
            assert self.cursor < version <= revision
            if value is None:
                del self.followed[key]
            else:
                self.followed[key] = value, version
        self.cursor = revision
        assert self.followed == {key: held[:2] for key, held in self.model.items() if key.startswith("a/")}
        assert next_expiry == min((held[2] for held in self.model.values() if held[2] is not None), default=None)

    @invariant()
    def readers_see_the_model(self) -> None:
        assert self.file.entries("", now=self.now)[1] == [
            (key, value, version) for key, (value, version, _) in sorted(self.model.items())
        ]
        for key in ("a/1", "b/1"):
            entry, held = self.file.get(key, now=self.now), self.model.get(key)
            assert entry == (held and (key, *held[:2]))


TestStateFile = StateFileAgainstADictionary.TestCase
TestStateFile.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_an_expiry_is_logged_before_the_write_that_follows_it(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "s.db", busy_timeout=1, on_change=lambda: None)
    file.write("k", b"1", expected=None, expires=5, now=0)
    file.write("k", b"2", expected=0, expires=None, now=6)
    news = file.since("", 0, now=6)
    assert news.changes is not None
    assert [change.value for change in news.changes] == [b"1", None, b"2"]
    file.close()


def test_the_bell_rings_after_a_change_is_visible(tmp_path: Path) -> None:
    seen: list[object] = []
    other = StateFile(tmp_path / "s.db", busy_timeout=1, on_change=lambda: None)
    file = StateFile(tmp_path / "s.db", busy_timeout=1, on_change=lambda: seen.append(other.get("k", now=0)))
    file.write("k", b"1", expected=None, expires=None, now=0)
    assert seen == [("k", b"1", 1)]
    file.close()
    other.close()


def test_a_write_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "s.db", busy_timeout=1, on_change=lambda: None)
    with pytest.raises(Exception, match="type"):
        file.write("k", object(), expected=None, expires=None, now=0)  # type: ignore[arg-type]
    assert file.revision() == 0
    assert file.write("k", b"1", expected=0, expires=None, now=0) == 1
    file.close()
