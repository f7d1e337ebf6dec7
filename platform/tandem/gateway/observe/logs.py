"""Structured logs: one JSON object a line. One line for each request when it is over, and every other record.

No prompt and no answer is in them, unless `log_prompts` asks for it; no secret ever is (`redact`). Lines are formatted
and written by a thread of their own from a bounded queue: a pipe that nobody reads delays no request.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import msgspec

from tandem.core.usage import UsageRecord

requests = logging.getLogger("tandem.request")

OURS = "tandem"
OTHERS = ("asyncio", "grpc", "opentelemetry", "redis")
"""Loggers of libraries that may quote what a client or the configuration has in it. Their warnings go the same way."""
QUEUE = 10_000
"""Records that wait to be written; more are dropped and counted."""
_CLOSE_S = 5.0
_FIELDS = "tandem_fields"
_LONGEST_PROMPT = 32_768

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A key keeps its id, which may be shown: it says which one has leaked.
    (re.compile(r"(tdm-[a-z2-7]{8}-)[A-Za-z0-9_-]+"), r"\1***"),
    (re.compile(r"tdm-(?![a-z2-7]{8}-\*\*\*)[A-Za-z0-9_-]+"), "tdm-***"),
    # JSON web tokens.
    (re.compile(r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"), "***"),
    # "authorization: Bearer x", (b'authorization', b'Bearer x'), {"x-api-key": "x"}, …
    (
        re.compile(
            r"""(?ix) \b((?:proxy-)?authorization|x-api-key|api[-_]?key|cookie)(["']?\s*[:=,]\s*(?:b?["'])?)
            (?!\*\*\*) (?:(?:bearer|basic|digest|token)\s+)? [^\s"',;)}\]]+"""
        ),
        r"\1\2***",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+(?!\*\*\*)[A-Za-z0-9._~+/=-]{8,}"), r"\1 ***"),
    # The password of a URL, also one with an @ in it.
    (re.compile(r"((?<![A-Za-z0-9+.-])[a-zA-Z][a-zA-Z0-9+.-]{0,31}://[^\s:/@\"']*):[^\s/\"',]+@"), r"\1:***@"),
    (
        re.compile(r"""(?i)\b(password|passwd|secret|client_secret)(["']?\s*[:=]\s*["']?)(?!\*\*\*)[^\s"',;)}\]]+"""),
        r"\1\2***",
    ),
)


def redact(text: str) -> str:
    """`text` without the secrets in it: keys, tokens, values of `Authorization`, passwords of URLs."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


class RedactingFilter(logging.Filter):
    """Takes the secrets out of a record, whatever formats it later. Belongs on a handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = redact(record.getMessage())
        record.args = None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message, and what else it has."""

    def __init__(self, **always: str) -> None:
        """`always`: fields of every line, such as fleet and replica."""
        super().__init__()
        self._always = {name: value for name, value in always.items() if value}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._always,
        }
        fields = getattr(record, _FIELDS, None)
        if fields:
            line.update({name: redact(value) if isinstance(value, str) else value for name, value in fields.items()})
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        return _json(line)


class RequestLog:
    """One line at INFO for each request that is over."""

    def __init__(self, *, log_prompts: bool = False) -> None:
        self.log_prompts = log_prompts
        """Whether callers are to hand in what was asked; without it they need not even put it together."""

    def write(
        self,
        record: UsageRecord,
        *,
        status: int,
        request_id: str = "",
        error: str = "",
        prefill: str = "",
        decode: str = "",
        trace_id: str = "",
        prompt: str | None = None,
    ) -> None:
        """`request_id`: what the client was told as `x-request-id`; `prefill` and `decode`: the last pair's groups and
        DP ranks, like `prefill-0/1`; `error`: the sentence that the client was told.
        """
        if not requests.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "request": record.id,
            "request_id": request_id,
            "trace_id": trace_id,
            "tenant": record.tenant,
            "key": record.key,
            "model": record.model,
            "endpoint": record.endpoint,
            "stream": record.stream,
            "status": status,
            "outcome": record.outcome,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "reasoning_tokens": record.reasoning_tokens,
            "seconds": round(record.seconds, 6),
            "ttft_seconds": None if record.ttft_seconds is None else round(record.ttft_seconds, 6),
            "attempts": record.attempts,
            "migrations": record.migrations,
            "prefill": prefill,
            "decode": decode,
        }
        if error:
            fields["error"] = error
        if self.log_prompts and prompt is not None:
            fields["prompt"] = prompt[:_LONGEST_PROMPT]
        requests.info("%s %s", record.endpoint, record.outcome, extra={_FIELDS: fields})


class Logs:
    """Where records go while the gateway runs. `close` writes what waits."""

    def __init__(self, levels: Mapping[logging.Logger, int], handler: _BoundedHandler, out: logging.Handler) -> None:
        self._before = [(logger, logger.level, logger.propagate) for logger in levels]
        self._handler = handler
        self._out = out
        for logger, level in levels.items():
            logger.setLevel(level)
            # What further handlers write would have its secrets in it.
            logger.propagate = False
            logger.addHandler(handler)
        self._thread: threading.Thread | None = threading.Thread(target=self._write, name="tandem-logs", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records that were lost because nobody reads what is written."""
        return self._handler.dropped

    def close(self) -> None:
        """Write what waits, for some seconds at most. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        for logger, level, propagate in self._before:
            logger.removeHandler(self._handler)
            logger.propagate = propagate
            logger.setLevel(level)
        with contextlib.suppress(queue.Full):  # nobody reads: the thread ends with the process
            self._handler.queue.put(None, timeout=_CLOSE_S)
            thread.join(_CLOSE_S)

    def _write(self) -> None:
        while (record := self._handler.queue.get()) is not None:
            self._out.handle(record)


class _BoundedHandler(logging.Handler):
    """Puts records into a queue; never waits."""

    def __init__(self, limit: int, on_drop: Callable[[int], None]) -> None:
        super().__init__()
        self.queue: queue.Queue[logging.LogRecord | None] = queue.Queue(limit)
        self.dropped = 0
        self._on_drop = on_drop

    def emit(self, record: logging.LogRecord) -> None:
        # Arguments are made text here, where they are what they were; the rest is the thread's work.
        record.msg = record.getMessage()
        record.args = None
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            self._on_drop(1)


def configure_logs(
    *,
    json: bool = True,
    level: int = logging.INFO,
    stream: TextIO | None = None,
    logger: logging.Logger | None = None,
    limit: int = QUEUE,
    on_drop: Callable[[int], None] = lambda records: None,
    **always: str,
) -> Logs:
    """Send the records of `logger` (default: all of ours, and the warnings of `OTHERS`) to `stream` (default: stderr).

    Without `json` they are plain lines for people; secrets are taken out either way. `always`: fields of every line.
    """
    levels = {logger or logging.getLogger(OURS): level}
    if logger is None:
        levels |= {logging.getLogger(name): max(level, logging.WARNING) for name in OTHERS}
    out = logging.StreamHandler(stream or sys.stderr)
    out.addFilter(RedactingFilter())
    out.setFormatter(JsonFormatter(**always) if json else PlainFormatter())
    return Logs(levels, _BoundedHandler(limit, on_drop), out)


class PlainFormatter(logging.Formatter):
    """A record as a line for people; a request's fields follow as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, _FIELDS, None) or {}
        told = [f"{name}={redact(str(value))}" for name, value in fields.items() if value not in ("", None)]
        # One record is one line, whatever a client sent as its id.
        return " ".join([super().formatMessage(record), *told]).replace("\n", "\\n").replace("\r", "\\r")


def _json(line: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=repr).decode()
    except UnicodeEncodeError:
        # Half a surrogate pair, from a client's text.
        clean = {
            name: value.encode(errors="replace").decode() if isinstance(value, str) else value
            for name, value in line.items()
        }
        return msgspec.json.encode(clean, enc_hook=repr).decode()
