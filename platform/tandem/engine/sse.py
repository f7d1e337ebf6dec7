"""A parser of server-sent events, fed in pieces of any size.

Only `data:` fields matter to SGLang's streams; comments and other fields are skipped. Follows the WHATWG event-stream
format: lines end with LF, CRLF or CR, an empty line ends an event, several `data` lines are joined by LF.
"""

from __future__ import annotations


class EventTooLong(ValueError):
    """One event is larger than the limit: the peer does not speak this protocol."""


class SseParser:
    """`feed` returns the data of every event that has become complete."""

    def __init__(self, *, limit: int = 64 * 2**20) -> None:
        """`limit`: bytes that one unfinished event may take."""
        self._limit = limit
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Take the next bytes; raises EventTooLong."""
        if (
            piece.startswith(b"data: ")
            and piece.endswith(b"\n\n")
            and piece.count(b"\n") == 2
            and b"\r" not in piece
            and not (self._rest or self._data or self._after_cr)
        ):
            # One whole event, as nearly all are.
            return [piece[6:-2]]
        if self._after_cr and piece:
            # A CRLF that was split between the two.
            self._after_cr = False
            if piece[:1] == b"\n":
                piece = piece[1:]
        text = self._rest + piece if self._rest else piece
        if b"\r" in text:
            self._after_cr = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = text.split(b"\n")
        self._rest = lines.pop()
        events: list[bytes] = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
                    self._size = 0
            elif line.startswith(b"data:"):
                value = line[6:] if line[5:6] == b" " else line[5:]
                self._data.append(value)
                self._size += len(value)
        if len(self._rest) + self._size > self._limit:
            raise EventTooLong(f"an event of the stream is longer than {self._limit} bytes")
        return events
