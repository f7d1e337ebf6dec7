"""Who asks: by key and by certificate, with and without the duty to say so. (Tokens: test_oidc.py.)"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from tandem.config import FleetConfig
from tandem.core.tenants import ANONYMOUS, Priority, Tenant
from tandem.gateway.access.auth import Authenticator, check_model, tenant_of
from tandem.gateway.access.keys import KEYS, KeyRing, mint
from tandem.gateway.errors import ApiError
from tandem.state import Store, open_store

NOW = 1_000_000.0
_following: set[asyncio.Task[None]] = set()


@pytest.fixture
async def store(tmp_path: Any) -> Any:
    opened = await open_store("embedded", fleet="t", folder=tmp_path)
    yield opened
    await opened.close()
    if _following:
        await asyncio.wait(_following, timeout=10)
    _following.clear()


def fleet(auth: str = "required", **more: Any) -> FleetConfig:
    values = {"tenants": {"acme": {}, "beta": {}}, "gateway": {"auth": auth}, **more}
    return FleetConfig.model_validate(values)


async def authenticator(store: Store, config: FleetConfig) -> Authenticator:
    """One that knows the keys that there are; it follows them until the store is closed."""
    ring = KeyRing(store)
    _following.add(asyncio.create_task(ring.follow()))
    await ring.loaded()
    return Authenticator(config, ring, clock=lambda: NOW)


async def key_of(store: Store, tenant: str, lives_s: float | None = None) -> bytes:
    record, key = mint(tenant, now=NOW - 100, lives_s=lives_s)
    await store.put(KEYS + record.id, msgspec.json.encode(record))
    return key.encode()


async def refusal(asked: Authenticator, headers: dict[bytes, bytes], certificate: Any = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await asked.authenticate(headers, certificate)
    return caught.value


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (b"authorization", b"Bearer %s"),
        (b"authorization", b"bearer   %s "),
        (b"x-api-key", b"%s"),
        (b"api-key", b"%s"),
    ],
)
async def test_a_key_is_taken_where_the_sdks_put_it(store: Store, name: bytes, form: bytes) -> None:
    key = await key_of(store, "acme")
    asked = await authenticator(store, fleet())
    assert (await asked.authenticate({name: form % key}, None)).name == "acme"


async def test_a_bearer_key_counts_before_the_other_headers(store: Store) -> None:
    acme, beta = await key_of(store, "acme"), await key_of(store, "beta")
    asked = await authenticator(store, fleet())
    headers = {b"x-api-key": beta, b"authorization": b"Bearer " + acme}
    assert (await asked.authenticate(headers, None)).name == "acme"


async def test_the_tenant_has_the_limits_of_the_configuration(store: Store) -> None:
    limits = {"priority": "high", "weight": 2.5, "requests_per_minute": 3, "models": ["r1"], "concurrency": 4}
    key = await key_of(store, "acme")
    asked = await authenticator(store, fleet(tenants={"acme": limits}))
    assert await asked.authenticate({b"x-api-key": key}, None) == Tenant(
        name="acme", priority=Priority.HIGH, weight=2.5, requests_per_minute=3, models=("r1",), concurrency=4
    )


@pytest.mark.parametrize("headers", [{}, {b"authorization": b""}, {b"authorization": b"Bearer"}, {b"x-api-key": b""}])
async def test_who_shows_nothing_is_told_how_to(store: Store, headers: dict[bytes, bytes]) -> None:
    error = await refusal(await authenticator(store, fleet()), headers)
    assert (error.status, error.type, error.code) == (401, "invalid_request_error", "invalid_api_key")
    assert "Authorization: Bearer" in error.message


async def test_the_challenge_names_an_error_only_to_who_has_shown_something(store: Store) -> None:
    asked = await authenticator(store, fleet())
    nothing = await refusal(asked, {})
    wrong = await refusal(asked, {b"x-api-key": b"sk-1"})
    assert dict(nothing.headers())[b"www-authenticate"] == b'Bearer realm="tandem"'
    assert dict(wrong.headers())[b"www-authenticate"] == b'Bearer realm="tandem", error="invalid_token"'


@pytest.mark.parametrize("value", [b"Basic dXNlcjpwYXNz", b"tdm", b"\xff\xfe"])
async def test_another_scheme_is_no_key(store: Store, value: bytes) -> None:
    error = await refusal(await authenticator(store, fleet()), {b"authorization": value})
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert "has no bearer token" in error.message


async def test_an_unknown_an_expired_and_a_broken_key_are_told_apart_from_each_other(store: Store) -> None:
    unknown = mint("acme", now=NOW)[1].encode()
    expired = await key_of(store, "acme", lives_s=50)
    asked = await authenticator(store, fleet())
    assert "is not known" in (await refusal(asked, {b"x-api-key": unknown})).message
    assert "has expired" in (await refusal(asked, {b"x-api-key": expired})).message
    assert "is not complete" in (await refusal(asked, {b"x-api-key": unknown[:-1]})).message
    assert "is not complete" in (await refusal(asked, {b"x-api-key": unknown + b"a"})).message


async def test_no_error_and_no_log_has_more_of_a_key_than_its_id(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asked = await authenticator(store, fleet())
    for key in (
        mint("acme", now=NOW)[1],
        mint("acme", now=NOW)[1] + "x",
        "sk-proj-" + "s3cretsecret" * 4,
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhY21lIn0.c2lnbmF0dXJlLXNpZw",
    ):
        error = await refusal(asked, {b"authorization": b"Bearer " + key.encode()})
        said = error.message + repr(error) + error.body().decode() + caplog.text
        assert key[-8:] not in said
        assert key[13:21] not in said


async def test_a_key_of_a_tenant_that_is_gone_is_forbidden(store: Store) -> None:
    key = await key_of(store, "gone")
    error = await refusal(await authenticator(store, fleet()), {b"x-api-key": key})
    assert (error.status, error.code) == (403, "tenant_not_found")
    assert "'gone'" in error.message
    assert key[13:].decode() not in error.message


async def test_a_token_is_no_key_where_there_is_no_issuer(store: Store) -> None:
    error = await refusal(await authenticator(store, fleet()), {b"authorization": b"Bearer a.b.c"})
    assert (error.status, error.code) == (401, "invalid_api_key")


# Where nothing has to be shown


@pytest.mark.parametrize("headers", [{}, {b"authorization": b"Bearer EMPTY"}, {b"x-api-key": b"sk-anything"}])
async def test_without_the_duty_a_foreign_key_is_as_good_as_none(store: Store, headers: dict[bytes, bytes]) -> None:
    asked = await authenticator(store, fleet("off", default_tenant={"concurrency": 7}))
    assert await asked.authenticate(headers, None) == Tenant(name=ANONYMOUS.name, concurrency=7)


async def test_without_the_duty_a_key_still_tells_the_tenant(store: Store) -> None:
    key = await key_of(store, "acme")
    asked = await authenticator(store, fleet("off"))
    assert (await asked.authenticate({b"x-api-key": key}, None)).name == "acme"


async def test_without_the_duty_a_bad_key_of_ours_is_refused_all_the_same(store: Store) -> None:
    asked = await authenticator(store, fleet("off"))
    assert (await refusal(asked, {b"x-api-key": mint("acme", now=NOW)[1].encode()})).status == 401


@pytest.mark.parametrize(
    ("host", "required"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.7", True),
        ("localhost.example.org", True),
        ("", True),
    ],
)
def test_keys_are_asked_for_unless_only_this_machine_can_reach_the_gateway(host: str, required: bool) -> None:
    assert FleetConfig.model_validate({"gateway": {"host": host}}).gateway.auth_required is required


# Certificates


def certificate(common_name: str, *sans: tuple[str, str]) -> dict[str, Any]:
    return {"subject": ((("organizationName", "x"),), (("commonName", common_name),)), "subjectAltName": sans}


OWNERS = {
    "acme": {"certificate_subjects": ["CN:acme-client", "URI:spiffe://corp/acme"]},
    "beta": {"certificate_subjects": ["DNS:beta.example", "email:b@example.org"]},
}


@pytest.mark.parametrize(
    ("shown", "tenant"),
    [
        (certificate("acme-client"), "acme"),
        (certificate("other", ("URI", "spiffe://corp/acme")), "acme"),
        (certificate("other", ("DNS", "x.example"), ("DNS", "beta.example")), "beta"),
        (certificate("other", ("email", "b@example.org")), "beta"),
    ],
)
async def test_a_client_certificate_tells_the_tenant_by_cn_or_san(store: Store, shown: Any, tenant: str) -> None:
    asked = await authenticator(store, fleet(tenants=OWNERS))
    assert (await asked.authenticate({}, shown)).name == tenant


@pytest.mark.parametrize(
    "shown",
    [
        certificate("beta.example"),
        certificate("x", ("DNS", "acme-client")),
        certificate("x", ("URI", "beta.example")),
        certificate("ACME-client"),
    ],
)
async def test_a_name_of_another_kind_is_another_name(store: Store, shown: Any) -> None:
    error = await refusal(await authenticator(store, fleet(tenants=OWNERS)), {}, shown)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert "client certificate belongs to no tenant" in error.message


async def test_a_key_counts_before_a_certificate(store: Store) -> None:
    key = await key_of(store, "beta")
    asked = await authenticator(store, fleet(tenants=OWNERS))
    assert (await asked.authenticate({b"x-api-key": key}, certificate("acme-client"))).name == "beta"


async def test_a_bad_key_is_refused_whatever_the_certificate(store: Store) -> None:
    asked = await authenticator(store, fleet(tenants=OWNERS))
    bad = mint("acme", now=NOW)[1].encode()
    assert (await refusal(asked, {b"x-api-key": bad}, certificate("acme-client"))).status == 401


async def test_an_unverified_certificate_is_none(store: Store) -> None:
    assert (await refusal(await authenticator(store, fleet(tenants=OWNERS)), {}, {})).status == 401


# Models


def test_a_tenant_may_use_every_model_unless_some_are_named() -> None:
    check_model(Tenant(name="acme"), "anything")
    check_model(Tenant(name="acme", models=("r1", "tiny")), "tiny")


def test_a_model_of_others_is_as_one_that_does_not_exist() -> None:
    with pytest.raises(ApiError, match="does not exist or you do not have access") as caught:
        check_model(Tenant(name="acme", models=("r1",)), "tiny")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


# Configuration


def test_an_unknown_tenant_is_answered_with_those_known() -> None:
    with pytest.raises(KeyError, match="no tenant 'x'; there are: acme, beta"):
        tenant_of("x", fleet())


def test_the_default_tenant_has_the_name_of_nobody() -> None:
    assert tenant_of("anonymous", fleet(default_tenant={"weight": 0.5})) == Tenant(name="anonymous", weight=0.5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tenants": {"anonymous": {}}}, "anonymous is the name of default_tenant"),
        ({"tenants": {"A b": {}}}, "should match pattern"),
        ({"tenants": {"a": {"subjects": ["x"]}, "b": {"subjects": ["x"]}}}, "b.subjects: 'x' is a's already"),
        ({"tenants": {"a": {"certificate_subjects": ["acme"]}}}, "should match pattern"),
        ({"default_tenant": {"subjects": ["x"]}}, "it is for who shows nothing"),
        ({"tenants": {"a": {"weight": 0}}}, "greater than 0"),
        ({"tenants": {"a": {"concurrency": 0}}}, "greater than or equal to 1"),
        ({"oidc": {"issuer": "http://idp.example", "audience": "t"}}, "must be an https:// URL"),
        ({"oidc": {"issuer": "https://x", "audience": "t", "jwks_url": "file:///etc/x"}}, "must be an https:// URL"),
        ({"oidc": {"issuer": "https://x", "audience": "t", "algorithms": ["HS256"]}}, "Input should be 'RS256'"),
        ({"oidc": {"issuer": "https://x", "audience": "t", "algorithms": ["none"]}}, "Input should be 'RS256'"),
        ({"oidc": {"issuer": "https://x", "audience": ""}}, "at least 1 character"),
    ],
)
def test_a_configuration_that_would_mix_up_or_let_in_the_wrong_is_refused(values: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FleetConfig.model_validate(values)
