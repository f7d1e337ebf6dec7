"""The public keys of the token issuer: fetched, kept, and fetched again when there is a reason to.

They are fetched by urllib in a thread: rarely enough that speed is nothing, and it brings TLS and the proxies of the
environment, which a gateway inside a company often needs to reach its issuer.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import math
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import jwt
import msgspec

from tandem.config import OidcConfig, is_safe_url

log = logging.getLogger(__name__)

REFRESH_S = 30.0
"""While there are keys, the issuer is asked at most so often: tokens with invented key ids cost it nothing more."""
RETRY_S = 5.0
"""The same while there are none."""
_LIMIT = 2**20


class IssuerDown(Exception):
    """The issuer's keys are not to be had, or too old. The message is one sentence for a person."""


class _Document(msgspec.Struct):
    """What discovery and the key set itself have, as far as it counts here."""

    issuer: str = ""
    jwks_uri: str = ""
    keys: list[Any] = []


class PublicKey(NamedTuple):
    """A key of the issuer."""

    key: Any
    """As `jwt.decode` takes it."""
    algorithm: str | None
    """The only one that it is for; None = any that its type can do."""


class KeySet:
    """The keys by their ids. Belongs to one event loop."""

    def __init__(self, config: OidcConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds. Raises IssuerDown if `ca` cannot be used."""
        self._config = config
        self._clock = clock
        self._keys: Mapping[str, PublicKey] = {}
        self._fetched = -math.inf
        self._tried = -math.inf
        self._fault = ""
        self._refresh: asyncio.Task[None] | None = None
        try:
            trusted = ssl.create_default_context(cafile=config.ca)
        except OSError as error:
            raise IssuerDown(f"oidc.ca: {config.ca} cannot be used: {error}") from error
        handler = urllib.request.HTTPSHandler(context=trusted)
        self._opener = urllib.request.build_opener(handler, _SafeRedirects)

    async def key(self, name: str) -> PublicKey | None:
        """The key with the id `name`; None = the issuer has none of that name. Raises IssuerDown.

        Waits for the issuer only where there is no other way: for an id that was never seen, or when there are no keys
        yet. One request asks, the others wait for the same answer.
        """
        now = self._clock()
        fresh = now - self._fetched < self._config.cache_s
        if not fresh or name not in self._keys:
            self._start(now)
        if self._usable(now) and name in self._keys:
            return self._keys[name]
        if self._refresh is not None:
            # Who stops waiting must not stop the others.
            await asyncio.shield(self._refresh)
        if not self._usable(self._clock()):
            raise IssuerDown(self._fault or "its keys were never fetched")
        return self._keys.get(name)

    async def close(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.wait([self._refresh])

    def _usable(self, now: float) -> bool:
        return now - self._fetched < self._config.cache_s + self._config.stale_s

    def _start(self, now: float) -> None:
        """Ask the issuer, unless it is being asked or was a short while ago."""
        pause = REFRESH_S if self._usable(now) else RETRY_S
        if self._refresh is None and now - self._tried >= pause:
            self._tried = now
            self._refresh = asyncio.create_task(self._fetch(), name="jwks")
            self._refresh.add_done_callback(self._done)

    def _done(self, _: asyncio.Task[None]) -> None:
        self._refresh = None

    async def _fetch(self) -> None:
        within = self._config.timeout_s
        try:
            async with asyncio.timeout(within):
                keys = await asyncio.to_thread(self._read_keys)
        except TimeoutError:
            self._fault = f"it did not answer within {within:g} s"
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._fault = f"its keys could not be read: {error}"
        else:
            self._keys, self._fetched, self._fault = keys, self._clock(), ""
            return
        log.warning("the token issuer %s: %s; %d keys from before", self._config.issuer, self._fault, len(self._keys))

    # In a thread

    def _read_keys(self) -> dict[str, PublicKey]:
        """Raises OSError, ValueError or HTTPException."""
        url = self._config.jwks_url or self._discover()
        found: dict[str, PublicKey] = {}
        for data in self._get(url).keys:
            if isinstance(data, dict) and isinstance(data.get("kid"), str) and _is_for_signatures(data):
                # A kind of key that we do not know is none of ours; the others count.
                with contextlib.suppress(jwt.PyJWTError, KeyError, TypeError, ValueError):
                    found[data["kid"]] = PublicKey(jwt.PyJWK(data).key, data.get("alg"))
        if not found:
            raise ValueError(f"{url} has no key that could verify a signature")
        return found

    def _discover(self) -> str:
        issuer = self._config.issuer
        url = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
        document = self._get(url)
        if document.issuer != issuer:
            raise ValueError(f"{url} speaks for another issuer, {document.issuer!r}")
        if not is_safe_url(document.jwks_uri):
            raise ValueError(f"{url} has no https:// jwks_uri; set oidc.jwks_url")
        return document.jwks_uri

    def _get(self, url: str) -> _Document:
        ends = time.monotonic() + self._config.timeout_s
        request = urllib.request.Request(url, headers={"accept": "application/json"})
        body = b""
        with self._opener.open(request, timeout=self._config.timeout_s) as response:
            while piece := response.read1(65536):
                body += piece
                if len(body) > _LIMIT or time.monotonic() > ends:
                    raise ValueError(f"{url} is too large or too slow")
        try:
            return msgspec.json.decode(body, type=_Document)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{url} is not the JSON it should be: {error}") from error


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where nobody on the way can change the answer."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not is_safe_url(newurl):
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_for_signatures(data: dict[str, Any]) -> bool:
    return data.get("use", "sig") == "sig" and data.get("kty") in ("RSA", "EC", "OKP")
