"""What a host process tells the command that started it: JSON lines on a pipe."""

from __future__ import annotations

import contextlib
from typing import IO

import msgspec

from tandem.core.types import Group


class Step(msgspec.Struct, frozen=True, tag="step"):
    """A part of the start that began (`seconds` is None) or ended."""

    name: str
    seconds: float | None = None


class Groups(msgspec.Struct, frozen=True, tag="groups"):
    """The groups as they are now."""

    groups: tuple[Group, ...]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The fleet answers."""

    http: str
    control: str
    seconds: float
    """Since the host started."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The fleet could not start, or ended; one sentence."""

    why: str


Message = Step | Groups | Ready | Failed

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def read_message(line: bytes) -> Message:
    """Decode one line."""
    return _decoder.decode(line)


class Teller:
    """Writes messages; one that nobody listens to any more is not an error."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def tell(self, message: Message) -> None:
        """Send `message`."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(msgspec.json.encode(message) + b"\n")
            self._pipe.flush()
