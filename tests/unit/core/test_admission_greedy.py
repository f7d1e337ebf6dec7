"""A greedy tenant does not make another one wait: a simulated fleet behind the real admission table."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from tandem.core.admission import AdmissionTable
from tandem.core.admission_events import Admit, Capacity, Ended, Event, Refuse, Started, Submit, Tick

PATIENCE_S = 20.0
JOINS_S = 30.0
"""When the greedy one comes."""
Arrival = tuple[float, str, int, int]
"""When, who, input tokens, output tokens."""


def arrivals(tenant: str, *, per_s: float, seconds: float, seed: int, after: float = 0.0) -> Iterator[Arrival]:
    """Requests at random times; prompts of 500 to 4,000 tokens, answers of 50 to 450."""
    draw = random.Random(f"{tenant} {seed}")
    now = after + draw.expovariate(per_s)
    while now < seconds:
        yield now, tenant, draw.randint(500, 4000), draw.randint(50, 450)
        now += draw.expovariate(per_s)


MEAN_PROMPT = 2250
MEAN_ANSWER = 250


class Fleet:
    """Slots, and prefill lanes that take one prompt after the other; a first token is the end of prefill."""

    def __init__(
        self, *, slots: int, lanes: int, lane_speed: float, token_s: float, prefill_tokens: int | None
    ) -> None:
        """`lane_speed`: tokens/s of a lane; `token_s`: seconds per output token."""
        self.table = AdmissionTable()
        self.lanes = [0.0] * lanes
        self.lane_speed = lane_speed
        self.token_s = token_s
        self.happening: list[tuple[float, int, Callable[[float], None]]] = []
        self.serial = itertools.count()
        self.asked: dict[str, Arrival] = {}
        self.ttft: dict[str, list[float]] = {}
        self.refused: dict[str, int] = {}
        self.busy = 0.0
        self.tell(Capacity(slots=slots, prefill_tokens=prefill_tokens), 0.0)

    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.happening, (when, next(self.serial), what))

    def tell(self, event: Event, now: float) -> None:
        for action in self.table.handle(event, now):
            if isinstance(action, Admit):
                self.run(action.request, now)
            elif isinstance(action, Refuse):
                tenant = self.asked.pop(action.request)[1]
                self.refused[tenant] = self.refused.get(tenant, 0) + 1

    def run(self, name: str, now: float) -> None:
        came, tenant, prompt, answer = self.asked.pop(name)
        lane = min(range(len(self.lanes)), key=self.lanes.__getitem__)
        first = max(now, self.lanes[lane]) + prompt / self.lane_speed
        self.lanes[lane] = first
        end = first + answer * self.token_s
        self.ttft.setdefault(tenant, []).append(first - came)
        self.busy += end - now
        self.at(first, lambda then: self.tell(Started(request=name), then))
        self.at(end, lambda then: self.tell(Ended(request=name, output_tokens=answer), then))

    def serve(self, *streams: Iterator[Arrival]) -> None:
        for number, arrival in enumerate(heapq.merge(*streams)):
            now = arrival[0]
            while self.happening and self.happening[0][0] <= now:
                when, _, what = heapq.heappop(self.happening)
                what(when)
            while (due := self.table.next_deadline()) is not None and due <= now:
                self.tell(Tick(), now)
            self.asked[name := str(number)] = arrival
            submit = Submit(
                request=name,
                tenant=arrival[1],
                input_tokens=arrival[2],
                max_output_tokens=1000,
                deadline=now + PATIENCE_S,
            )
            self.tell(submit, now)


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def fleet(kind: str) -> Fleet:
    if kind == "slots":
        # Lanes enough that prefill never queues: a request's slot is what it waits for.
        return Fleet(slots=32, lanes=32, lane_speed=8000, token_s=0.02, prefill_tokens=None)
    if kind == "few slots":
        return Fleet(slots=24, lanes=24, lane_speed=8000, token_s=0.02, prefill_tokens=None)
    return Fleet(slots=256, lanes=16, lane_speed=8000, token_s=0.02, prefill_tokens=16 * MEAN_PROMPT)


def capacity(kind: str, world: Fleet) -> float:
    """Requests/s that the fleet can serve."""
    prefill = MEAN_PROMPT / world.lane_speed
    if kind == "prefill":
        return len(world.lanes) / prefill
    return len(world.lanes) / (prefill + MEAN_ANSWER * world.token_s)


def polite_p99(kind: str, seed: int, *, greedy: bool) -> tuple[float, Fleet]:
    world = fleet(kind)
    whole = capacity(kind, world)
    seconds = 2500 / (0.2 * whole)
    streams = [arrivals("polite", per_s=0.2 * whole, seconds=seconds, seed=seed)]
    if greedy:
        streams.append(arrivals("greedy", per_s=10 * whole / 2, seconds=seconds, seed=seed, after=JOINS_S))
    world.serve(*streams)
    return p99(world.ttft["polite"]), world


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["slots", "few slots", "prefill"])
def test_a_greedy_tenant_raises_the_p99_first_token_of_a_polite_one_by_less_than_a_fifth(kind: str, seed: int) -> None:
    alone, _ = polite_p99(kind, seed, greedy=False)
    beside, world = polite_p99(kind, seed, greedy=True)
    assert beside <= 1.2 * alone
    assert "polite" not in world.refused
    assert world.refused["greedy"] > 10_000


def test_the_greedy_tenant_still_gets_what_the_polite_one_leaves() -> None:
    _, world = polite_p99("slots", 1, greedy=True)
    seconds = 2500 / (0.2 * capacity("slots", world))
    assert world.busy / seconds > 0.85 * 32
