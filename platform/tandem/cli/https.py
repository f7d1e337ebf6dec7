"""The command line's way to a gateway: `http` or `https`, with an API key and a client certificate.

One connection a request, and everything is verified. Engines have `engine/http1.Pool`, which is faster and knows
neither.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

import httptools
import msgspec
import typer

from tandem.config import FleetConfig
from tandem.engine.http1 import HttpFailure, Interrupted, TimedOut, Unreachable

_T = TypeVar("_T")

CONNECT_S = 5.0
_PIECE = 64 * 1024
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"

Key = Annotated[
    str | None,
    typer.Option(
        envvar="TANDEM_API_KEY",
        show_default=False,
        help="API key or JWT. What stands on a command line every user of the machine can read: rather set the "
        'variable, or give "-" to be asked for it.',
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        envvar="TANDEM_CA",
        show_default=False,
        help="CAs (PEM) that the gateway's certificate must come from; none = the fleet's own certificate where its "
        "file is here, else the system's CAs.",
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option("--cert", envvar="TANDEM_CERT", show_default=False, help="Your certificate (PEM), for mTLS."),
]
CertificateKey = Annotated[
    Path | None,
    typer.Option(
        "--cert-key",
        envvar="TANDEM_CERT_KEY",
        show_default=False,
        help="Its private key (PEM); none = it is in the same file.",
    ),
]


class AccessError(Exception):
    """What was given to get in with cannot be used; the message says what and why."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """What this user shows to a gateway, and what it must show to us."""

    key: str = ""
    """API key or JWT; "" = none."""
    ca: Path | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None
    pinned: Path | None = None
    """The gateway's own certificate. Without `ca` it alone is trusted, whatever names it has."""

    def __repr__(self) -> str:
        return f"Access({'with' if self.key else 'without'} a key)"

    def context(self) -> ssl.SSLContext:
        """For a connection that begins now. Raises AccessError."""
        context = ssl.create_default_context(cafile=None if self.ca is None else _file(self.ca))
        if self.ca is None and self.pinned is not None:
            context = _pinned(self.pinned)
        context.set_alpn_protocols(["http/1.1"])
        if self.certificate is not None:
            key = self.certificate_key or self.certificate
            try:
                # Without a password OpenSSL would ask the terminal for one.
                context.load_cert_chain(_file(self.certificate), _file(key), password="")
            except ssl.SSLError as error:
                why = error.reason or str(error)
                raise AccessError(
                    f"{self.certificate} and {key} are no certificate and its key ({why}): "
                    "both must be PEM files, the key without a passphrase"
                ) from None
        return context


def access_to(config: FleetConfig | None, access: Access) -> Access:
    """`access` with what the configuration of a fleet of this machine says of its certificate."""
    tls = None if config is None else config.gateway.tls
    if tls is None or not tls.certificate.is_file():
        return access
    return msgspec.structs.replace(access, pinned=tls.certificate)


class Answer:
    """An answer as it arrives: `head` first, then `chunk` until None, or `read` for all of it."""

    def __init__(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.status = 0
        self._peer = peer
        self._reader = reader
        self._writer = writer
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: deque[bytes] = deque()
        self._done = False

    async def head(self, within: float | None) -> int:
        """The status, as soon as all headers are here; `within` seconds. Raises HttpFailure."""
        while not self.status:
            await self._feed(within)
        return self.status

    async def chunk(self, within: float | None) -> bytes | None:
        """Everything of the body that has arrived since the last call; None at its end. Raises HttpFailure."""
        while not self._pieces and not self._done:
            await self._feed(within)
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data or None

    async def read(self, within: float) -> bytes:
        """The whole body; `within` seconds for each piece of it. Raises HttpFailure."""
        pieces = []
        while (piece := await self.chunk(within)) is not None:
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close the connection. Harmless when repeated."""
        self._writer.transport.abort()

    async def _feed(self, within: float | None) -> None:
        try:
            data = await _within(self._reader.read(_PIECE), within, f"nothing more from {self._peer}")
        except ssl.SSLError as error:
            raise _tls_failure(self._peer, error) from None
        except OSError as error:
            raise self._cut(f" ({error.strerror or error})") from None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise Interrupted(f"{self._peer} did not answer in HTTP/1.1: {error}") from None
        if not data and not self._done:
            raise self._cut()

    def _cut(self, why: str = "") -> Interrupted:
        # Whoever lacks a good client certificate is often sent away without the alert that would say so.
        secure = not self.status and self._writer.get_extra_info("ssl_object") is not None
        advice = "; does it ask for a client certificate of its own CA (--cert, --cert-key)?" if secure else ""
        return Interrupted(f"{self._peer} closed the connection before its answer was complete{why}{advice}")

    # httptools

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._done = True


class GatewayClient:
    """Sends requests to gateways with this access. What it asks and hears is `engine/http1.Pool`'s."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def request(self, method: str, url: str, *, body: bytes = b"") -> Answer:
        """Send one request; the answer is then awaited. Raises AccessError, HttpFailure."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AccessError(f"{url!r} is no http:// or https:// URL")
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\ncontent-length: {len(body)}\r\n"
            "content-type: application/json\r\nconnection: close\r\n"
        )
        request = head.encode("ascii") + self._authorization() + b"\r\n" + body
        peer = f"{parts.scheme}://{parts.hostname}:{port}"
        context = self._access.context() if secure else None
        try:
            opened = asyncio.open_connection(parts.hostname, port, ssl=context)
            reader, writer = await _within(opened, CONNECT_S, f"no connection to {peer}")
        except ssl.SSLError as error:
            raise _tls_failure(peer, error) from None
        except OSError as error:
            raise Unreachable(f"no connection to {peer}: {error.strerror or error}") from None
        writer.write(request)
        return Answer(peer, reader, writer)

    async def fetch(self, method: str, url: str, *, within: float = 5.0) -> tuple[int, bytes]:
        """A whole small exchange, (status, body). Raises AccessError, HttpFailure."""
        answer = await self.request(method, url)
        try:
            return await answer.head(within), await answer.read(within)
        finally:
            answer.close()

    async def close(self) -> None:
        """Nothing is kept open between requests."""

    def _authorization(self) -> bytes:
        key = self._access.key
        if not key:
            return b""
        if not key.isascii() or not key.isprintable() or " " in key:
            raise AccessError("the API key has letters that no key has, such as a blank: copy it again")
        return b"authorization: Bearer " + key.encode("ascii") + b"\r\n"


async def _within(work: Awaitable[_T], within: float | None, what: str) -> _T:
    try:
        async with asyncio.timeout(within):
            return await work
    except TimeoutError:
        raise TimedOut(f"{what} within {within or 0:g} s") from None


def _pinned(path: Path) -> ssl.SSLContext:
    """Trust the first certificate in the file, and nothing else.

    Who has its private key is the gateway, by whatever name or address it was reached. The CAs that may follow it in
    the file must not count: they sign others, too.
    """
    text = Path(_file(path)).read_text("ascii", errors="replace")
    first = text.partition(_BEGIN)[2].partition(_END)[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=f"{_BEGIN}{first}{_END}\n")
    except ssl.SSLError as error:
        raise AccessError(f"{path} holds no certificate ({error.reason or error}): name a CA with --ca") from None
    return context


def _file(path: Path) -> str:
    try:
        path.open("rb").close()
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}") from None
    return str(path)


def _tls_failure(peer: str, error: ssl.SSLError) -> HttpFailure:
    why = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Unreachable(
            f"the certificate that {peer} shows is not trusted ({error.verify_message}): "
            "name the CA that it comes from with --ca, or TANDEM_CA"
        )
    if "CERTIFICATE_REQUIRED" in why or "HANDSHAKE_FAILURE" in why:
        return Unreachable(f"{peer} asks for a client certificate ({why}): give it with --cert and --cert-key")
    if "ALERT" in why:
        return Unreachable(
            f"{peer} refused the connection ({why}): is the client certificate (--cert) of a CA it trusts?"
        )
    return Unreachable(f"no TLS with {peer}: {why}")
