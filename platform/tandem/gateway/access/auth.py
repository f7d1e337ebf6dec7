"""Who asks: an API key, a JWT or a client certificate → a tenant; and what that tenant may ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tandem.config import FleetConfig, TenantConfig
from tandem.core.tenants import ANONYMOUS, Priority, Tenant
from tandem.gateway.access.jwks import IssuerDown
from tandem.gateway.access.keys import KEY_PATTERN, PREFIX, KeyFault, KeyRing
from tandem.gateway.access.oidc import TokenRefused, TokenVerifier
from tandem.gateway.access.tls import names_in
from tandem.gateway.api.requests import model_not_found
from tandem.gateway.errors import ApiError

_KEY_HEADERS = (b"x-api-key", b"api-key")
"""Anthropic's clients and Azure's send a key so; everybody else as `Authorization: Bearer`."""
_PREFIX = PREFIX.encode()
_TELL = "Send it as `Authorization: Bearer <key>`; who runs this server makes keys with `tandem keys create`."


class Unauthorized(ApiError):
    """401: we do not know who asks."""

    def __init__(self, message: str, *, shown: bool = True) -> None:
        """`shown`: there was a key or token, and it was not good."""
        super().__init__(401, message, code="invalid_api_key")
        self._shown = shown

    def headers(self) -> list[tuple[bytes, bytes]]:
        # RFC 6750: no error code for who did not try.
        challenge = b'Bearer realm="tandem"' + (b', error="invalid_token"' if self._shown else b"")
        return [*super().headers(), (b"www-authenticate", challenge)]


class Identity(NamedTuple):
    """Who asks."""

    tenant: Tenant
    key: str = ""
    """Id of the API key, which may be shown; empty if it was none."""


class Authenticator:
    """Tells the tenant of each request of one replica.

    Where nothing has to be shown (`gateway.auth`), a foreign key, such as the placeholder that SDKs insist on, is as
    good as none. One of ours is always checked: who shows it means to be that tenant.
    """

    def __init__(
        self,
        config: FleetConfig,
        keys: KeyRing,
        tokens: TokenVerifier | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`tokens` verifies JWTs, None = they are not accepted; `clock` gives Unix seconds."""
        self._required = config.gateway.auth_required
        self._keys = keys
        self._tokens = tokens
        self._tenant_claim = config.oidc.tenant_claim if config.oidc else ""
        self._clock = clock
        self._default = _tenant(ANONYMOUS.name, config.default_tenant)
        self._tenants = {name: tenant_of(name, config) for name in config.tenants}
        self._subjects = {subject: name for name, tenant in config.tenants.items() for subject in tenant.subjects}
        self._certificates = {
            subject: name for name, tenant in config.tenants.items() for subject in tenant.certificate_subjects
        }

    async def authenticate(self, headers: Mapping[bytes, bytes], certificate: Mapping[str, Any] | None) -> Tenant:
        """The tenant of a request; see `identify`."""
        return (await self.identify(headers, certificate)).tenant

    async def identify(self, headers: Mapping[bytes, bytes], certificate: Mapping[str, Any] | None) -> Identity:
        """Who makes a request. Raises ApiError: 401, 403, or 503 when the issuer of its token is away.

        `headers` with names in small letters (gRPC metadata serves as well); `certificate`: the client's verified one,
        as `ssl.SSLSocket.getpeercert` has it. A key or token counts before a certificate: it says more.
        """
        shown = _credential(headers)
        if shown is not None:
            if shown.startswith(_PREFIX):
                return self._by_key(shown)
            if self._tokens is not None and shown.count(b".") == 2:
                return Identity(await self._by_token(shown, self._tokens))
        if certificate is not None:
            for name in names_in(certificate):
                if name in self._certificates:
                    return Identity(self._tenants[self._certificates[name]])
        if not self._required:
            return Identity(self._default)
        if shown is not None:
            raise Unauthorized(f"This is not an API key of this server: its keys begin with {PREFIX}. {_TELL}")
        if certificate:
            raise Unauthorized(f"Your client certificate belongs to no tenant, and there is no API key. {_TELL}")
        if b"authorization" in headers:
            raise Unauthorized(f"The authorization header has no bearer token. {_TELL}")
        raise Unauthorized(f"You did not provide an API key. {_TELL}", shown=False)

    def _by_key(self, key: bytes) -> Identity:
        form = KEY_PATTERN.fullmatch(key)
        if form is None:
            raise Unauthorized(f"This API key is not complete, or has letters too many: copy it again. {_TELL}")
        name = f"{PREFIX}{form[1].decode()}"
        found = self._keys.check(key, now=self._clock())
        if isinstance(found, KeyFault):
            raise Unauthorized(f"The API key {name}-… {found.value}. {_TELL}")
        return Identity(self._named(found.tenant, f"the API key {name}-…"), name)

    async def _by_token(self, token: bytes, tokens: TokenVerifier) -> Tenant:
        try:
            claims = await tokens.claims(token.decode("ascii"))
        except (TokenRefused, UnicodeDecodeError) as error:
            why = error if isinstance(error, TokenRefused) else "is not a JWT"
            raise Unauthorized(f"The token {why}.") from None
        except IssuerDown as error:
            message = f"Tokens cannot be verified now: the issuer is away ({error}). Try again shortly."
            raise ApiError(503, message, type="server_error", code="issuer_unavailable", retry_after=5) from None
        if (own := self._subjects.get(claims.get("sub", ""))) is not None:
            return self._tenants[own]
        name = claims.get(self._tenant_claim)
        if not isinstance(name, str):
            message = f"The token names no tenant: it has no claim {self._tenant_claim!r}, and its sub is no tenant's."
            raise ApiError(403, message, code="tenant_not_found")
        return self._named(name, "the token")

    def _named(self, name: str, source: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            message = f"There is no tenant {name!r:.80} (any more), for which {source} is. Ask who runs this server."
            raise ApiError(403, message, code="tenant_not_found")
        return tenant


def tenant_of(name: str, config: FleetConfig) -> Tenant:
    """The tenant `name` of the configuration. Raises KeyError if there is none; the error lists those there are."""
    if name == ANONYMOUS.name:
        return _tenant(name, config.default_tenant)
    if name not in config.tenants:
        raise KeyError(f"no tenant {name!r}; there are: {', '.join(sorted(config.tenants)) or 'none'}")
    return _tenant(name, config.tenants[name])


def check_model(tenant: Tenant, model: str) -> None:
    """Raise ApiError unless `tenant` may use `model`.

    404 and OpenAI's words, the same as for a model that is not there: clients know that answer, and nobody learns
    which models others have.
    """
    if tenant.models is not None and model not in tenant.models:
        raise model_not_found(model)


def _credential(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key or token that a request shows; None = none."""
    value = headers.get(b"authorization")
    if value is not None:
        scheme, _, token = value.partition(b" ")
        if scheme.lower() == b"bearer" and (token := token.strip()):
            return token
    for name in _KEY_HEADERS:
        if value := headers.get(name):
            return value.strip()
    return None


def _tenant(name: str, config: TenantConfig) -> Tenant:
    return Tenant(
        name=name,
        priority=Priority(config.priority),
        weight=config.weight,
        requests_per_minute=config.requests_per_minute,
        input_tokens_per_minute=config.input_tokens_per_minute,
        output_tokens_per_minute=config.output_tokens_per_minute,
        concurrency=config.concurrency,
        models=config.models,
    )
