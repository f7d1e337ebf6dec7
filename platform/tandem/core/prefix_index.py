"""Which prefill DP ranks hold the KV of which prompt prefixes. Pure; bounded in bytes; never a scan.

One entry per block of `block_tokens` tokens, found by its chained key (`block_hash.py`), with the set of ranks that
hold it as the bits of an int, so that one walk over a prompt's blocks finds how far *every* rank has it. A rank is in
an entry
- exactly, because its engine has said so (`stored`), until it says the contrary (`removed`, `cleared`);
- approximately, because a prompt with this block was sent there (`note`), for half to all of `approximate_s` seconds.
  An engine's own word replaces it.

Engines name blocks by hashes of their own. These are taken as opaque, but as names of contents: two engines that use
one name mean the same prefix (SGLang's are SHA-256 over all tokens so far). An engine's page may be smaller than a
block: then the blocks fill up page by page, and the pages in between are remembered, since a later prefix may branch
off at any of them.

Ranks come and go without their entries being touched: a removal raises the index's generation, and what an entry has of
an older generation is sorted out when it is next looked at. So `leave` and `cleared` cost the same for any size.

When the bytes are used up, the blocks go that were stored or noted longest ago, of one prompt the last block first. An
exact entry that was dropped is missed until the engine stores it anew: the index then promises less than there is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from sys import getsizeof
from typing import NamedTuple

import msgspec

from tandem.core.block_hash import KEY_BYTES, ROOT, TOKEN_BYTES, block_keys, next_key, pack
from tandem.core.memory import MOST_SLOTS, NODE_BYTES, SLOT_BYTES, allocated, int_bytes, most_entries

BLOCK_TOKENS = 64
"""SGLang's page size for R1 on GPUs, and a multiple of all smaller ones in use."""
MAX_BYTES = 128 * 2**20
LEAST_BYTES = 6144
_EMPTY_BYTES = 1024
"""Taken before anything is stored."""
_INNER_SHARE = 8
"""One part in so many of the bytes may hold pages that end inside a block."""


class Worker(NamedTuple):
    """A DP rank of one epoch of a prefill group: what holds KV of its own."""

    group: str
    epoch: int
    dp_rank: int


class _Block(msgspec.Struct, gc=False):
    """Who holds one block. Not tracked by the garbage collector: there may be a million, and none in a cycle."""

    name: int | None
    """The engines' hash of it; None while no engine has stored it."""
    generation: int
    """Of the index, when the entry was last written."""
    exact: int = 0
    young: int = 0
    """Noted in the time window `window`."""
    old: int = 0
    """Noted in the window before it."""
    window: int = 0


_INNER_TABLE = NODE_BYTES + MOST_SLOTS * SLOT_BYTES
_NAME = allocated(getsizeof(2**63 - 1))
_ENTRY = allocated(getsizeof(_Block(None, 0))) + allocated(getsizeof(bytes(KEY_BYTES))) + _NAME
_BLOCK = _ENTRY + NODE_BYTES


class PrefixIndex:
    """See the module. `now` is in seconds of any clock that never goes back."""

    def __init__(
        self, *, block_tokens: int = BLOCK_TOKENS, max_bytes: int = MAX_BYTES, approximate_s: float = 60.0
    ) -> None:
        if max_bytes < LEAST_BYTES:
            raise ValueError(f"a prefix index of {max_bytes} bytes holds nothing: give it {LEAST_BYTES} at least")
        self.block_tokens = block_tokens
        self.max_bytes = max_bytes
        self.evicted = 0
        """Blocks given up for want of room."""
        self.orphans = 0
        """Stored blocks that could not be placed, as what they follow was not known."""
        self._block_bytes = block_tokens * TOKEN_BYTES
        self._half_s = approximate_s / 2
        self._most_inner_bytes = max_bytes // _INNER_SHARE
        self._budget = max_bytes - self._most_inner_bytes - _EMPTY_BYTES
        self._most, self._tables = most_entries(self._budget, _BLOCK)
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        """Key → holders; what was used last is at the end."""
        self._names: dict[int, bytes] = {}
        """Engine's hash of a block → key."""
        self._inner: OrderedDict[int, bytes] = OrderedDict()
        """Engine's hash of a page that ends inside a block → key of the last whole block + packed ids since."""
        self._inner_bytes = 0
        self._mask_bytes = 0
        self._slots: dict[Worker, int] = {}
        self._free: list[int] = []
        self._bits: list[int] = []
        """The bit of each slot, one object that all entries share."""
        self._alive = 0
        self._generation = 0
        self._died: list[int] = []
        """For each slot the generation that ended all it held before."""
        self._ended: dict[int, int] = {}
        """Generation → bits of all slots that ended something after it."""

    # Ranks

    def join(self, worker: Worker) -> int:
        """Admit a rank, which holds nothing yet; return its slot: its place in what `match` returns. Idempotent."""
        slot = self._slots.get(worker)
        if slot is not None:
            return slot
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._bits)
            self._bits.append(1 << slot)
            self._died.append(0)
        self._slots[worker] = slot
        self._alive |= self._bits[slot]
        return slot

    def leave(self, worker: Worker) -> None:
        """Forget a rank and all it holds."""
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        self._alive &= ~self._bits[slot]
        self._end(slot)
        self._free.append(slot)

    @property
    def workers(self) -> list[Worker]:
        """The ranks that have joined."""
        return list(self._slots)

    # What engines say

    def stored(
        self, worker: Worker, hashes: Sequence[int], parent: int | None, tokens: Sequence[int], page_tokens: int
    ) -> bool:
        """The rank holds further pages, which follow the page `parent` (None = the beginning).

        Returns whether they could be taken: not when the rank is unknown, when nothing is known of `parent`, or when
        whole pages do not make a block. Raises OverflowError or TypeError for what are no token ids.
        """
        slot = self._slots.get(worker)
        if slot is None or not self.fits(page_tokens) or len(tokens) != len(hashes) * page_tokens:
            return False
        so_far = self._so_far(parent)
        if so_far is None:
            self.orphans += len(hashes)
            return False
        packed, page = pack(tokens), page_tokens * TOKEN_BYTES
        whole: list[tuple[bytes, int]] = []
        for place, name in enumerate(hashes):
            so_far += packed[place * page : (place + 1) * page]
            if len(so_far) < KEY_BYTES + self._block_bytes:
                self._remember_inner(name, so_far)
            else:
                so_far = next_key(so_far[:KEY_BYTES], so_far[KEY_BYTES:])
                whole.append((so_far, name))
        for key, name in reversed(whole):
            self._hold(key, name, slot)
        return True

    def removed(self, worker: Worker, hashes: Sequence[int]) -> None:
        """The rank holds these pages no longer. Pages that are not known are ignored."""
        slot = self._slots.get(worker)
        if slot is None:
            return
        bit = self._bits[slot]
        for name in hashes:
            # A page inside a block takes no block with it: the block's last page is removed before it.
            key = self._names.get(name)
            block = self._blocks.get(key) if key is not None else None
            if block is not None:
                self._renew(block)
                self._write(block, block.exact & ~bit, block.young & ~bit, block.old & ~bit)

    def cleared(self, worker: Worker) -> None:
        """The rank holds nothing any more, or what it holds is not known."""
        slot = self._slots.get(worker)
        if slot is not None:
            self._end(slot)

    def fits(self, page_tokens: int) -> bool:
        """Whether whole pages of this size make a block."""
        return page_tokens > 0 and self.block_tokens % page_tokens == 0

    # What routing knows

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        """The keys of a prompt's whole blocks. Raises OverflowError or TypeError for what are no token ids."""
        return block_keys(prompt, self.block_tokens)

    def note(self, worker: Worker, keys: Sequence[bytes], now: float) -> None:
        """A prompt with these blocks was sent to the rank, which will soon hold them."""
        slot = self._slots.get(worker)
        if slot is None:
            return
        bit, window, generation = self._bits[slot], self._window(now), self._generation
        blocks = self._blocks
        for key in reversed(keys):
            block = blocks.get(key)
            if block is None:
                block = self._make(key)
                block.young, block.window = bit, window
                continue
            blocks.move_to_end(key)
            if block.generation != generation:
                self._renew(block)
            young, old = block.young, block.old
            if block.window != window:
                young, old = 0, young if block.window == window - 1 else 0
                block.window = window
            elif young & bit:
                continue
            if not block.exact & bit:
                young = young | bit if young else bit
            self._write(block, block.exact, young, old)

    def match(self, keys: Sequence[bytes], now: float) -> list[int]:
        """For each slot the number of leading blocks that its rank holds, exactly or approximately."""
        found = [0] * len(self._bits)
        left, window, generation = self._alive, self._window(now), self._generation
        blocks = self._blocks
        depth = 0
        for key in keys:
            block = blocks.get(key)
            if block is None:
                break
            holders = block.exact
            if block.window == window:
                holders |= block.young | block.old
            elif block.window == window - 1:
                holders |= block.young
            if block.generation != generation:
                holders &= ~self._ended_since(block.generation)
            gone = left & ~holders
            if gone:
                left &= holders
                _spread(gone, depth, found)
                if not left:
                    return found
            depth += 1
        _spread(left, depth, found)
        return found

    def confirmed(self, worker: Worker, key: bytes) -> bool:
        """Whether the rank's engine itself has said that it holds this block."""
        slot, block = self._slots.get(worker), self._blocks.get(key)
        if slot is None or block is None:
            return False
        return bool(block.exact & ~self._ended_since(block.generation) & self._bits[slot])

    # Size

    def __len__(self) -> int:
        """Blocks that are known."""
        return len(self._blocks)

    @property
    def size(self) -> int:
        """Bytes that the index takes now."""
        tables = getsizeof(self._blocks) + getsizeof(self._names) + getsizeof(self._inner)
        return tables + len(self._blocks) * _ENTRY + self._mask_bytes + self._inner_bytes

    # Inside

    def _so_far(self, parent: int | None) -> bytes | None:
        """Key of the last whole block up to the page `parent`, and the packed ids after it; None = not known."""
        if parent is None:
            return ROOT
        key = self._names.get(parent)
        return key if key is not None else self._inner.get(parent)

    def _remember_inner(self, name: int, so_far: bytes) -> None:
        if name in self._inner:
            self._inner.move_to_end(name)
            self._inner_bytes += allocated(getsizeof(so_far)) - allocated(getsizeof(self._inner[name]))
        else:
            self._inner_bytes += allocated(getsizeof(so_far)) + _NAME
        self._inner[name] = so_far
        while self._inner_bytes + len(self._inner) * _INNER_TABLE > self._most_inner_bytes and self._inner:
            _, dropped = self._inner.popitem(last=False)
            self._inner_bytes -= allocated(getsizeof(dropped)) + _NAME

    def _hold(self, key: bytes, name: int, slot: int) -> None:
        block = self._blocks.get(key)
        if block is None:
            block = self._make(key)
        else:
            self._blocks.move_to_end(key)
            self._renew(block)
        if block.name != name:
            self._unname(key, block)
            block.name = name
            self._names[name] = key
        bit = self._bits[slot]
        self._write(block, block.exact | bit if block.exact else bit, block.young & ~bit, block.old & ~bit)

    def _make(self, key: bytes) -> _Block:
        """A new block, once there is room for it. Whoever makes several begins with the last of the prompt, so that
        the first is given up last."""
        blocks = self._blocks
        while len(blocks) >= self._most or (
            self._mask_bytes and blocks and self._tables + len(blocks) * _BLOCK + self._mask_bytes > self._budget
        ):
            dropped, block = blocks.popitem(last=False)
            self._unname(dropped, block)
            self._mask_bytes -= _weight(block)
            self.evicted += 1
        block = blocks[key] = _Block(None, self._generation)
        return block

    def _unname(self, key: bytes, block: _Block) -> None:
        if block.name is not None and self._names.get(block.name) == key:
            del self._names[block.name]

    def _write(self, block: _Block, exact: int, young: int, old: int) -> None:
        self._mask_bytes -= _weight(block)
        block.exact, block.young, block.old = exact, young, old
        self._mask_bytes += _weight(block)

    def _end(self, slot: int) -> None:
        self._generation += 1
        self._died[slot] = self._generation
        self._ended.clear()

    def _ended_since(self, generation: int) -> int:
        """The bits of all slots that ended something after this generation."""
        if generation == self._generation:
            return 0
        bits = self._ended.get(generation)
        if bits is None:
            bits = 0
            for bit, died in zip(self._bits, self._died, strict=True):
                if died > generation:
                    bits |= bit
            self._ended[generation] = bits
        return bits

    def _renew(self, block: _Block) -> None:
        """Take out of a block what has ended since it was written."""
        if block.generation != self._generation:
            left = ~self._ended_since(block.generation)
            block.generation = self._generation
            self._write(block, block.exact & left, block.young & left, block.old & left)

    def _window(self, now: float) -> int:
        return int(now / self._half_s)


def _weight(block: _Block) -> int:
    """Bytes of a block's holders. A single one's bit is shared by all blocks, and so are the smallest ints."""
    exact, young, old = block.exact, block.young, block.old
    total = 0
    if exact > 256 and exact & (exact - 1):
        total += int_bytes(exact)
    if young > 256 and young & (young - 1):
        total += int_bytes(young)
    if old > 256 and old & (old - 1):
        total += int_bytes(old)
    return total


def _spread(bits: int, depth: int, found: list[int]) -> None:
    """Set the depth of all slots in `bits`."""
    while bits:
        low = bits & -bits
        found[low.bit_length() - 1] = depth
        bits ^= low
