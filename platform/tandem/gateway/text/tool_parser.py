"""Splits an answer's content into text and tool calls, across any chunk borders; arguments go out as they come.

What looks like a call but has no function's name is text, as it stands. White space next to calls belongs to them. A
call whose end is missing ends with the answer, and one without arguments has the empty object.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from tandem.gateway.api.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, NAME, SEP, ToolFormat
from tandem.gateway.text.pieces import ToolDelta

_FENCE = "```"
_OPENING_FENCE = re.compile(r"\s*```[a-zA-Z]*\s*")
_NAME_END = re.compile(r"\n|```|\{|" + re.escape(CALL_END))
_MARKERS = (CALLS_BEGIN, CALL_BEGIN, CALLS_END, CALL_END, SEP)


class Parsed(NamedTuple):
    """New text, and news of calls."""

    content: str
    tools: list[ToolDelta]


class _At(Enum):
    TEXT = 0
    """Outside of calls."""
    BETWEEN = 1
    """Inside the list, before a call."""
    HEAD = 2
    """After `<｜tool▁call▁begin｜>`: what is called."""
    ARGUMENTS = 3


class ToolParser:
    """`feed` content, get what is decided; `end` for what was held back."""

    def __init__(self, form: ToolFormat, *, parallel: bool = True, new_id: Callable[[], str] | None = None) -> None:
        """`parallel`: more than one call may come; else the answer is `complete` after the first."""
        self._form = form
        self._parallel = parallel
        self._new_id = new_id or (lambda: "call_" + uuid.uuid4().hex[:24])
        self._at = _At.TEXT
        self._text = ""
        """Not decided yet."""
        self._raw = ""
        """The markers of a list or call that has not proved to be one."""
        self._fenced = False
        self._written = False
        """Whether the call has arguments so far."""
        self._skip = False
        """White space is dropped until something else comes."""
        self.calls = 0
        self.complete = False
        """The one call that was wanted is there."""

    @property
    def held(self) -> int:
        """Characters at the end that are not decided yet."""
        return len(self._raw) + len(self._text)

    @property
    def calling(self) -> bool:
        """Inside a call whose function is known."""
        return self._at is _At.ARGUMENTS

    def feed(self, text: str) -> Parsed:
        if self.complete:
            return Parsed("", [])
        self._text += text
        return self._run(last=False)

    def end(self) -> Parsed:
        """The answer is over."""
        if self.complete:
            return Parsed("", [])
        return self._run(last=True)

    def _run(self, *, last: bool) -> Parsed:
        content, tools, more = self._step(last)
        while more and not self.complete:
            further, calls, more = self._step(last)
            content += further
            tools += calls
        return Parsed(content, tools)

    def _step(self, last: bool) -> tuple[str, list[ToolDelta], bool]:
        """(new text, news of calls, whether there is more to look at)."""
        if self._at is _At.TEXT:
            return self._in_text(last)
        if self._at is _At.ARGUMENTS:
            return self._arguments(last)
        return self._head(last) if self._at is _At.HEAD else self._between(last)

    def _in_text(self, last: bool) -> tuple[str, list[ToolDelta], bool]:
        if self._skip:
            self._text = self._text.lstrip()
            self._skip = not self._text
        text = self._text
        if "<" not in text:
            keep = len(text) if last else len(text.rstrip())
            self._text = text[keep:]
            return text[:keep], [], False
        found = [(start, marker) for marker in (CALLS_BEGIN, CALL_BEGIN) if (start := text.find(marker)) >= 0]
        if found:
            start, marker = min(found)
            # The white space before it goes with it, and comes back if it turns out to be no call.
            before = text[:start].rstrip()
            self._raw = text[len(before) : start + len(marker)]
            self._text = text[start + len(marker) :]
            self._at = _At.HEAD if marker == CALL_BEGIN else _At.BETWEEN
            return before, [], True
        keep = len(text) if last else _decided(text)
        self._text = text[keep:]
        return text[:keep], [], False

    def _between(self, last: bool) -> tuple[str, list[ToolDelta], bool]:
        text = self._text.lstrip()
        if text.startswith(CALL_BEGIN):
            self._raw += self._text[: len(self._text) - len(text)] + CALL_BEGIN
            self._text = text[len(CALL_BEGIN) :]
            self._at = _At.HEAD
            return "", [], True
        if text.startswith(CALLS_END):
            raw = "" if self.calls else self._raw + self._text[: len(self._text) - len(text)] + CALLS_END
            self._raw, self._text, self._at = "", text[len(CALLS_END) :], _At.TEXT
            self._skip = bool(self.calls)
            return raw, [], True
        if not last and (CALL_BEGIN.startswith(text) or CALLS_END.startswith(text)):
            return "", [], False
        if last and not text and self.calls:
            self._raw = self._text = ""
            return "", [], False
        return self._give_up()

    def _head(self, last: bool) -> tuple[str, list[ToolDelta], bool]:
        kind, sep, rest = self._text.partition(SEP)
        if not sep:
            return self._wait_for_head(kind, last)
        if self._form is ToolFormat.V31 or kind.strip() != "function":
            # The name itself; a model of R1's format may slip into the other.
            return self._named(kind, rest)
        body = rest.lstrip()
        # The name ends where its line does, or where the arguments or the call do.
        stop = _NAME_END.search(body)
        if stop is None:
            return self._wait_for_head(body, last)
        return self._named(body[: stop.start()], body[stop.start() :])

    def _wait_for_head(self, text: str, last: bool) -> tuple[str, list[ToolDelta], bool]:
        # A head is short and has no other marker in it.
        if last or len(text) > 256 or any(marker in text for marker in _MARKERS):
            return self._give_up()
        return "", [], False

    def _named(self, name: str, rest: str) -> tuple[str, list[ToolDelta], bool]:
        name = name.strip()
        if not NAME.fullmatch(name):
            return self._give_up()
        self._raw, self._text, self._at = "", rest, _At.ARGUMENTS
        self._fenced = self._written = False
        delta = ToolDelta(index=self.calls, id=self._new_id(), name=name)
        self.calls += 1
        return "", [delta], True

    def _arguments(self, last: bool) -> tuple[str, list[ToolDelta], bool]:
        if not self._written and not self._fenced:
            text = self._text.lstrip()
            fence = _OPENING_FENCE.match(self._text)
            if fence is not None and (last or fence.end() < len(self._text)):
                self._fenced, self._text = True, self._text[fence.end() :]
            elif not last and (not text or _FENCE.startswith(text[:3]) or _may_end(text)):
                return "", [], False
        if not self._written:
            self._text = self._text.lstrip()
        text = self._text
        # The end of the list ends a call, too, where the model forgets the call's own.
        found = [(start, marker) for marker in (CALL_END, CALLS_END) if (start := text.find(marker)) >= 0]
        if found or last:
            start, marker = min(found, default=(len(text), ""))
            after = text[start + len(marker) if marker == CALL_END else start :]
            arguments = text[:start].rstrip()
            if self._fenced:
                arguments = arguments.removesuffix(_FENCE).rstrip()
            if not arguments and not self._written:
                arguments = "{}"
            self._text, self._at = after, _At.BETWEEN
            self.complete = not self._parallel
            return "", self._delta(arguments), bool(after) or last
        keep = len(text) - _tail(text)
        self._text = text[keep:]
        return "", self._delta(text[:keep]), False

    def _delta(self, arguments: str) -> list[ToolDelta]:
        if not arguments:
            return []
        self._written = True
        return [ToolDelta(index=self.calls - 1, arguments=arguments)]

    def _give_up(self) -> tuple[str, list[ToolDelta], bool]:
        """What was taken for a call is text; calls may still follow."""
        raw, self._raw, self._at = self._raw, "", _At.TEXT
        return raw, [], True


def _decided(text: str) -> int:
    """Where the part begins that may still turn out to be white space and a marker."""
    # Markers have no second "<", so only the last one can begin one.
    start = text.rfind("<")
    if start < 0 or not (CALLS_BEGIN.startswith(text[start:]) or CALL_BEGIN.startswith(text[start:])):
        start = len(text)
    return len(text[:start].rstrip())


def _may_end(text: str) -> bool:
    """Whether it is the beginning of what ends a call."""
    return CALL_END.startswith(text) or CALLS_END.startswith(text)


def _tail(text: str) -> int:
    """Length of the end that may still turn out to be white space, a closing fence and the end of a call."""
    start = text.rfind("<")
    if start < 0 or not _may_end(text[start:]):
        start = len(text)
    before = text[:start].rstrip()
    ticks = len(before) - len(before.rstrip("`"))
    return len(text) - len(before[: len(before) - min(ticks, 3)].rstrip())
