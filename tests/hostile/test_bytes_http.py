"""Bytes that are no HTTP, or hardly: the server stays, answers others, and never says it was its own fault."""

from __future__ import annotations

import contextlib
import re
import socket
import time

import pytest
from hostile_stage import Stage, examples
from hostile_wire import shout, talk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BODY = b'{"model":"tiny","prompt":"hi","max_tokens":2}'
STREAM = b'{"model":"tiny","prompt":"hi","max_tokens":2,"stream":true}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
WITHIN_S = 5.0
"""What is wrong is answered at once; only a silent client is waited for."""


def post(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return POST + lines + b"content-length: %d\r\n\r\n%s" % (len(body), body)


def chunks(body: bytes, size: int) -> bytes:
    parts = [body[n : n + size] for n in range(0, len(body), size)]
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def statuses(answer: bytes) -> list[int]:
    """Of all answers in what came."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ?", answer)]


VALID = [
    GET,
    post(BODY),
    post(STREAM),
    chunks(BODY, 5),
    chunks(STREAM, 1000),
    post(BODY, b"expect: 100-continue"),
    post(BODY, b"connection: close"),
    GET + post(BODY) + GET + post(STREAM),
    b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health HTTP/1.0\r\n\r\n",
    b"GET /%00%ff/../../etc?a=%zz HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    POST + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 45\r\n\r\n" + BODY,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    bytes.fromhex("16030100c8010000c40303") + bytes(192),
    b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
]
SPICES = [
    *(b"\r\n", b"\n", b"\r", b"\0", b"\r\n\r\n", b" ", b":", b",", b"\xff", b"0\r\n\r\n", b"fffffffff\r\n", b"-1\r\n"),
    *(b"content-length: 0\r\n", b"content-length: 99999999999999999999\r\n", b"content-length: -1\r\n"),
    *(b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip, chunked\r\n", b"transfer-encoding: identity\r\n"),
    *(b"expect: 100-continue\r\n", b"upgrade: h2c\r\nconnection: upgrade\r\n", b"connection: close\r\n"),
    *(b"x: " + b"a" * 9000 + b"\r\n", b"x: y\r\n" * 900, b" folded\r\n", b"x-request-id: \xff\xfe\r\n", b"HTTP/9.9"),
    *(b"authorization: Bearer \xff\r\n", b"traceparent: \x80\r\n", b"GET ", b"BREW ", b"\x16\x03\x01\x02\x00\x01\x00"),
]


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Valid requests with bytes changed, put in, left out or sent again, cut into packets anywhere."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            data[at:at] = draw(st.sampled_from(SPICES))
        elif kind == 1:
            data[at : at + 1] = draw(st.binary(max_size=3))
        elif kind == 2:
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == 3:
            data[at:at] = data[draw(st.integers(0, len(data))) :][:200]
        else:
            del data[at:]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [bytes(data[one:other]) for one, other in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def check(gateway: Stage, answers: list[bytes]) -> None:
    for answer in answers:
        assert not [status for status in statuses(answer) if status >= 500], answer
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer
    assert gateway.ask("GET", "/health", within=WITHIN_S)[0] == 200


@given(said=st.lists(conversations(), min_size=1, max_size=16))
@settings(max_examples=examples(60), suppress_health_check=list(HealthCheck), database=None)
def test_mutated_requests_break_nothing(gateway: Stage, said: list[list[bytes]]) -> None:
    check(gateway, shout(gateway.address, said, 0.05))


@given(said=st.lists(st.lists(st.binary(min_size=1, max_size=200), max_size=3), min_size=1, max_size=16))
@settings(max_examples=examples(30), suppress_health_check=list(HealthCheck), database=None)
def test_random_bytes_break_nothing(gateway: Stage, said: list[list[bytes]]) -> None:
    check(gateway, shout(gateway.address, said, 0.03))


@pytest.mark.parametrize("request_", VALID, ids=range(len(VALID)))
def test_a_request_in_packets_of_one_byte_is_answered_as_one_in_one_packet(gateway: Stage, request_: bytes) -> None:
    last = GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    whole, _ = talk(gateway.address, [request_ + last], WITHIN_S)
    pieces, closed = talk(gateway.address, [bytes([one]) for one in request_ + last], WITHIN_S)
    told = [status for status in statuses(pieces) if status != 100]
    assert told == [status for status in statuses(whole) if status != 100]
    assert told
    assert closed


REFUSED = {
    "a chunk size that is no number": ([CHUNKED + b"5\r\nabcde\r\n", b"ZZ\r\n"], 400),
    "the same at once": ([CHUNKED + b"5\r\nabcde\r\nZZ\r\n"], 400),
    "a chunk size beyond 64 bits": ([CHUNKED + b"f" * 20 + b"\r\n"], 400),
    "a negative chunk size": ([CHUNKED + b"-5\r\nabcde\r\n"], 400),
    "a chunk longer than its size": ([CHUNKED + b"3\r\nabcdefgh\r\n0\r\n\r\n"], 400),
    "both framings": ([POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"], 400),
    "the framings the other way round": (
        [POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"],
        400,
    ),
    "two lengths": ([POST + b"content-length: 45\r\ncontent-length: 4\r\n\r\n" + BODY], 400),
    "a length beyond 64 bits": ([POST + b"content-length: 99999999999999999999999\r\n\r\n" + BODY], 400),
    "a negative length": ([POST + b"content-length: -1\r\n\r\n" + BODY], 400),
    "a length of 1 TB": ([POST + b"content-length: 1000000000000\r\n\r\n", BODY], 413),
    "HTTP/2": ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"], 400),
    "TLS": ([bytes.fromhex("16030100c8010000c40303") + bytes(192)], 400),
    "zeros": ([bytes(1000)], 400),
    "a method of our own": ([b"FETCHITNOW / HTTP/1.1\r\nhost: x\r\n\r\n"], 400),
    "a method of 10 MB": ([b"G" * 100_000] * 100, 400),
    "a URL of 1 MB": ([b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nhost: x\r\n\r\n"], 431),
    "a header of 1 MB": ([GET[:-2] + b"x: ", *([b"a" * 2**16] * 16), b"\r\n\r\n"], 431),
    "a header of 100 KB in one packet": ([GET[:-2] + b"x: " + b"a" * 100_000 + b"\r\n\r\n"], 431),
    "100,000 headers": ([GET[:-2] + b"x: y\r\n" * 100_000 + b"\r\n"], 431),
    "headers without end": ([GET[:-2], *([b"x-y: z\r\n" * 1000] * 100)], 431),
    "1 MB of trailers": ([CHUNKED + b"2\r\n{}\r\n0\r\n", *([b"x: y\r\n" * 10_000] * 20)], 400),
    "a trailer of 1 MB": ([CHUNKED + b"2\r\n{}\r\n0\r\nx: ", *([b"a" * 2**16] * 16)], 400),
    "a chunk extension of 1 MB": ([CHUNKED + b"2;x=", *([b"a" * 2**16] * 16)], 400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_at_once_and_the_connection_closed(gateway: Stage, name: str) -> None:
    pieces, status = REFUSED[name]
    answer, closed = talk(gateway.address, pieces, WITHIN_S)
    assert closed
    # Who is refused before all was sent may be reset, and lose the answer.
    assert statuses(answer) in ([status], [] if sum(map(len, pieces)) > 60_000 else [status]), answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(b" " * 60_000, b"content-encoding: gzip"), 415),
        (post(b" " * 30_000).replace(b"POST", b"PUT", 1), 405),
        (post(b" " * 30_000).replace(b"/v1/completions", b"/nowhere"), 404),
    ],
)
def test_bodies_that_nobody_reads_do_not_stop_a_connection_that_is_kept(
    gateway: Stage, request_: bytes, status: int
) -> None:
    with socket.create_connection(gateway.address, timeout=WITHIN_S) as connection:
        file = connection.makefile("rb")
        for number in range(20):
            connection.sendall(request_)
            line = file.readline()
            if not line and number:
                return  # it may close instead
            assert int(line.split()[1]) == status
            length, close = 0, False
            while (line := file.readline().lower()) != b"\r\n":
                length = int(line[15:]) if line.startswith(b"content-length:") else length
                close = close or line.startswith(b"connection: close")
            file.read(length)
            if close:
                return


def test_64_requests_in_one_packet_are_answered_in_their_order(gateway: Stage) -> None:
    last = GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    answer, closed = talk(gateway.address, [(GET + post(BODY) + post(b"x")) * 20 + last], WITHIN_S)
    assert closed
    assert statuses(answer) == [200, 200, 400] * 20 + [200]


def test_1000_requests_in_one_packet_are_refused_and_not_kept(gateway: Stage) -> None:
    answer, closed = talk(gateway.address, [post(BODY) * 1000], WITHIN_S)
    assert closed
    assert len(statuses(answer)) < 1000


def test_trailers_do_not_replace_headers(gateway: Stage) -> None:
    body = b"".join(
        [CHUNKED, b"%x\r\n%s\r\n" % (len(BODY), BODY), b"0\r\nx-request-id: late\r\nx-api-key: tdm-x\r\n\r\n"]
    )
    answer, _ = talk(gateway.address, [body.replace(b"host: x", b"host: x\r\nconnection: close")], WITHIN_S)
    assert statuses(answer) == [200]
    assert b"x-request-id: late" not in answer


def test_others_are_served_while_a_trailer_never_ends(gateway: Stage) -> None:
    """httptools keeps a header to itself until its end, and copies it with each packet."""
    before, waits = gateway.memory(), []
    with socket.create_connection(gateway.address, timeout=WITHIN_S) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(CHUNKED + b"2\r\n{}\r\n0\r\nx: ")
            for number in range(120):
                connection.sendall(b"a" * 250_000)
                if number % 20 == 19:
                    began = time.monotonic()
                    assert gateway.ask("GET", "/health")[0] == 200
                    waits.append(time.monotonic() - began)
        assert gateway.memory() - before < 8
    assert max(waits, default=0) < 0.25
