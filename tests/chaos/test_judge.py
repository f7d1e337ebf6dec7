"""The judge finds what is wrong, and the numbers are what streams saw: otherwise a green run would say nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaos.__main__ import _counts
from chaos.aims import Aim
from chaos.checks import miscounted, moved, nothing_left, once_each
from chaos.client import Outcome
from chaos.engine_faults import Happening
from chaos.measure import longest, percentile, rows
from chaos.scenarios import SCENARIOS, SLICE, Scenario, by_name
from chaos.traffic import References
from support.fleet import shared_memory
from tandem.core.usage import UsageRecord
from tandem.fleet.run_folder import RUN_VARIABLE

RIGHT = Outcome(
    name="r",
    logprobs=[-0.5, -0.2],
    recipe="short",
    tokens=[1, 2, 3, 4],
    text="abcd",
    finish="length",
    usage={"completion_tokens": 4, "prompt_tokens": 9},
)
REFERENCES = References([], {"short": RIGHT})


def changed(**fields: Any) -> Outcome:
    return msgspec.structs.replace(RIGHT, **fields)


def test_the_same_answer_is_right() -> None:
    assert REFERENCES.fault(changed(name="other")) == ""


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        pytest.param({"tokens": [1, 2, 4, 4]}, "other tokens: at 2", id="altered"),
        pytest.param({"tokens": [1, 2, 3]}, "other tokens: at 3", id="lost"),
        pytest.param({"tokens": [1, 2, 2, 3, 4]}, "other tokens: at 2", id="doubled"),
        pytest.param({"text": "abc"}, "other text", id="text lost"),
        pytest.param({"finish": ""}, "other finish", id="no end"),
        pytest.param({"usage": {"completion_tokens": 5}}, "usage tells 5", id="counted twice"),
        pytest.param({"error": "HTTP 503", "code": "503"}, "503", id="refused"),
        pytest.param({"left": True, "tokens": [1, 3]}, "other tokens among the first 2", id="left with a wrong one"),
        pytest.param({"usage": {"completion_tokens": 4, "prompt_tokens": 13}}, "usage tells 13 prompt", id="prompt"),
        pytest.param({"logprobs": [-0.5, -0.2002]}, "other logprobs: by up to 0.0002", id="logprobs"),
        pytest.param({"logprobs": [-0.5]}, "1 logprobs, not 2", id="a logprob lost"),
        pytest.param({"calls": ['f {"a":']}, "other tool calls", id="call cut"),
    ],
)
def test_an_answer_that_is_not_whole_and_right_is_found(fields: dict[str, Any], why: str) -> None:
    assert why in REFERENCES.fault(changed(**fields))


def test_logprobs_may_differ_as_float_sums_do() -> None:
    assert REFERENCES.fault(changed(logprobs=[-0.50001, -0.19999])) == ""


RECORD = UsageRecord(id="1", at=0.0, model="m", prompt_tokens=9, completion_tokens=4)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        pytest.param([RECORD], "", id="right"),
        pytest.param([], "has 0 usage records", id="none"),
        pytest.param([RECORD, RECORD], "has 2 usage records", id="two"),
        pytest.param([msgspec.structs.replace(RECORD, completion_tokens=5)], "records tell [5]", id="tokens"),
        # As if what was delivered before a move had become a part of the prompt.
        pytest.param([msgspec.structs.replace(RECORD, prompt_tokens=11, migrations=1)], "tell [11]", id="prompt"),
    ],
)
def test_usage_records_that_do_not_fit_the_answer_are_found(records: list[UsageRecord], why: str) -> None:
    found = miscounted(changed(tries=1), records, REFERENCES)
    assert why in found
    assert bool(found) == bool(why)


REST = msgspec.structs.replace(RECORD, prompt_tokens=0, completion_tokens=1)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        pytest.param([RECORD], "", id="the first died uncounted"),
        pytest.param([msgspec.structs.replace(RECORD, completion_tokens=3), REST], "", id="two parts"),
        pytest.param([RECORD, RECORD], "records tell [8]", id="both counted all of it"),
        pytest.param([RECORD, REST], "records tell [5]", id="a token counted twice"),
        pytest.param([msgspec.structs.replace(RECORD, completion_tokens=3)], "records tell [3]", id="a token lost"),
        pytest.param(
            [msgspec.structs.replace(RECORD, completion_tokens=2)] * 2, "records tell [18]", id="the prompt twice"
        ),
        pytest.param([], "has 0 usage records", id="none"),
    ],
)
def test_records_of_one_answer_of_two_gateways_tell_it_once(records: list[UsageRecord], why: str) -> None:
    found = miscounted(changed(tries=2), records, REFERENCES, shared=True)
    assert why in found
    assert bool(found) == bool(why)


@pytest.mark.parametrize(
    ("attempts", "wrong"), [(2, []), (1, ["cut decode leg (decode-0) hit 1 streams, 0 took another pair"])]
)
def test_a_stream_that_was_cut_must_have_moved(attempts: int, wrong: list[str]) -> None:
    cut = Happening(kind="cut decode leg", where="decode-0", at=11.0, must_move=1)
    stream = changed(side=True, began=10.0, ended=14.0)
    found = {"r": [msgspec.structs.replace(RECORD, attempts=attempts)]}
    assert moved([cut], [stream], found) == wrong


@pytest.mark.parametrize(
    ("file", "tokens", "count"),
    [
        pytest.param("usage-b", 4, 1, id="another gateway says the same"),
        pytest.param("usage-a", 4, 2, id="the same gateway says it twice"),
        pytest.param("usage-b", 3, 2, id="another one says something else"),
    ],
)
def test_only_another_gateway_may_count_an_answer_again(file: str, tokens: int, count: int) -> None:
    mine = msgspec.structs.replace(RECORD, user="r")
    again = msgspec.structs.replace(mine, completion_tokens=tokens)
    assert len(once_each([(Path("usage-a"), mine), (Path(file), again)])["r"]) == count


def test_of_tries_that_share_nothing_one_may_be_cut_short() -> None:
    gone = msgspec.structs.replace(RECORD, completion_tokens=2, outcome="client_gone")
    left = changed(left=True, tokens=[1, 2], tries=2)
    assert miscounted(left, [RECORD, gone], REFERENCES) == ""


def test_who_left_may_have_a_part() -> None:
    assert REFERENCES.fault(changed(left=True, tokens=[1, 2], text="ab", finish="", usage={})) == ""


STREAM = changed(began=10.0, times=[11.0, 11.5, 14.0, 14.1], ended=14.2)


@pytest.mark.parametrize(
    ("at", "seconds", "wanted"),
    [
        pytest.param(11.6, 0.0, 2.4, id="waits from the fault on"),
        pytest.param(10.2, 0.0, 0.8, id="the first token counts"),
        pytest.param(9.0, 2.0, 1.0, id="began before it was over"),
        pytest.param(8.0, 1.0, None, id="began later"),
        pytest.param(14.2, 1.0, None, id="had ended"),
    ],
)
def test_a_gap_is_what_a_stream_waits_after_the_fault(at: float, seconds: float, wanted: float | None) -> None:
    found = longest(STREAM, at, seconds)
    assert (found and found.seconds) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    ("noticed", "wanted"),
    [
        pytest.param(11.2, 2.4, id="noticed before the wait"),
        pytest.param(12.0, 2.0, id="in the midst of it"),
        pytest.param(15.0, 0.0, id="after it"),
    ],
)
def test_the_part_of_a_wait_after_the_notice_is_told_apart(noticed: float, wanted: float) -> None:
    found = longest(STREAM, 11.6, 1.0)
    assert found is not None
    assert (found.after(noticed), found.first) == (pytest.approx(wanted), False)


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.5, 0.99)] == [2.0, 4.0]


@pytest.mark.parametrize("scenario", [*SCENARIOS, SLICE], ids=lambda scenario: scenario.name)
def test_a_draw_has_every_fault_equally_often(scenario: Scenario) -> None:
    drawn = scenario.draw(3 * len(scenario.counted), random.Random(1))
    assert all(drawn.count(fault) == 3 * scenario.faults.count(fault) for fault in scenario.faults)


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        pytest.param(["drains"], [100], id="drains alone"),
        pytest.param(["front"], [100], id="faults alone"),
        pytest.param(["engines", "drains"], [100, 20], id="drains come on top"),
    ],
)
def test_faults_are_dealt_out_by_shares(names: list[str], counts: list[int]) -> None:
    assert [count for _, count in _counts([by_name(name) for name in names], 100)] == counts


@pytest.mark.parametrize("count", [1, 7, 100])
def test_drains_are_no_faults(count: int) -> None:
    drawn = SLICE.draw(count, random.Random(1))
    assert sum(fault.harms for fault in drawn) == count
    assert any(not fault.harms for fault in drawn)


@pytest.mark.parametrize(
    ("waits", "missed"),
    [
        ([0.2, 0.9], ""),
        ([], ""),
        ([0.2, 1.2], "kill decode: p99 of the next token after the notice is 1.20 s, not 1 s"),
    ],
)
def test_an_aim_that_is_missed_is_told(waits: list[float], missed: str) -> None:
    killed = Happening(kind="kill decode leader main", at=10.0, noticed=0.5)
    found = Aim(kinds="kill decode", wait="next_after", within=1.0).missed(
        msgspec.structs.replace(row, next_after=waits) for row in rows([killed], [], {})
    )
    assert found.startswith(missed)
    assert bool(found) == bool(missed)


LISTEN = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(("run", "found"), [("mine", True), ("another", False)])
def test_a_port_that_another_fleet_has_taken_is_not_left_over(run: str, found: bool) -> None:
    command = [sys.executable, "-S", "-c", LISTEN]
    environment = {**os.environ, RUN_VARIABLE: run}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as listener:
        assert listener.stdout is not None
        port = int(listener.stdout.readline())
        left = nothing_left("mine", shared_memory(), [], {port})
        listener.communicate()
    assert left == ([f"ports [{port}] are still listened on"] if found else [])
