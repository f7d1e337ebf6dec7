"""JWTs: what is accepted, what is refused, and what happens to an issuer that many ask about. Its keys are real."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from certificates import Authority
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tandem.config import FleetConfig, OidcConfig
from tandem.gateway.access.auth import Authenticator
from tandem.gateway.access.jwks import REFRESH_S, RETRY_S, IssuerDown, KeySet
from tandem.gateway.access.keys import KeyRing
from tandem.gateway.access.oidc import TokenRefused, TokenVerifier
from tandem.gateway.access.tls import server_ssl_context
from tandem.gateway.errors import ApiError
from tandem.state import open_store

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024)
P256 = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.generate()
PUBLIC: dict[str, Any] = {
    "rsa": {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "use": "sig"},
    "bound": {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "alg": "RS256"},
    "weak": RSAAlgorithm.to_jwk(WEAK.public_key(), as_dict=True),
    "p256": ECAlgorithm.to_jwk(P256.public_key(), as_dict=True),
    "p384": ECAlgorithm.to_jwk(P384.public_key(), as_dict=True),
    "ed": OKPAlgorithm.to_jwk(ED.public_key(), as_dict=True),
    "shared": {"kty": "oct", "k": base64.urlsafe_b64encode(b"s" * 32).decode()},
    "secrecy": {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "use": "enc"},
    "broken": {"kty": "RSA", "n": "!", "e": 7},
    "lacking": {"kty": "EC", "crv": "P-256"},
    "strange": {"kty": "PQC"},
}


class Issuer:
    """An HTTP server with `/jwks` and discovery; it counts who asks."""

    def __init__(self, tls: Any = None) -> None:
        self.keys = {name: {**key, "kid": name} for name, key in PUBLIC.items()}
        self.asked = 0
        self.bodies: dict[str, bytes] = {}
        self.redirect = ""
        self.answers = asyncio.Event()
        self.answers.set()
        self.down = False
        self._tls = tls

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=self._tls)
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self.answers.set()
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        if path.endswith("/jwks"):
            self.asked += 1
        await self.answers.wait()
        if self.redirect:
            writer.write(f"HTTP/1.1 302 x\r\nlocation: {self.redirect}\r\ncontent-length: 0\r\n\r\n".encode())
        elif not self.down:
            body = self.bodies.get(path, self._body(path))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    def _body(self, path: str) -> bytes:
        if path == "/.well-known/openid-configuration":
            return json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/jwks"}).encode()
        return json.dumps({"keys": [*self.keys.values(), "no key", {"kty": "RSA"}]}).encode()

    def config(self, **more: Any) -> OidcConfig:
        values = {"issuer": self.url, "audience": "tandem", "jwks_url": f"{self.url}/jwks", "leeway_s": 0}
        return OidcConfig.model_validate({**values, **more})

    def token(self, key: Any = RSA, algorithm: str = "RS256", kid: str | None = "rsa", **claims: Any) -> str:
        content = {"iss": self.url, "aud": "tandem", "exp": time.time() + 60, "sub": "s", "tenant": "acme", **claims}
        content = {name: value for name, value in content.items() if value is not None}
        return jwt.encode(content, key, algorithm, headers={"kid": kid} if kid else None)


_context = functools.cache(ssl.create_default_context)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # To read the system's CAs takes 20 ms; once is enough.
    monkeypatch.setattr(ssl, "create_default_context", _context)


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    made = Issuer()
    await made.start()
    yield made
    await made.stop()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def refused(config: OidcConfig, token: str) -> str:
    verifier = TokenVerifier(config)
    with pytest.raises(TokenRefused) as caught:
        await verifier.claims(token)
    return str(caught.value)


# What is accepted


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [
        (RSA, "RS256", "rsa"),
        (RSA, "PS256", "rsa"),
        (RSA, "RS256", "bound"),
        (P256, "ES256", "p256"),
        (P384, "ES384", "p384"),
        (ED, "EdDSA", "ed"),
    ],
)
async def test_a_token_that_the_issuers_key_verifies_is_accepted(
    issuer: Issuer, key: Any, algorithm: str, kid: str
) -> None:
    claims = await TokenVerifier(issuer.config()).claims(issuer.token(key, algorithm, kid))
    assert claims["tenant"] == "acme"


async def test_the_keys_are_found_by_discovery(issuer: Issuer) -> None:
    claims = await TokenVerifier(issuer.config(jwks_url=None)).claims(issuer.token())
    assert claims["tenant"] == "acme"


async def test_one_audience_of_several_is_enough(issuer: Issuer) -> None:
    assert await TokenVerifier(issuer.config()).claims(issuer.token(aud=["other", "tandem"]))


async def test_clocks_may_differ_by_the_leeway(issuer: Issuer) -> None:
    token = issuer.token(exp=time.time() - 5)
    assert await TokenVerifier(issuer.config(leeway_s=60)).claims(token)


async def test_an_issuer_with_a_private_ca_is_trusted_by_that_ca_only(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    server = ca.server()
    tls = server_ssl_context(FleetConfig.model_validate({"gateway": {"tls": files(server)}}).gateway.tls)  # type: ignore[arg-type]
    issuer = Issuer(tls)
    await issuer.start()
    assert await TokenVerifier(issuer.config(ca=ca.file)).claims(issuer.token())
    with pytest.raises(IssuerDown, match="certificate"):
        await TokenVerifier(issuer.config()).claims(issuer.token())
    await issuer.stop()


def files(server: Any) -> dict[str, str]:
    return {"certificate": str(server.certificate), "key": str(server.key)}


# What is refused


def by_hand(header: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """A token that no honest library would make."""

    def part(value: bytes) -> bytes:
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    signed = part(json.dumps(header).encode()) + b"." + part(json.dumps(claims).encode())
    return (signed + b"." + part(sign(signed))).decode()


def good_claims(issuer: Issuer) -> dict[str, Any]:
    return {"iss": issuer.url, "aud": "tandem", "exp": int(time.time()) + 60, "tenant": "acme"}


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", None, ["RS256"], 7])
async def test_an_unsigned_token_is_refused(issuer: Issuer, algorithm: Any) -> None:
    token = by_hand({"alg": algorithm, "kid": "rsa"}, good_claims(issuer), lambda _: b"")
    assert "has a signature that is not accepted" in await refused(issuer.config(), token)


async def test_a_public_key_does_not_serve_as_a_shared_secret(issuer: Issuer) -> None:
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    header = {"alg": "HS256", "kid": "rsa"}
    token = by_hand(header, good_claims(issuer), lambda signed: hmac.digest(pem, signed, hashlib.sha256))
    assert "has a signature that is not accepted" in await refused(issuer.config(), token)


async def test_a_shared_secret_among_the_issuers_keys_is_not_used(issuer: Issuer) -> None:
    token = by_hand({"alg": "RS256", "kid": "shared"}, good_claims(issuer), lambda _: b"x")
    assert "is signed with a key that" in await refused(issuer.config(), token)


async def test_a_key_for_encryption_verifies_nothing(issuer: Issuer) -> None:
    assert "is signed with a key that" in await refused(issuer.config(), issuer.token(kid="secrecy"))


async def test_a_key_verifies_only_with_the_algorithm_that_it_is_for(issuer: Issuer) -> None:
    assert await refused(issuer.config(), issuer.token(RSA, "PS256", "bound")) == "does not verify"


@pytest.mark.parametrize("kid", ["p256", "p384", "ed"])
async def test_a_key_of_another_type_than_the_signature_says_verifies_nothing(issuer: Issuer, kid: str) -> None:
    assert await refused(issuer.config(), issuer.token(RSA, "RS256", kid)) == "does not verify"


async def test_a_curve_of_another_algorithm_verifies_nothing(issuer: Issuer) -> None:
    token = by_hand({"alg": "ES256", "kid": "p384"}, good_claims(issuer), lambda _: b"\x01" * 64)
    assert await refused(issuer.config(), token) == "does not verify"


@pytest.mark.filterwarnings("ignore:The RSA key is 1024 bits")
async def test_a_weak_rsa_key_verifies_nothing(issuer: Issuer) -> None:
    assert await refused(issuer.config(), issuer.token(WEAK, "RS256", "weak")) == "does not verify"


async def test_a_signature_by_somebody_else_is_refused(issuer: Issuer) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert await refused(issuer.config(), issuer.token(other)) == "does not verify"


async def test_claims_that_were_changed_after_signing_are_refused(issuer: Issuer) -> None:
    head, _, signature = issuer.token(tenant="beta").split(".")
    claims = issuer.token(tenant="acme").split(".")[1]
    assert await refused(issuer.config(), f"{head}.{claims}.{signature}") == "does not verify"


async def test_an_algorithm_that_is_not_allowed_is_refused(issuer: Issuer) -> None:
    assert "use ES256" in await refused(issuer.config(algorithms=["ES256"]), issuer.token())


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"aud": "other"}, "is meant for others; its aud must have tandem"),
        ({"aud": ["a", "b"]}, "is meant for others"),
        ({"aud": None}, "lacks aud"),
        ({"iss": "https://evil.example"}, "is not from http://127.0.0.1"),
        ({"iss": None}, "lacks iss"),
        ({"exp": 1_000_000_000}, "has expired; get a new one from http://127.0.0.1"),
        ({"exp": None}, "lacks exp"),
        ({"exp": "soon"}, "does not verify"),
        ({"nbf": 9_999_999_999}, "is not valid yet"),
        ({"iat": 9_999_999_999}, "is not valid yet"),
    ],
)
async def test_a_token_for_another_place_or_time_is_refused(issuer: Issuer, claims: dict[str, Any], said: str) -> None:
    assert said in await refused(issuer.config(), issuer.token(**claims))


async def test_a_token_that_does_not_name_its_key_is_refused(issuer: Issuer) -> None:
    assert await refused(issuer.config(), issuer.token(kid=None)) == "does not name its key (kid)"


@pytest.mark.parametrize("token", ["a.b.c", "..", "e30.e30.", "e30.e30.e30", f"{'A' * 5000}.{'A' * 5000}.A"])
async def test_rubbish_is_refused(issuer: Issuer, token: str) -> None:
    await refused(issuer.config(), token)


async def test_a_token_with_conditions_that_we_do_not_know_is_refused(issuer: Issuer) -> None:
    header = {"alg": "RS256", "kid": "rsa", "crit": ["exp2"], "exp2": 1}
    token = by_hand(header, good_claims(issuer), lambda _: b"x")
    assert await refused(issuer.config(), token) == "is not a JWT"


# The issuer's keys


async def test_many_tokens_at_once_ask_the_issuer_once(issuer: Issuer) -> None:
    verifier = TokenVerifier(issuer.config())
    await asyncio.gather(*(verifier.claims(issuer.token()) for _ in range(50)))
    assert issuer.asked == 1


async def test_an_unknown_key_id_asks_again_but_not_more_often_than_allowed(issuer: Issuer) -> None:
    clock = Clock()
    keys = KeySet(issuer.config(), clock=clock)
    assert await keys.key("rsa")
    assert await asyncio.gather(*(keys.key(f"new-{number}") for number in range(20))) == [None] * 20
    assert issuer.asked == 1
    clock.now += REFRESH_S
    assert await asyncio.gather(*(keys.key(f"new-{number}") for number in range(20))) == [None] * 20
    assert issuer.asked == 2


async def test_a_key_that_the_issuer_has_begun_to_use_is_found(issuer: Issuer) -> None:
    clock = Clock()
    keys = KeySet(issuer.config(), clock=clock)
    assert await keys.key("next") is None
    issuer.keys["next"] = {**PUBLIC["rsa"], "kid": "next"}
    clock.now += REFRESH_S
    assert await keys.key("next")


async def test_a_key_that_the_issuer_has_withdrawn_is_gone_after_the_cache_time(issuer: Issuer) -> None:
    clock = Clock()
    keys = KeySet(issuer.config(cache_s=100), clock=clock)
    assert await keys.key("rsa")
    del issuer.keys["rsa"]
    clock.now += 99
    assert await keys.key("rsa")
    clock.now += 1
    assert await keys.key("rsa")  # the old answer serves this one, the issuer is asked meanwhile
    async with asyncio.timeout(10):
        while await keys.key("rsa"):
            await asyncio.sleep(0.001)


async def test_an_issuer_that_is_away_leaves_its_last_keys_good_for_a_while(issuer: Issuer) -> None:
    clock = Clock()
    keys = KeySet(issuer.config(cache_s=100, stale_s=1000), clock=clock)
    assert await keys.key("rsa")
    issuer.down = True
    clock.now += 1099
    assert await keys.key("rsa")
    clock.now += 1
    with pytest.raises(IssuerDown):
        await keys.key("rsa")


async def test_an_issuer_that_is_away_at_first_is_asked_again_soon_and_not_by_every_request(issuer: Issuer) -> None:
    issuer.down = True
    clock = Clock()
    keys = KeySet(issuer.config(), clock=clock)
    for _ in range(20):
        with pytest.raises(IssuerDown, match="its keys could not be read"):
            await keys.key("rsa")
    assert issuer.asked == 1
    issuer.down = False
    clock.now += RETRY_S
    assert await keys.key("rsa")


async def test_an_issuer_that_does_not_answer_costs_no_more_than_its_deadline(issuer: Issuer) -> None:
    issuer.answers.clear()
    with pytest.raises(IssuerDown, match=r"did not answer within 0\.05 s|timed out"):
        await KeySet(issuer.config(timeout_s=0.05)).key("rsa")


async def test_an_issuer_that_takes_its_time_is_not_asked_twice(issuer: Issuer) -> None:
    clock = Clock()
    keys = KeySet(issuer.config(timeout_s=30), clock=clock)
    issuer.answers.clear()
    first = asyncio.create_task(keys.key("rsa"))
    async with asyncio.timeout(10):
        while not issuer.asked:
            await asyncio.sleep(0.001)
    clock.now += RETRY_S
    second = asyncio.create_task(keys.key("rsa"))
    await asyncio.sleep(0)
    issuer.answers.set()
    assert await first
    assert await second
    assert issuer.asked == 1


async def test_who_stops_waiting_does_not_stop_the_others(issuer: Issuer) -> None:
    keys = KeySet(issuer.config())
    first = asyncio.create_task(keys.key("rsa"))
    second = asyncio.create_task(keys.key("rsa"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "is not the JSON it should be"),
        (b"\xff", "is not the JSON it should be"),
        (b"[]", "is not the JSON it should be"),
        (b'{"keys": []}', "has no key that could verify a signature"),
        (b" " * (2**20 + 1), "is too large or too slow"),
    ],
)
async def test_an_answer_that_is_no_key_set_is_said_to_be_so(issuer: Issuer, body: bytes, said: str) -> None:
    issuer.bodies["/jwks"] = body
    with pytest.raises(IssuerDown, match=said):
        await KeySet(issuer.config()).key("rsa")


async def test_a_redirect_to_where_the_answer_could_be_changed_is_not_followed(issuer: Issuer) -> None:
    issuer.redirect = "http://idp.example/jwks"
    with pytest.raises(IssuerDown, match="which is not https"):
        await KeySet(issuer.config()).key("rsa")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"issuer": "https://evil.example", "jwks_uri": "https://evil.example/jwks"}, "speaks for another issuer"),
        ({"jwks_uri": "http://evil.example/jwks"}, "has no https:// jwks_uri"),
    ],
)
async def test_discovery_that_leads_elsewhere_is_not_followed(
    issuer: Issuer, document: dict[str, str], said: str
) -> None:
    body = {"issuer": issuer.url, **document}
    issuer.bodies["/.well-known/openid-configuration"] = json.dumps(body).encode()
    with pytest.raises(IssuerDown, match=said):
        await KeySet(issuer.config(jwks_url=None)).key("rsa")


# From a token to a tenant


@pytest.fixture
async def asked(issuer: Issuer, tmp_path: Path) -> AsyncIterator[Authenticator]:
    store = await open_store("embedded", fleet="t", folder=tmp_path)
    config = FleetConfig.model_validate(
        {
            "gateway": {"auth": "required"},
            "tenants": {"acme": {}, "beta": {"subjects": ["service-7"]}},
            "oidc": issuer.config().model_dump(),
        }
    )
    assert config.oidc
    yield Authenticator(config, KeyRing(store), TokenVerifier(config.oidc))
    await store.close()


def bearer(token: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {token}".encode()}


async def test_the_claim_names_the_tenant(issuer: Issuer, asked: Authenticator) -> None:
    assert (await asked.authenticate(bearer(issuer.token()), None)).name == "acme"


async def test_a_subject_that_the_configuration_knows_counts_before_the_claim(
    issuer: Issuer, asked: Authenticator
) -> None:
    assert (await asked.authenticate(bearer(issuer.token(sub="service-7")), None)).name == "beta"


@pytest.mark.parametrize("claims", [{"tenant": "gone"}, {"tenant": None}, {"tenant": ["acme"]}, {"tenant": {}}])
async def test_a_good_token_of_no_tenant_is_forbidden(
    issuer: Issuer, asked: Authenticator, claims: dict[str, Any]
) -> None:
    with pytest.raises(ApiError) as caught:
        await asked.authenticate(bearer(issuer.token(**claims)), None)
    assert (caught.value.status, caught.value.code) == (403, "tenant_not_found")


async def test_a_bad_token_is_unauthorized_and_says_why_without_repeating_it(
    issuer: Issuer, asked: Authenticator
) -> None:
    token = issuer.token(exp=1_000_000_000)
    with pytest.raises(ApiError, match="The token has expired") as caught:
        await asked.authenticate(bearer(token), None)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert not any(part in caught.value.message for part in token.split("."))


async def test_when_the_issuer_is_away_the_client_is_asked_to_come_again(issuer: Issuer, asked: Authenticator) -> None:
    issuer.down = True
    with pytest.raises(ApiError) as caught:
        await asked.authenticate(bearer(issuer.token()), None)
    assert (caught.value.status, caught.value.code) == (503, "issuer_unavailable")
    assert dict(caught.value.headers())[b"retry-after"] == b"5"
