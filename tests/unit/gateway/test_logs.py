"""Logs are JSON lines without secrets and without prompts, and never hold up who writes them."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.usage import UsageRecord
from tandem.gateway.observe.logs import JsonFormatter, Logs, RedactingFilter, RequestLog, configure_logs, redact

KEY = "tdm-abcdefgh-" + "k" * 52
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl"


class Sink:
    """A stream of one test's own, and what was written to it."""

    def __init__(self, **settings: Any) -> None:
        self.stream = io.StringIO()
        self.logs = configure_logs(stream=self.stream, **settings)

    def lines(self) -> list[dict[str, Any]]:
        self.logs.close()
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def sink() -> Iterator[Sink]:
    one = Sink(fleet="laptop", replica="g1")
    yield one
    one.logs.close()


@pytest.fixture
def log() -> logging.Logger:
    return logging.getLogger("tandem.gateway.test")


def record(**fields: object) -> UsageRecord:
    given = {"id": "r1", "at": 1.0, "model": "m", "tenant": "a", "key": "abcdefgh", "endpoint": "chat", **fields}
    return UsageRecord(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "secret", "kept"),
    [
        (f"authorization: Bearer {KEY}", "k" * 52, "authorization"),
        (f"the key {KEY} was used", "k" * 52, "tdm-abcdefgh-***"),
        ("the key tdm-half", "half", "the key"),
        ("{'authorization': 'Bearer s3cret-token'}", "s3cret", "authorization"),
        ('{"Authorization": "Basic dXNlcjpwYXNz"}', "dXNlcjpwYXNz", "Authorization"),
        ("(b'authorization', b'Bearer s3cret')", "s3cret", "authorization"),
        ("[(b'x-api-key', b's3cret')]", "s3cret", "x-api-key"),
        ("Authorization: s3cret", "s3cret", "Authorization"),
        ("x-api-key: b0123", "b0", "x-api-key"),
        ("api_key=s3cret&x=1", "s3cret", "api_key"),
        ("sent Bearer s3cret-token to it", "s3cret", "sent Bearer"),
        ("redis://me:s3cret@host:6379/0 is down", "s3cret", "host:6379/0 is down"),
        ("redis://:s3@cret@host:6379", "cret", "host:6379"),
        ("rediss://:s3cret@host, redis://h2", "s3cret", "host, redis://h2"),
        ("password='s3cret' refused", "s3cret", "refused"),
        (f"token {JWT} has expired", "c2lnbmF0dXJl", "has expired"),
    ],
)
def test_secrets_are_taken_out_and_the_rest_is_kept(text: str, secret: str, kept: str) -> None:
    assert secret not in redact(text)
    assert kept in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "could not abort the decode leg of room 123: timeout",
        "http://127.0.0.1:8000/health does not answer",
        "GET http://127.0.0.1:8000/x?mail=a@b",
        "the bearer of this message",
        "tandem up",
        "10:30:00 started",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text(max_size=50), st.text(max_size=50))
def test_a_key_is_taken_out_wherever_it_stands(before: str, after: str) -> None:
    assert "k" * 10 not in redact(f"{before}{KEY}{after}")
    assert "s3cret" not in redact(f"{before}\nAuthorization: Bearer s3cret{after}")


def test_every_record_is_a_line_of_json(sink: Sink, log: logging.Logger) -> None:
    log.warning("two\nlines of %s", "text")
    [line] = sink.lines()
    assert line["message"] == "two\nlines of text"
    assert (line["level"], line["logger"], line["fleet"], line["replica"]) == (
        "warning",
        "tandem.gateway.test",
        "laptop",
        "g1",
    )
    assert line["time"].endswith("Z")


def test_secrets_are_taken_out_of_arguments_and_tracebacks(sink: Sink, log: logging.Logger) -> None:
    try:
        raise ValueError(f"bad key {KEY}")
    except ValueError:
        log.exception("refused %s", {"authorization": f"Bearer {KEY}"})
    [line] = sink.lines()
    assert "ValueError" in line["exception"]
    assert "k" * 52 not in json.dumps(line)


def test_the_filter_cleans_for_any_formatter() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactingFilter())
    handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "key %s", (KEY,), None))
    assert stream.getvalue() == "key tdm-abcdefgh-***\n"


def test_a_request_has_one_line_with_what_happened_to_it(sink: Sink) -> None:
    usage = record(prompt_tokens=9, completion_tokens=4, seconds=1.25, ttft_seconds=0.5, attempts=2, outcome="timeout")
    RequestLog().write(
        usage,
        status=504,
        request_id="c-1",
        error="The answer took too long.",
        prefill="prefill-0/1",
        decode="decode-0/0",
        trace_id="ab" * 16,
    )
    [line] = sink.lines()
    expected = {
        "level": "info",
        "logger": "tandem.request",
        "request": "r1",
        "request_id": "c-1",
        "trace_id": "ab" * 16,
        "tenant": "a",
        "key": "abcdefgh",
        "model": "m",
        "endpoint": "chat",
        "status": 504,
        "outcome": "timeout",
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "ttft_seconds": 0.5,
        "seconds": 1.25,
        "attempts": 2,
        "prefill": "prefill-0/1",
        "decode": "decode-0/0",
        "error": "The answer took too long.",
    }
    assert expected.items() <= line.items()


@pytest.mark.parametrize(("asked_for", "shown"), [(False, False), (True, True)])
def test_a_prompt_is_logged_only_when_asked_for(sink: Sink, asked_for: bool, shown: bool) -> None:
    RequestLog(log_prompts=asked_for).write(record(), status=200, prompt="my diary")
    [line] = sink.lines()
    assert ("prompt" in line) == shown
    assert ("my diary" in json.dumps(line)) == shown


def test_a_request_id_cannot_forge_a_line(sink: Sink) -> None:
    RequestLog().write(record(user="x"), status=200, request_id='a"}\n{"level":"error"', prompt=None)
    [line] = sink.lines()
    assert line["level"] == "info"


def test_text_that_is_no_unicode_is_logged_all_the_same(sink: Sink) -> None:
    RequestLog(log_prompts=True).write(record(), status=200, prompt="half \ud83d of an emoji")
    [line] = sink.lines()
    assert line["prompt"] == "half ? of an emoji"


def test_people_can_have_plain_lines() -> None:
    sink = Sink(json=False)
    RequestLog().write(record(), status=200, request_id="c\n1")
    sink.logs.close()
    [line] = sink.stream.getvalue().splitlines()
    assert "tandem.request: chat ok" in line
    assert "tenant=a" in line


def test_no_other_handler_gets_what_was_not_cleaned() -> None:
    seen: list[logging.LogRecord] = []
    parent, child = logging.getLogger("test_logs"), logging.getLogger("test_logs.child")
    other = logging.Handler()
    other.emit = seen.append  # type: ignore[method-assign]
    parent.addHandler(other)
    logs = configure_logs(stream=io.StringIO(), logger=child)
    child.warning(KEY)
    logs.close()
    assert seen == []
    child.warning("after the end everything is as it was")
    assert len(seen) == 1
    parent.removeHandler(other)


@pytest.mark.parametrize("name", ["asyncio", "grpc._cython.cygrpc", "redis.connection", "opentelemetry.sdk"])
def test_what_a_library_logs_is_cleaned_too(name: str, sink: Sink) -> None:
    logging.getLogger(name).error("Task exception was never retrieved: authorization: Bearer %s", KEY)
    logging.getLogger(name).info("nothing that anybody needs")
    (line,) = sink.lines()
    assert "k" * 52 not in line["message"]
    assert line["logger"] == name


def test_what_is_below_the_level_is_not_written(log: logging.Logger) -> None:
    sink = Sink(level=logging.ERROR)
    log.warning("no")
    RequestLog().write(record(), status=200)
    log.error("yes")
    assert [line["message"] for line in sink.lines()] == ["yes"]


def test_a_pipe_that_nobody_reads_holds_nobody_up(log: logging.Logger) -> None:
    reading, writing = os.pipe()
    dropped: list[int] = []
    with os.fdopen(writing, "w", buffering=1) as stream:
        logs: Logs = configure_logs(stream=stream, limit=10, on_drop=dropped.append)
        done = threading.Event()

        def write() -> None:
            for _ in range(3000):
                log.info("x" * 100)
            done.set()

        threading.Thread(target=write, daemon=True).start()
        assert done.wait(20), "the writer was held up"
        assert sum(dropped) == logs.dropped > 0
        threading.Thread(target=lambda: list(iter(lambda: os.read(reading, 65536), b"")), daemon=True).start()
        logs.close()


def test_what_json_does_not_know_is_shown_as_text(log: logging.Logger) -> None:
    record_ = logging.LogRecord("x", logging.INFO, "", 0, "m", None, None)
    record_.tandem_fields = {"odd": object}
    assert json.loads(JsonFormatter().format(record_))["odd"] == repr(object)
