"""How an engine's processes show their progress: a small memory-mapped file each, in the folder TANDEM_HEARTBEAT_DIR.

The writer pays a clock reading and a few stores for each turn of its loop. The file outlives its writer, and a reader
never waits for it. Every field is one aligned word, so none is ever half written.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tandem.core.heartbeat import Beat, Doing

FOLDER = "TANDEM_HEARTBEAT_DIR"
SUFFIX = ".beat"

_MAGIC = 0x54414E44454D0001
_WORDS = ("magic", "pid", "moves", "turns", "forwards", "doing", "patient", "beat_ns", "since_ns")
_MAGIC_AT, _PID, MOVES, TURNS, FORWARDS, DOING, PATIENT, BEAT_NS, SINCE_NS = range(len(_WORDS))
_NAME_AT = 8 * len(_WORDS)
_NAME = 64
SIZE = _NAME_AT + _NAME

_SETTLE_TURNS = 3
"""Turns of patience after something slow: other ranks may still be at it, and this one waits for them."""

_log = logging.getLogger(__name__)


class Pulse:
    """The writer's side, one for each process. For one thread."""

    def __init__(self, folder: Path, who: str, *, patient: bool = False) -> None:
        """Make the file. `patient`: the first forward pass may take minutes. Raises OSError."""
        self._file = folder / f"{who.replace(' ', '-')}-{os.getpid()}{SUFFIX}"
        name = who.encode()[:_NAME].ljust(_NAME, b"\0")
        head = struct.pack(f"={len(_WORDS)}Q", _MAGIC, os.getpid(), *[0] * (len(_WORDS) - 2))
        begun = self._file.with_suffix(".new")
        begun.write_bytes(head + name)
        with open(begun, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        self._words = memoryview(self._map)[:_NAME_AT].cast("Q")
        self._first = patient
        self._settling = 0
        self._words[PATIENT] = int(patient)
        begun.rename(self._file)

    def turn(self) -> None:
        """The event loop begins a turn."""
        words = self._words
        words[TURNS] += 1
        if self._settling:
            self._settling -= 1
            words[PATIENT] = int(self._first or self._settling > 0)
        self.now(Doing.SCHEDULING)

    def forward(self) -> None:
        """A forward pass begins."""
        self._words[FORWARDS] += 1
        self.now(Doing.FORWARD)

    def forwarded(self) -> None:
        """It has ended."""
        if self._first:
            self._first = False
            self._settling = _SETTLE_TURNS
        self.now(Doing.SCHEDULING)

    def layer(self) -> None:
        """A part of a forward pass ends; of use where a whole one may take seconds."""
        self.now(Doing(self._words[DOING]))

    def control(self) -> None:
        """Something that may take minutes begins; it ends with the next turn but a few."""
        self._words[PATIENT] = 1
        self._settling = max(self._settling, _SETTLE_TURNS)
        self.now(Doing.CONTROL)

    @contextmanager
    def slowly(self) -> Iterator[None]:
        """The same for a part of something else, such as a compiler's run within a forward pass."""
        was = Doing(self._words[DOING])
        self.control()
        try:
            yield
        finally:
            self.now(was)

    def now(self, doing: Doing) -> None:
        """A step of progress: this is what the process does from now on."""
        words = self._words
        now = time.monotonic_ns()
        if words[DOING] != doing:
            words[DOING] = doing
            words[SINCE_NS] = now
        words[BEAT_NS] = now
        words[MOVES] += 1


def open_pulse(who: str, *, patient: bool = False) -> Pulse | None:
    """This process's own; None when nobody asked for it, or the folder does not take it (which is logged)."""
    folder = os.environ.get(FOLDER, "")
    if not folder:
        return None
    try:
        return Pulse(Path(folder), who, patient=patient)
    except OSError as error:
        _log.error("tandem: %s shows no progress, so nobody will notice if it hangs: %s", who, error)
        return None


def read_beats(folder: Path) -> Mapping[int, Beat]:
    """What the processes of an engine last wrote, by PID. A file that makes no sense is left out. Raises OSError."""
    beats = {}
    try:
        files = [entry for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)]
    except FileNotFoundError:
        return {}
    for entry in files:
        try:
            data = Path(entry).read_bytes()
        except FileNotFoundError:
            continue
        if len(data) != SIZE:
            continue
        words = struct.unpack_from(f"={len(_WORDS)}Q", data)
        if words[_MAGIC_AT] != _MAGIC or words[DOING] not in set(Doing):
            continue
        beats[words[_PID]] = Beat(
            who=data[_NAME_AT:].rstrip(b"\0").decode(errors="replace"),
            moves=words[MOVES],
            doing=Doing(words[DOING]),
            patient=bool(words[PATIENT]),
            turns=words[TURNS],
            forwards=words[FORWARDS],
        )
    return beats
