"""What a stranger sends stays what it is: no second request, no endless error, no slow log."""

from __future__ import annotations

import time
from typing import Any, cast

import grpc
from gateway_world import world

from tandem.engine.http1 import Pool
from tandem.gateway.errors import LONGEST
from tandem.gateway.observe.logs import redact
from tandem.gateway.rpc.peer import peer_of

SMUGGLED = b"a=b\r\ncontent-length: 0\r\n\r\nPOST /flush_cache HTTP/1.1\r\nhost: x\r\n"


class Call:
    """As much of gRPC's context as says who calls."""

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return [("baggage", SMUGGLED.decode()), ("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01")]

    def auth_context(self) -> dict[str, Any]:
        return {}


def test_metadata_with_a_line_end_in_it_is_dropped() -> None:
    peer = peer_of(cast("grpc.aio.ServicerContext[Any, Any]", Call()))
    assert set(peer.headers) == {b"traceparent"}


async def test_no_header_of_ours_can_begin_another_request() -> None:
    async with world("p0", "d0") as w:
        pool = Pool()
        response = await pool.request("GET", w.engines["d0"].url + "/ready")
        assert await response.head(5) == 200
        response = await _begun(pool, w.engines["d0"].url)
        assert await response.head(5) == 200
        await response.read(5)
        assert w.engines["d0"].connections <= 2
        await pool.close()


async def _begun(pool: Pool, url: str) -> Any:
    found = pool.begin("GET", url + "/ready", headers=[(b"baggage", SMUGGLED)])
    return found if not hasattr(found, "__await__") else await found


async def test_an_error_does_not_send_back_all_that_it_is_about() -> None:
    async with world("p0", "d0") as w:
        answer = await w.complete(model="m" * 200_000)
        assert (answer.status, len(answer.body) < LONGEST + 500) == (404, True)


async def test_an_unknown_field_with_an_endless_name_is_named_in_part() -> None:
    async with world("p0", "d0") as w:
        answer = await w.complete(**{"f" * 100_000: 1})
        assert (answer.status, len(answer.body) < LONGEST + 500) == (400, True)


def test_redaction_takes_time_in_proportion_to_the_text() -> None:
    def spent(length: int) -> float:
        began = time.process_time()
        for text in ("a-" * length, "eyJ" * length, "a" * length + "://"):
            redact(text)
        return time.process_time() - began

    spent(1000)
    assert spent(100_000) < 2.0, "a text of 300 KB took as long as one of megabytes may"


async def test_sessions_of_any_length_are_kept_as_short_names() -> None:
    async with world("p0", "d0", fleet={"tenants": {}}) as w:
        await w.complete(prompt_cache_key="k" * 1_000_000, user="u" * 1_000_000)
        assert all(len(session) <= 32 for session in w.driver.router._sessions)
        assert len(w.records[0].user) <= 256
