"""Who may ask for what: keys, models, limits, classes and the queue, over a whole gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_standin import Script
from gateway_world import Answer, Call, World, saying, world

from tandem.gateway.http.endpoints import BY_PATH

USER = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": [5, 6]},
    "/v1/messages": {"messages": USER, "max_tokens": 100},
    "/v1/responses": {"input": "hi"},
}
TOOLS: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
    "/v1/messages/count_tokens": {"messages": USER},
}
OPEN = ["/health", "/ready", "/fleet", "/metrics", "/openapi.json"]
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")


def ask(w: World, path: str, key: dict[str, str] | None = None, **fields: Any) -> Call:
    body = {**BODIES, **TOOLS}[path]
    return w.call(path, {"model": "tiny", **body, **fields}, key)


def tenants(**each: Any) -> dict[str, Any]:
    """A fleet with these tenants, which all need a key."""
    return {"tenants": each, "gateway": {"auth": "required"}}


ACME = tenants(acme={})


# Keys


@pytest.mark.parametrize("path", [*BODIES, *TOOLS])
async def test_without_a_key_the_answer_is_401_in_the_form_of_its_api(path: str) -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        answer = await ask(w, path).run()
        assert not w.engines["p0"].bodies
    assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="tandem"')
    found = answer.json()
    if path in ANTHROPIC:
        assert (found["type"], found["error"]["type"]) == ("error", "authentication_error")
        assert found["request_id"] == answer.headers["x-request-id"]
    else:
        assert (found["error"]["type"], found["error"]["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "tandem keys create" in found["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/nothing"])
async def test_pages_about_models_need_a_key_too(path: str) -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        answer = await w.get(path)
    assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", OPEN)
async def test_probes_and_prometheus_need_no_key(path: str) -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        assert (await w.get(path)).status == 200


@pytest.mark.parametrize("path", [*BODIES, *TOOLS])
async def test_a_key_opens_every_endpoint(path: str) -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        assert (await ask(w, path, await w.key("acme")).run()).status == 200


async def test_a_key_is_taken_as_anthropics_clients_send_it() -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        key = (await w.key("acme"))["authorization"].removeprefix("Bearer ")
        assert (await ask(w, "/v1/messages", {"x-api-key": key}).run()).status == 200
        assert [record.tenant for record in w.records] == ["acme"]


async def test_a_key_works_once_it_is_made_and_no_more_once_it_is_revoked() -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        key, other = await w.key("acme"), await w.key("acme")
        assert (await ask(w, "/v1/completions", key).run()).status == 200
        await w.revoke(key)
        answer = await ask(w, "/v1/completions", key).run()
        assert answer.status == 401
        assert "was revoked" in answer.json()["error"]["message"]
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        assert (await ask(w, "/v1/completions", other).run()).status == 200


async def test_a_refusal_never_shows_the_key() -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        key = await w.key("acme")
        secret = key["authorization"].rsplit("-", 1)[1]
        await w.revoke(key)
        assert secret not in (await ask(w, "/v1/completions", key).run()).body.decode()


async def test_a_key_of_a_tenant_that_is_no_more_is_told_so() -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        for path, kind in (("/v1/completions", "invalid_request_error"), ("/v1/messages", "permission_error")):
            answer = await ask(w, path, await w.key("gone")).run()
            assert (answer.status, answer.json()["error"]["type"]) == (403, kind)


async def test_a_body_without_a_key_is_not_waited_for() -> None:
    async with world("p0", "d0", fleet=ACME) as w:
        answer = await w.call("/v1/completions", b"{", {"content-length": "1000"}).run()
        assert (answer.status, answer.headers["connection"]) == (401, "close")


# Models


@pytest.mark.parametrize("path", [*BODIES, *TOOLS])
async def test_a_model_of_others_is_as_good_as_none(path: str) -> None:
    async with world("p0", "d0", fleet=tenants(poor={"models": ["another"]})) as w:
        key = await w.key("poor")
        answer = await ask(w, path, key).run()
        missing = await ask(w, path, key, model="nowhere").run()
        assert not w.engines["p0"].bodies
    assert answer.status == missing.status == 404
    texts = [found.json()["error"]["message"].replace("nowhere", "tiny") for found in (answer, missing)]
    assert texts[0] == texts[1]


async def test_models_are_those_of_the_tenant() -> None:
    async with world("p0", "d0", fleet=tenants(poor={"models": ["another"]}, rich={})) as w:
        for tenant, names, status in (("poor", [], 404), ("rich", ["tiny"], 200)):
            key = await w.key(tenant)
            listed = (await w.call("/v1/models", headers=key).run()).json()["data"]
            assert [model["id"] for model in listed] == names
            assert (await w.call("/v1/models/tiny", headers=key).run()).status == status


# Limits


@pytest.mark.parametrize("path", BODIES)
async def test_a_limit_that_is_reached_is_a_429_with_its_headers(path: str) -> None:
    async with world("p0", "d0", fleet=tenants(acme={"requests_per_minute": 1})) as w:
        key = await w.key("acme")
        first = await ask(w, path, key).run()
        answer = await ask(w, path, key).run()
        assert len(w.engines["d0"].bodies) == 1
        assert w.metric("tandem_refusals_total", reason="limit_requests") == 1
        assert w.metric("tandem_tenant_refusals_total", tenant="acme") == 1
    assert (first.status, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    assert (answer.status, answer.headers["x-ratelimit-limit-requests"]) == (429, "1")
    assert 50 <= int(answer.headers["retry-after"]) <= 61
    assert abs(int(answer.headers["retry-after-ms"]) - 1000 * int(answer.headers["retry-after"])) <= 1000
    error = answer.json()["error"]
    assert "1 requests per minute" in error["message"]
    assert error["type"] == ("rate_limit_error" if path == "/v1/messages" else "requests")


async def test_what_is_left_is_told_with_every_answer_whole_or_streamed() -> None:
    limits = {"requests_per_minute": 10, "input_tokens_per_minute": 100}
    async with world("p0", "d0", fleet=tenants(acme=limits)) as w:
        key = await w.key("acme")
        whole = await ask(w, "/v1/completions", key).run()
        streamed = await ask(w, "/v1/completions", key, stream=True).run()
    names = [f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining")]
    assert [whole.headers[name] for name in names] == ["10", "9", "100", "98"]
    assert [streamed.headers[name] for name in names] == ["10", "8", "100", "96"]
    assert whole.headers["x-ratelimit-reset-requests"].endswith(("s", "m"))


async def test_a_tenant_without_limits_hears_nothing_of_them() -> None:
    async with world("p0", "d0") as w:
        answer = await w.complete()
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_a_request_larger_than_the_limit_is_told_that_trying_again_is_of_no_use() -> None:
    async with world("p0", "d0", fleet=tenants(acme={"input_tokens_per_minute": 3})) as w:
        answer = await ask(w, "/v1/completions", await w.key("acme"), prompt=[5, 6, 7, 8]).run()
    assert (answer.status, answer.headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in answer.headers


async def test_all_prompts_and_choices_of_a_request_count_against_the_limits() -> None:
    async with world("p0", "d0", fleet=tenants(acme={"input_tokens_per_minute": 100})) as w:
        key = await w.key("acme")
        answer = await ask(w, "/v1/completions", key, prompt=[[5, 6, 7], [8]], n=2).run()
    assert answer.headers["x-ratelimit-remaining-tokens"] == "96"


async def test_output_counts_when_the_request_is_over() -> None:
    async with world("p0", "d0", fleet=tenants(acme={"output_tokens_per_minute": 1000})) as w:
        key = await w.key("acme")
        w.engines["d0"].scripts.append(saying("one two three"))
        used = (await ask(w, "/v1/completions", key, max_tokens=500).run()).json()["usage"]["completion_tokens"]
        w.engines["d0"].scripts.append(saying("one two three"))
        answer = await ask(w, "/v1/completions", key, max_tokens=1).run()
    # Of the second request itself as much is held back as the first one used, or it may use at most.
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) in (1000 - used - 1, 1000 - used)


@pytest.mark.parametrize(("fields", "held"), [({"max_tokens": 100, "n": 3}, 300), ({"max_tokens": 100}, 100)])
async def test_what_all_choices_may_say_is_held_back_while_they_run(fields: dict[str, Any], held: int) -> None:
    async with world("p0", "d0", fleet=tenants(acme={"output_tokens_per_minute": 1000})) as w:
        answer = await ask(w, "/v1/completions", await w.key("acme"), **fields).run()
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - held)


async def test_one_tenants_limit_is_not_anothers() -> None:
    async with world("p0", "d0", fleet=tenants(acme={"requests_per_minute": 1}, other={})) as w:
        key = await w.key("acme")
        statuses = [(await ask(w, "/v1/completions", key).run()).status for _ in range(2)]
        statuses.append((await ask(w, "/v1/completions", await w.key("other")).run()).status)
    assert statuses == [200, 429, 200]


async def test_a_request_that_is_wrong_uses_up_no_limit() -> None:
    async with world("p0", "d0", fleet=tenants(acme={"requests_per_minute": 1})) as w:
        key = await w.key("acme")
        assert (await ask(w, "/v1/completions", key, temperature=9).run()).status == 400
        assert (await ask(w, "/v1/completions", key).run()).status == 200


async def test_only_so_many_requests_run_at_once_and_one_that_ends_makes_room() -> None:
    async with world("p0", "d0", fleet=tenants(acme={"concurrency": 1})) as w:
        key = await w.key("acme")
        call, running = await hanging(w, key)
        refused = await ask(w, "/v1/completions", key).run()
        assert (refused.status, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        call.leave()
        await running
        await w.until(lambda: len(w.records) == 2)
        assert (await ask(w, "/v1/completions", key).run()).status == 200


# Classes and the queue


async def hanging(w: World, key: dict[str, str] | None = None) -> tuple[Call, asyncio.Task[Answer]]:
    """A request that runs until its client leaves."""
    for one in w.engines.values():
        one.scripts.append(Script(finish=None))
    call = ask(w, "/v1/completions", key, stream=True)
    running = asyncio.create_task(call.run())
    await call.until_body()
    return call, running


def waiting(w: World) -> int:
    return sum(int(w.metric("tandem_queue_length", priority=priority)) for priority in ("high", "normal", "low"))


async def queued(w: World, key: dict[str, str] | None = None, **fields: Any) -> tuple[Call, asyncio.Task[Answer]]:
    """A request that waits for its turn."""
    before = waiting(w)
    call = ask(w, "/v1/completions", key, **fields)
    running = asyncio.create_task(call.run())
    await w.until(lambda: waiting(w) == before + 1)
    return call, running


@pytest.mark.parametrize(
    ("tenant", "fields", "runs_as"),
    [
        ("low", {"priority": "high"}, "low"),
        ("low", {}, "low"),
        ("high", {}, "high"),
        ("high", {"service_tier": "flex"}, "low"),
        ("high", {"priority": 0}, "normal"),
        ("usual", {"service_tier": "priority"}, "normal"),
    ],
)
async def test_a_request_has_the_class_it_asks_for_but_none_above_its_tenants(
    tenant: str, fields: dict[str, Any], runs_as: str
) -> None:
    fleet = tenants(low={"priority": "low"}, high={"priority": "high"}, usual={})
    async with world("p0", "d0", fleet=fleet) as w:
        assert (await ask(w, "/v1/completions", await w.key(tenant), **fields).run()).status == 200
        assert [record.priority for record in w.records] == [runs_as]
        assert w.metric("tandem_queue_seconds_count", priority=runs_as) == 1


async def test_a_higher_class_goes_first() -> None:
    async with world("p0", "d0", fleet=tenants(low={"priority": "low"}, high={"priority": "high"})) as w:
        low, high = await w.key("low"), await w.key("high")
        w.service.admission.set_capacity(1)
        call, running = await hanging(w, low)
        late = [await queued(w, low), await queued(w, low), await queued(w, high)]
        call.leave()
        answers = await asyncio.gather(*(task for _, task in late))
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert [record.tenant for record in w.records] == ["low", "high", "low", "low"]
        await running


async def test_a_request_that_waits_is_forgotten_when_its_client_leaves() -> None:
    async with world("p0", "d0") as w:
        w.service.admission.set_capacity(1)
        call, running = await hanging(w)
        gone, nobody = await queued(w)
        gone.leave()
        await w.until(lambda: waiting(w) == 0)
        assert (await nobody).status == 0
        assert len(w.engines["d0"].bodies) == 1
        call.leave()
        await running
        assert (await w.complete()).status == 200
        assert w.service.admission.running == 0


async def test_a_request_gets_its_turn_when_another_ends() -> None:
    async with world("p0", "d0") as w:
        w.service.admission.set_capacity(1)
        call, running = await hanging(w)
        w.engines["d0"].default = saying("at last")
        _, late = await queued(w)
        call.leave()
        assert (await late).json()["choices"][0]["text"] == "at last"
        await running


async def test_a_first_token_makes_room_in_prefill() -> None:
    async with world("p0", "d0") as w:
        w.service.admission.set_capacity(None, prefill_tokens=3)
        go = w.engines["d0"].default.go = asyncio.Event()
        w.engines["d0"].default.ids = [70]
        first = asyncio.create_task(w.complete())
        await w.engines["d0"].until(lambda: w.engines["d0"].running)
        _, second = await queued(w)
        w.engines["d0"].default = Script(finish=None)
        go.set()
        assert (await first).status == 200
        # That one is over. The next still runs when the last gets its turn: it has left prefill.
        await w.engines["d0"].until(lambda: len(w.engines["d0"].bodies) == 2)
        w.engines["d0"].default = Script()
        assert (await w.complete()).status == 200
        assert not second.done()
        second.cancel()


@pytest.mark.parametrize("path", BODIES)
async def test_a_full_queue_is_a_429_with_a_time_to_come_back(path: str) -> None:
    async with world("p0", "d0", fleet={"admission": {"max_waiting": 0}}) as w:
        w.service.admission.set_capacity(1)
        call, running = await hanging(w)
        answer = await ask(w, path).run()
        call.leave()
        await running
        assert w.metric("tandem_refusals_total", reason="queue_full") == 1
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    if path == "/v1/messages":
        assert error["type"] == "rate_limit_error"
    else:
        assert error["code"] == "overloaded"


async def test_a_request_that_has_waited_too_long_is_refused() -> None:
    async with world("p0", "d0") as w:
        w.service.admission.set_capacity(1)
        call, running = await hanging(w)
        w.service.queue_s = 0.02
        answer = await ask(w, "/v1/completions").run()
        assert (answer.status, answer.json()["error"]["code"]) == (429, "overloaded")
        assert "retry-after" in answer.headers
        assert len(w.engines["d0"].bodies) == 1
        call.leave()
        await running


async def test_what_the_queue_refuses_uses_up_no_limit() -> None:
    fleet = {**tenants(acme={"requests_per_minute": 10}), "admission": {"max_waiting": 0}}
    async with world("p0", "d0", fleet=fleet) as w:
        key = await w.key("acme")
        w.service.admission.set_capacity(1)
        call, running = await hanging(w, key)
        for _ in range(3):
            assert (await ask(w, "/v1/completions", key).run()).status == 429
        call.leave()
        await running
        await w.quiet()
        assert (await ask(w, "/v1/completions", key).run()).headers["x-ratelimit-remaining-requests"] == "8"


async def test_only_the_first_of_a_request_counts_not_its_retries() -> None:
    async with world("p0", "d0", fleet=tenants(acme={"requests_per_minute": 10})) as w:
        w.engines["d0"].scripts.append(Script(status=500))
        answer = await ask(w, "/v1/completions", await w.key("acme")).run()
        assert (answer.status, w.records[0].attempts) == (200, 2)
    assert answer.headers["x-ratelimit-remaining-requests"] == "9"


def test_every_endpoint_is_asked() -> None:
    assert set(BODIES) == set(BY_PATH)
