"""No request suffers in a few dozen simulated runs. The simulator repeats itself, adds up, and makes failures small."""

from __future__ import annotations

import msgspec
import pytest

from tandem.core.pair_events import Action, Finish, LegTokens
from tandem.core.pairing import PairTable
from tandem.core.types import Role
from tandem.sim.chaos import Report, add, percentile, run_all, run_seed
from tandem.sim.gateway import LINGER_S
from tandem.sim.ledger import Invariant
from tandem.sim.schedule import Ask, Fault, FaultKind, Schedule, draw
from tandem.sim.shrink import shrink
from tandem.sim.world import World, breaks


class TurnsChunksOfFourRound(PairTable):
    """A bug that few requests meet."""

    def _tokens(self, event: LegTokens, now: float) -> list[Action]:
        ids = event.ids[::-1] if len(event.ids) > 3 else event.ids
        return super()._tokens(LegTokens(room=event.room, ids=ids), now)


def broken_table() -> PairTable:
    return TurnsChunksOfFourRound(linger_s=LINGER_S)


@pytest.mark.parametrize("seed", range(30))
def test_no_request_suffers(seed: int) -> None:
    assert run_seed(seed, 250).broken == []


def test_the_faults_of_every_kind_take_place() -> None:
    report = Report()
    for seed in range(40, 60):
        add(report, run_seed(seed, 300))
    assert set(report.total.faults) >= {kind.value for kind in FaultKind} - {FaultKind.POISON.value}


def test_a_run_without_faults_gives_every_request_its_whole_answer() -> None:
    quiet = msgspec.structs.replace(draw(1, 200), faults=())
    outcome = World(quiet).run()
    assert outcome.outcomes == {"whole answer": 200}
    assert (outcome.retries, outcome.migrations, outcome.faults) == (0, 0, {})


def test_a_seed_tells_the_same_story_every_time() -> None:
    stories: list[list[str]] = [[], []]
    for story in stories:
        run_seed(5, 60, story=story.append)
    assert stories[0] == stories[1] != []


def test_an_abort_of_prefill_that_is_but_the_echo_of_decodes_own_loses_nothing() -> None:
    """Found by seed 209: prefill never answers, decode aborts later, and its abort makes prefill's word an abort."""
    schedule = Schedule(
        seed=209,
        prefill=4,
        decode=2,
        dp_size=4,
        gateways=1,
        asks=(Ask(number=0, at=2.7, gateway=0, prompt=2387932252, length=7, limit=16),),
        faults=(
            Fault(kind=FaultKind.SLOW, at=2.75, seconds=2.0, pick=0),
            Fault(kind=FaultKind.SLOW, at=2.75, seconds=2.0, pick=1),
            Fault(kind=FaultKind.ABORTED, request=0, seconds=1.36),
            Fault(kind=FaultKind.MUTE, request=0, role=Role.PREFILL),
        ),
    )
    world = World(schedule)
    world.run()
    assert isinstance(world.ledger.requests["r0"].ended, Finish)


def test_a_schedule_survives_being_written_down() -> None:
    schedule = draw(3, 50)
    assert msgspec.json.decode(msgspec.json.encode(schedule), type=Schedule) == schedule


def test_a_failing_run_is_made_small() -> None:
    schedule = draw(2, 100)
    found = breaks(schedule, broken_table)
    assert found is not None
    small, violation = shrink(schedule, broken_table)
    assert violation.invariant is found.invariant
    assert (len(small.asks), len(small.faults)) == (1, 0)
    assert breaks(small, broken_table) is not None


def test_a_run_that_keeps_its_promises_is_not_made_small() -> None:
    with pytest.raises(ValueError, match="nothing to make small"):
        shrink(draw(2, 20))


def test_a_failure_says_which_seed_and_which_promise() -> None:
    report = run_seed(2, 200, broken_table)
    assert [broken.seed for broken in report.broken] == [2]
    assert report.broken[0].invariant in set(Invariant)


def test_batches_add_up_to_all_seeds() -> None:
    report = Report()
    for part in run_all(7, 6, 20, jobs=1):
        add(report, part)
    assert (report.total.seeds, report.total.requests) == (6, 120)
    assert sum(report.total.outcomes.values()) == 120


def test_percentiles_are_of_all_that_was_counted() -> None:
    assert percentile({10: 98, 500: 2}, 0.5) == 10
    assert percentile({10: 98, 500: 2}, 0.99) == 500
    assert percentile({}, 0.5) is None
