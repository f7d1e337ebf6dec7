"""When an engine's process counts as hung."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.heartbeat import LONGEST_STEP_S, Beat, Doing, Limits, ProgressWatch, Seen

LIMITS = Limits(hang_s=10, blocked_s=6, patient_s=300, mute_s=30)
Look = tuple[float, dict[int, Seen]]


def seen(
    moves: int,
    cpu: int = 0,
    doing: Doing = Doing.FORWARD,
    *,
    patient: bool = False,
    who: str = "one",
    helpers_s: float | None = None,
) -> Seen:
    return Seen(Beat(who=who, moves=moves, doing=doing, patient=patient), cpu, helpers_s)


def verdict(looks: Iterable[Look]) -> tuple[float, str] | None:
    """Time and text of the first verdict."""
    watch = ProgressWatch(LIMITS)
    return next(((now, found) for now, them in looks if (found := watch.look(now, them))), None)


def every_second(count: int, **values: object) -> list[Look]:
    return [(float(now), {1: seen(7, **values)}) for now in range(count)]  # type: ignore[arg-type]


def test_a_process_that_uses_no_cpu_hangs_after_the_shorter_limit() -> None:
    assert verdict(every_second(20)) == (6.0, "hangs: its one has made no progress for 6 s (blocked in a forward pass)")


def test_a_process_that_uses_cpu_hangs_after_the_longer_limit() -> None:
    looks = [(float(now), {1: seen(7, cpu=now)}) for now in range(20)]
    assert verdict(looks) == (10.0, "hangs: its one has made no progress for 10 s (in a forward pass)")


def test_progress_begins_the_count_anew() -> None:
    assert verdict((float(now), {1: seen(now // 5)}) for now in range(200)) is None


def test_who_waits_for_work_never_hangs() -> None:
    assert verdict(every_second(1000, doing=Doing.WAITING)) is None


def test_the_work_it_is_then_given_has_the_whole_limit() -> None:
    waiting = [(float(now), {1: seen(7, doing=Doing.WAITING)}) for now in range(100)]
    working = [(100.0 + now, {1: seen(8, doing=Doing.WORKING)}) for now in range(20)]
    assert verdict(waiting + working) == (106.0, "hangs: its one has made no progress for 6 s (blocked in its work)")


def test_what_may_take_minutes_has_minutes() -> None:
    found = verdict(every_second(400, doing=Doing.CONTROL, patient=True))
    assert found == (300.0, "hangs: its one has made no progress for 300 s (blocked in a control request)")


def test_time_in_which_the_watcher_slept_does_not_count() -> None:
    """A paused container, a closed laptop."""
    assert verdict([(0.0, {1: seen(7)}), (3600.0, {1: seen(7)}), (3601.0, {1: seen(8)})]) is None


def test_a_clock_that_goes_back_does_not_count() -> None:
    assert verdict([(float(-now), {1: seen(7)}) for now in range(100)]) is None


def test_the_one_that_stood_still_first_is_named() -> None:
    looks = [(float(now), {1: seen(min(now, 3)), 2: seen(min(now, 1), who="two")}) for now in range(20)]
    assert verdict(looks) == (7.0, "hangs: its two has made no progress for 6 s (blocked in a forward pass)")


def test_a_process_that_has_gone_is_forgotten() -> None:
    watch = ProgressWatch(LIMITS)
    for now in range(5):
        assert watch.look(now, {1: seen(7)}) == ""
    assert watch.look(5, {}) == ""
    assert watch.look(6, {1: seen(7)}) == ""


def compiling(seconds: int, core: float = 1.0) -> list[Look]:
    """A scheduler whose compiler uses this share of a core for so long, and another that waits for it."""
    return [(float(now), {1: seen(7, helpers_s=core * min(now, seconds)), 2: seen(3, who="two")}) for now in range(400)]


def test_while_a_compiler_that_it_has_started_is_busy_an_engine_has_minutes() -> None:
    assert verdict(compiling(400)) == (
        300.0,
        "hangs: its two has made no progress for 300 s (blocked in a forward pass)",
    )


def test_once_the_compiler_has_gone_everybody_has_the_usual_time() -> None:
    found = verdict(compiling(100))
    assert found is not None
    assert found[0] == 106.0


def test_a_helper_that_does_next_to_nothing_is_no_compiler() -> None:
    found = verdict(compiling(400, core=0.02))
    assert found is not None
    assert found[0] == 6.0


def test_a_compiler_of_a_process_that_gets_on_excuses_nobody() -> None:
    looks = [(float(now), {1: seen(now, helpers_s=float(now)), 2: seen(3)}) for now in range(20)]
    found = verdict(looks)
    assert found is not None
    assert found[0] == 6.0


def test_who_waits_for_a_process_that_loads_weights_has_minutes_too() -> None:
    loads = seen(7, doing=Doing.CONTROL, patient=True)
    found = verdict((float(now), {1: loads, 2: seen(3)}) for now in range(400))
    assert found is not None
    assert found[0] == 300.0


def test_a_process_that_has_to_write_and_never_does_is_found() -> None:
    watch = ProgressWatch(LIMITS)
    said = [watch.look(float(now), {1: seen(now)}, expected=(1, 2)) for now in range(31)]
    assert said[:30] == [""] * 30
    assert said[30].startswith(
        "is not watched: its scheduler process 2 has shown no progress at all for 30 s; it hangs"
    )


def test_one_that_begins_to_write_in_time_is_not() -> None:
    watch = ProgressWatch(LIMITS)
    said = [watch.look(float(now), {2: seen(now)} if now > 25 else {}, expected=(2,)) for now in range(100)]
    assert set(said) == {""}


@pytest.mark.parametrize(
    ("given", "device", "hang_s"), [(None, "cpu", 10.0), (None, "cuda", 60.0), (30.0, "cuda", 30.0)]
)
def test_the_usual_limit_is_the_devices(given: float | None, device: str, hang_s: float) -> None:
    limits = Limits.within(given, device)
    assert (limits.hang_s, limits.blocked_s) == (hang_s, 0.6 * hang_s)


@pytest.mark.parametrize("doing", set(Doing) - {Doing.WAITING})
def test_whatever_else_it_does_it_is_found(doing: Doing) -> None:
    assert verdict(every_second(20, doing=doing)) is not None


@given(
    st.lists(st.tuples(st.floats(0, 30), st.booleans(), st.integers(0, 2), st.sampled_from(Doing)), max_size=60),
)
def test_who_moves_between_looks_is_never_hung_and_who_does_not_is_in_time(
    steps: list[tuple[float, bool, int, Doing]],
) -> None:
    watch, now, moves, cpu, still = ProgressWatch(LIMITS), 0.0, 0, 0, 0.0
    watch.look(now, {1: seen(0)})
    for gap, moved, used, doing in steps:
        now, moves, cpu = now + gap, moves + moved, cpu + used
        still = 0.0 if moved or doing is Doing.WAITING else still + min(gap, LONGEST_STEP_S)
        found = watch.look(now, {1: seen(moves, cpu, doing)})
        if still < LIMITS.blocked_s - 1e-6:
            assert not found
        if still > LIMITS.hang_s + 1e-6:
            assert found.startswith("hangs: ")
