"""What may take minutes in the middle of a turn is marked, and silent prefill groups do not hold decode up."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.engine.plugin import bootstrap, compiling, hook, install, progress

Mark = list[str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Mark:
    said: Mark = []

    @contextmanager
    def slowly() -> Iterator[None]:
        said.append("slow")
        try:
            yield
        finally:
            said.append("done")

    monkeypatch.setattr(progress, "_scheduler", SimpleNamespace(slowly=slowly))
    return said


def test_whoever_waits_for_the_compilers_lock_or_holds_it_is_slow(said: Mark) -> None:
    @contextmanager
    def lock(name: str) -> Iterator[None]:
        said.append(f"lock {name}")
        yield
        said.append("unlock")

    with compiling.under_lock(lock, "gemm"):
        said.append("nvcc")
    assert said == ["slow", "lock gemm", "nvcc", "unlock", "done"]


def test_a_process_that_is_no_scheduler_compiles_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_scheduler", None)

    def lock() -> AbstractContextManager[None]:
        return progress.slowly()

    with compiling.under_lock(lock):
        pass


def test_each_step_of_a_rebalance_is_slow_and_what_is_between_them_is_not(said: Mark) -> None:
    def steps(self: object) -> Iterator[None]:
        said.append("a")
        yield
        said.append("b")

    assert [said.append("forward") for _ in compiling.rebalance(steps, None)] == [None]  # type: ignore[func-returns-value]
    assert said == ["slow", "a", "done", "forward", "slow", "b", "done"]


def test_a_cpu_engine_does_without_the_hooks_for_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {one.target for one in install.hooks()}
    monkeypatch.setenv(install.CPU_SWITCH, "1")
    assert gpu - {one.target for one in install.hooks()} == {one.target for one in compiling.hooks()}


def test_only_needed_hooks_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = SimpleNamespace(HookRegistry=SimpleNamespace(_patched={"a"}))
    monkeypatch.setitem(__import__("sys").modules, "sglang.srt.plugins.hook_registry", registry)
    found = [
        hook.Hook("a", print, "after"),
        hook.Hook("b", print, "after"),
        hook.Hook("c", print, "after", needed=False),
    ]
    assert hook.missing(found) == ["b"]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `frail`: one module is whole, one hides why it cannot be imported, as transformers does."""
    package = tmp_path / "frail"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "whole.py").write_text("class Scheduler: ...\n")
    (package / "torn.py").write_text(
        "try:\n    import no_such_library\nexcept ImportError as e:\n    raise ModuleNotFoundError('no Auto') from e\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("broken")
def test_a_hook_whose_module_cannot_be_imported_is_told_with_what_is_missing() -> None:
    found = hook.broken_import(["frail.whole.Scheduler.turn", "frail.torn.Scheduler.turn"])
    assert found == "frail.torn cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"


@pytest.mark.usefixtures("broken")
def test_a_hook_that_is_missing_for_another_reason_blames_no_import() -> None:
    assert hook.broken_import(["frail.whole.Scheduler.gone", "frail.whole.gone"]) == ""


class Threads:
    """Probes that answer when told."""

    def __init__(self) -> None:
        self.probes: dict[str, Future[bool]] = {}

    def submit(self, work: object, address: str) -> Future[bool]:
        self.probes[address] = Future()
        return self.probes[address]


class Queue:
    """SGLang's, as far as it matters: asks each address it is given, and puts off what has just failed."""

    def __init__(self) -> None:
        self.kv_manager: Any = SimpleNamespace(prefill_info_table={})
        self._ensure_last_attempt_time: dict[str, float] = {}
        self._ensure_retry_interval = 1000.0
        self._ensure_retry_count: dict[str, int] = {}
        self.asked: list[str] = []

    def original(self, waiting: bootstrap.Waiting) -> tuple[bootstrap.Waiting, list[Any]]:
        ((address, requests),) = waiting.items()
        if bootstrap.try_ensure(self.ask, self.kv_manager, address):
            return {address: requests}, []
        self._ensure_last_attempt_time[address] = bootstrap.time.monotonic()
        self._ensure_retry_count[address] = self._ensure_retry_count.get(address, 0) + 1
        return {}, requests

    def ask(self, manager: object, address: str) -> bool:
        self.asked.append(address)
        return True

    def turn(self, *addresses: str) -> tuple[list[str], list[str]]:
        """Addresses that are ready, and those that are not."""
        ready, remaining = bootstrap.ensure(Queue.original, self, {address: [address] for address in addresses})
        return sorted(ready), sorted(remaining)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    threads = Threads()
    monkeypatch.setattr(bootstrap, "_threads", lambda: threads)
    monkeypatch.setattr(bootstrap, "FIRST_S", 0.0)
    return threads


def test_no_turn_waits_for_a_prefill_group_that_is_silent(threads: Threads) -> None:
    queue = Queue()
    queue.kv_manager.prefill_info_table["known"] = object()
    assert queue.turn("a", "b", "c", "known") == (["known"], ["a", "b", "c"])
    threads.probes["b"].set_result(True)
    assert queue.turn("a", "b", "c", "known") == (["b", "known"], ["a", "c"])
    assert queue.asked == ["known", "b", "known"]


def test_silence_counts_as_one_attempt_and_sglang_does_not_ask_again(threads: Threads) -> None:
    queue = Queue()
    queue.turn("a")
    threads.probes["a"].set_result(False)
    assert queue.turn("a") == ([], ["a"])
    assert (queue._ensure_retry_count, queue.asked) == ({"a": 1}, [])


def test_the_next_probe_begins_when_sglang_would_try_again(threads: Threads) -> None:
    queue = Queue()
    queue.turn("a")
    (first := threads.probes["a"]).set_result(False)
    queue.turn("a")
    queue.turn("a")
    assert threads.probes["a"] is first
    queue._ensure_retry_interval = 0.0
    queue.turn("a")
    assert threads.probes["a"] is not first


def test_an_address_that_nobody_waits_for_is_forgotten(threads: Threads) -> None:
    queue = Queue()
    queue.turn("a")
    queue.turn("b")
    assert list(vars(queue)[bootstrap._PROBES]) == ["b"]


class Clock:
    """Bootstrap servers; the silent ones take as long as they may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *silent: str) -> None:
        self.now, self.silent, self.asked = 100.0, silent, list[str]()
        monkeypatch.setattr(bootstrap, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(bootstrap, "_turn", bootstrap._Turn())

    def fetch(self, receiver: Any) -> object:
        self.asked.append(receiver.bootstrap_addr)
        if receiver.bootstrap_addr not in self.silent:
            return {"rank_ip": "10.0.0.1"}
        self.now += bootstrap.ANSWER_S
        return None

    def turn(self, *addresses: str) -> list[bool]:
        """Which of the addresses answer, asked in this order."""
        bootstrap.turn(None)
        return [bootstrap.fetch(self.fetch, SimpleNamespace(bootstrap_addr=one)) is not None for one in addresses]


def test_a_silent_server_is_asked_once_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, "a")
    assert clock.turn("a", "a", "b", "a") == [False, False, True, False]
    assert clock.asked == ["a", "b"]


def test_many_silent_servers_take_less_of_a_turn_than_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, *"abcdef")
    clock.turn(*"abcdef")
    assert clock.now - 100.0 < 6.0


def test_in_the_next_turn_everybody_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, "a", "b")
    assert clock.turn("a", "b", "c") == [False, False, False]
    assert clock.turn("c") == [True]


def test_a_refusal_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    receiver = SimpleNamespace(bootstrap_addr="a")
    assert bootstrap.fetch(lambda self: None, receiver) is None
    assert clock.turn("a") == [True]


def test_a_kept_session_waits_for_a_short_time_only() -> None:
    told: list[Any] = []
    adapter = type("Adapter", (), {"send": lambda self, request, **options: told.append(options["timeout"])})()
    session = SimpleNamespace(get_adapter=lambda url: adapter)
    bootstrap.hasten(session, "a")
    first = adapter.send
    bootstrap.hasten(session, "a")
    adapter.send("GET", timeout=5, stream=False)
    assert (told, adapter.send) == ([bootstrap.ANSWER_S], first)
