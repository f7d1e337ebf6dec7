"""Tandem's hooks in SGLang, with small objects in SGLang's place. With SGLang: tests/engine/test_engine_plugin.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tandem.core.heartbeat import Doing
from tandem.engine.plugin import grammars, install, progress, reap
from tandem.engine.plugin.resume import ResumeError, resumed_tokens
from tandem.gateway.pairing.engine_body import RESUMED as GATEWAYS_NAME


class Grammar:
    """Accepts the given tokens in this order, then is over."""

    def __init__(self, *tokens: int) -> None:
        self.left = list(tokens)
        self.current_token: int | None = None

    def is_terminated(self) -> bool:
        return not self.left

    def accept_token(self, token: int) -> None:
        if token != self.left[0]:
            raise ValueError(f"secret words of the request, not {token}")
        self.current_token = self.left.pop(0)


class Request:
    def __init__(self, ids: list[int], resumed: object = None, grammar: object = None) -> None:
        params = None if resumed is None else {GATEWAYS_NAME: resumed}
        self.sampling_params = SimpleNamespace(custom_params=params)
        self.origin_input_ids = ids
        self.grammar = grammar
        self.to_finish: str | None = None

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish, self.grammar, self.origin_input_ids = message, None, [0]


def compiled(waits: bool = False) -> Any:
    return lambda self, request: waits


def test_the_last_tokens_are_what_was_said_before() -> None:
    assert resumed_tokens(Request([1, 2, 3, 4], 2)) == [3, 4]


@pytest.mark.parametrize("resumed", [None, 0])
def test_a_request_that_began_here_has_none(resumed: object) -> None:
    assert resumed_tokens(Request([1, 2, 3, 4], resumed)) == []


@pytest.mark.parametrize("resumed", [4, 5, -1, "2", 1.0, True, [1]])
def test_a_number_that_cannot_be_is_refused(resumed: object) -> None:
    with pytest.raises(ResumeError, match=r"tandem_resumed is .*; it must be a number of tokens, at least 0 and fewer"):
        resumed_tokens(Request([1, 2, 3, 4], resumed))


def test_a_grammar_that_is_there_reads_at_once_and_waits_for_prefills_token() -> None:
    request = Request([1, 2, 3, 4], 2, Grammar(3, 4, 5))
    assert grammars.read_at_once(compiled(), None, request) is False
    assert request.grammar.left == [5]  # type: ignore[attr-defined]
    assert request.grammar.current_token is None  # type: ignore[attr-defined]


def test_a_grammar_that_is_still_compiled_reads_when_it_is_ready() -> None:
    request = Request([1, 2, 3, 4], 2, Grammar(3, 4, 5))
    assert grammars.read_at_once(compiled(waits=True), None, request) is True
    assert request.grammar.left == [3, 4, 5]  # type: ignore[attr-defined]
    assert grammars.read_when_compiled([request], None) == [request]
    assert request.grammar.left == [5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar(3, 5, 6), "the output to resume does not fit its grammar, from token 1 of 2"),
        (Grammar(3), "the output to resume goes on behind the end of its grammar, from token 1 of 2"),
        (Grammar(3, 4), "the output to resume is complete"),
    ],
)
def test_output_that_does_not_fit_ends_the_request_and_repeats_none_of_its_words(grammar: Grammar, why: str) -> None:
    request = Request([1, 2, 3, 4], 2, grammar)
    grammars.read_at_once(compiled(), None, request)
    assert request.to_finish == why


def test_a_bad_number_ends_the_request_before_it_gets_a_grammar() -> None:
    request = Request([1, 2, 3, 4], 9)
    assert grammars.read_at_once(lambda *_: pytest.fail("it asked for a grammar"), None, request) is False
    assert request.to_finish is not None


def test_an_aborted_request_is_left_alone() -> None:
    request = Request([1, 2, 3, 4], 2, Grammar(3, 4, 5))
    request.set_finish_with_abort("the client went away")
    assert grammars.read_when_compiled([request], None) == [request]
    assert request.to_finish == "the client went away"


class Tokenizer:
    """The requests of an engine, and the aborts that reach SGLang."""

    def __init__(self, *rids: str) -> None:
        self.rid_to_state = {rid: SimpleNamespace(abort_sent=False) for rid in rids}
        self.told: list[tuple[str, bool]] = []

    def abort(self, rid: str = "", abort_all: bool = False) -> None:
        reap.abort(Tokenizer.original, self, rid=rid, abort_all=abort_all)

    def original(self, rid: str = "", abort_all: bool = False) -> None:
        if rid in self.rid_to_state:
            if self.rid_to_state[rid].abort_sent:
                return
            self.rid_to_state[rid].abort_sent = True
        self.told.append((rid, abort_all))


def test_a_star_ends_every_request_of_that_prefix_and_no_other() -> None:
    engine = Tokenizer("aaaabbbbcccc-1", "aaaabbbbcccc-2", "aaaabbbbccccd-3", "ddddbbbbcccc-1")
    engine.abort("aaaabbbbcccc-*")
    assert engine.told == [("aaaabbbbcccc-1", False), ("aaaabbbbcccc-2", False)]


@pytest.mark.parametrize("rid", ["aaaabbbbcccc-*", "aaaabbbbcccc-1"])
def test_an_abort_may_be_repeated_until_its_requests_are_gone(rid: str) -> None:
    engine = Tokenizer("aaaabbbbcccc-1")
    engine.abort(rid)
    engine.abort(rid)
    assert engine.told == [("aaaabbbbcccc-1", False)] * 2


@pytest.mark.parametrize("rid", ["*", "aaaabbb*"])
def test_a_prefix_that_is_too_short_ends_nobodys(rid: str) -> None:
    engine = Tokenizer("aaaabbbbcccc-1")
    engine.abort(rid)
    assert engine.told == []


@pytest.mark.parametrize("call", [("aaaabbbbcccc-1", False), ("", True), ("unknown", False)])
def test_other_aborts_are_sglangs_own(call: tuple[str, bool]) -> None:
    engine = Tokenizer("aaaabbbbcccc-1")
    engine.abort(*call)
    assert engine.told == [call]


def pulse(sink: list[str]) -> Any:
    return SimpleNamespace(control=lambda: sink.append("control"), now=lambda doing: sink.append(doing.name))


class UpdateWeightFromDiskReqInput: ...


class GetInternalStateReq: ...


@pytest.mark.parametrize(
    ("requests", "marked"),
    [([], []), ([GetInternalStateReq()], []), ([GetInternalStateReq(), UpdateWeightFromDiskReqInput()], ["control"])],
)
def test_only_what_may_take_minutes_is_given_minutes(requests: list[object], marked: list[str]) -> None:
    sink: list[str] = []
    progress.control(SimpleNamespace(**{progress.PULSE: pulse(sink)}), requests)
    assert sink == marked


def test_an_engine_without_a_folder_for_heartbeats_works() -> None:
    owner = SimpleNamespace()
    for step in (progress.forward, progress.idle, progress.detokenizing):
        step(owner)
    progress.forwarded("result", owner)
    progress.control(owner, [UpdateWeightFromDiskReqInput()])


def test_a_detokenizer_waits_or_works() -> None:
    sink: list[str] = []
    owner = SimpleNamespace(**{progress.PULSE: pulse(sink)})
    progress.detokenizing(owner)
    progress.detokenized("result", owner)
    assert sink == [Doing.WORKING.name, Doing.WAITING.name]


def test_another_sglang_is_refused_with_one_sentence() -> None:
    with pytest.raises(install.PluginError, match=r"SGLang is 0\.6\.0, but Tandem's hooks know only 0\.5\.23: install"):
        install.check_sglang(lambda package: "0.6.0")


def test_a_build_of_the_same_sglang_is_taken() -> None:
    install.check_sglang(lambda package: "0.5.23+cu130")
