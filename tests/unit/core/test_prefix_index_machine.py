"""The prefix index against a model that keeps everything, with engines that store, evict, clear and restart."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.core.prefix_index import PrefixIndex, Worker

BLOCK = 4
TTL = 60.0
Prefix = tuple[int, ...]
prompts = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=13).map(tuple)
ranks = st.integers(0, 2)


class Engine:
    """A prefix cache of pages, as an engine keeps it; each change as the event that it would publish."""

    def __init__(self, worker: Worker, page: int) -> None:
        self.worker = worker
        self.page = page
        self.pages: set[Prefix] = set()

    def insert(self, prompt: Prefix, index: PrefixIndex) -> None:
        whole = len(prompt) // self.page * self.page
        known = 0
        while known < whole and prompt[: known + self.page] in self.pages:
            known += self.page
        if known == whole:
            return
        fresh = [prompt[: end + self.page] for end in range(known, whole, self.page)]
        self.pages |= set(fresh)
        parent = hash(prompt[:known]) if known else None
        index.stored(self.worker, [hash(page) for page in fresh], parent, prompt[known:whole], self.page)

    def evict(self, index: PrefixIndex) -> None:
        """Some leaf goes."""
        leaf = max(self.pages, key=lambda page: (len(page), page))
        self.pages.discard(leaf)
        index.removed(self.worker, [hash(leaf)])

    def holds(self, block: Prefix) -> bool:
        return block in self.pages


class IndexMachine(RuleBasedStateMachine):
    max_bytes = 2**22

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(block_tokens=BLOCK, max_bytes=self.max_bytes, approximate_s=TTL)
        self.engines: dict[int, Engine] = {}
        self.noted: dict[tuple[Worker, Prefix], int] = {}
        self.epoch = 0
        self.now = 0.0

    @rule(rank=ranks, page=st.sampled_from([1, 2, 4]))
    def start(self, rank: int, page: int) -> None:
        """A rank starts, or starts anew with nothing."""
        self.stop(rank)
        self.epoch += 1
        engine = self.engines[rank] = Engine(Worker("prefill-0", self.epoch, rank), page)
        self.index.join(engine.worker)

    @rule(rank=ranks)
    def stop(self, rank: int) -> None:
        engine = self.engines.pop(rank, None)
        if engine is not None:
            self.index.leave(engine.worker)
            engine.insert((1, 2, 1, 2), self.index)  # what it still says is nobody's

    @rule(rank=ranks, prompt=prompts)
    def compute(self, rank: int, prompt: Prefix) -> None:
        engine = self.engines.get(rank)
        if engine is not None:
            engine.insert(prompt, self.index)
            for block in blocks(prompt):
                if engine.holds(block):
                    self.confirm(engine, block)

    @rule(rank=ranks)
    def evict(self, rank: int) -> None:
        engine = self.engines.get(rank)
        if engine is not None and engine.pages:
            engine.evict(self.index)

    @rule(rank=ranks)
    def clear(self, rank: int) -> None:
        engine = self.engines.get(rank)
        if engine is not None:
            engine.pages.clear()
            self.index.cleared(engine.worker)
            self.noted = {key: window for key, window in self.noted.items() if key[0] != engine.worker}

    @rule(rank=ranks, prompt=prompts)
    def route(self, rank: int, prompt: Prefix) -> None:
        engine = self.engines.get(rank)
        if engine is not None:
            self.index.note(engine.worker, self.index.keys(prompt), self.now)
            for block in blocks(prompt):
                self.note(engine, block)

    @rule(seconds=st.sampled_from([1.0, 20.0, 31.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.engines)
    @rule(prompt=prompts)
    def look(self, prompt: Prefix) -> None:
        found = self.index.match(self.index.keys(prompt), self.now)
        for engine in self.engines.values():
            self.compare(found[self.index.join(engine.worker)], self.depth(engine, prompt))

    def note(self, engine: Engine, block: Prefix) -> None:
        if not engine.holds(block):
            self.noted[engine.worker, block] = self.window

    def confirm(self, engine: Engine, block: Prefix) -> None:
        self.noted.pop((engine.worker, block), None)

    def compare(self, found: int, truly: int) -> None:
        assert found == truly

    @invariant()
    def it_keeps_within_its_bytes(self) -> None:
        assert self.index.size <= self.max_bytes

    @property
    def window(self) -> int:
        return int(self.now / (TTL / 2))

    def depth(self, engine: Engine, prompt: Prefix) -> int:
        depth = 0
        for block in blocks(prompt):
            noted = self.noted.get((engine.worker, block))
            if not engine.holds(block) and (noted is None or self.window - noted > 1):
                break
            depth += 1
        return depth


class TinyIndexMachine(IndexMachine):
    """With room for a few blocks only, it may know less than there is, and never more."""

    max_bytes = 6144

    def note(self, engine: Engine, block: Prefix) -> None:
        # It may have dropped what the engine said, so that for all it knows the prompt is new there.
        self.noted[engine.worker, block] = self.window

    def confirm(self, engine: Engine, block: Prefix) -> None:
        """The engine's word may be dropped, and with it the name by which the engine would take it back."""

    def compare(self, found: int, truly: int) -> None:
        assert found <= truly


def blocks(prompt: Prefix) -> list[Prefix]:
    return [prompt[:end] for end in range(BLOCK, len(prompt) + 1, BLOCK)]


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30)
TestTinyIndexMachine = TinyIndexMachine.TestCase
TestTinyIndexMachine.settings = settings(max_examples=40, stateful_step_count=30)
