"""TLS for HTTP and gRPC: certificates that are read again when their files change, and what a client's one says.

Each change makes a whole new context from the files and hands new connections over to it. Loading into the old one
would not do: a certificate whose key has not been written yet would leave it without a key, and a CA that was taken
out of `client_ca` would stay trusted.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from tandem.config import TlsConfig

log = logging.getLogger(__name__)

CHECK_S = 5.0
"""How often the files are looked at. Not by inotify: Kubernetes swaps a link far above them, and network file systems
tell nobody."""
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_VERIFY = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL}
_SAN_KINDS = frozenset({"DNS", "URI", "email"})


class TlsError(RuntimeError):
    """The files cannot be used; the message says which and why."""


def server_ssl_context(config: TlsConfig) -> ssl.SSLContext:
    """The context for an HTTP server, from the files as they are now. Raises TlsError."""
    for path in _files(config):
        _read(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[config.min_version]
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password OpenSSL would ask the terminal for one.
        context.load_cert_chain(config.certificate, config.key, password="")
    except ssl.SSLError as error:
        why = error.reason or str(error)
        raise TlsError(
            f"{config.certificate} and {config.key} are no certificate and its key ({why}): "
            "both must be PEM files, the key without a passphrase"
        ) from None
    if config.client_ca is not None:
        try:
            context.load_verify_locations(config.client_ca)
        except ssl.SSLError as error:
            why = error.reason or str(error)
            raise TlsError(f"{config.client_ca} holds no CA certificates ({why}): it must be a PEM file") from None
        context.verify_mode = _VERIFY[config.client_certificates]
        # A resumed session would not be checked against CAs that have changed meanwhile.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return context


async def follow(context: ssl.SSLContext, config: TlsConfig, *, period: float = CHECK_S) -> None:
    """Keep `context`, which a server listens with, as its files are, until cancelled. `period` in seconds.

    Files that cannot be used are logged, and the last good ones stay. Connections that exist are left alone.
    """
    seen: object = None
    while True:
        stamp = await asyncio.to_thread(_stamp, config)
        if stamp != seen:
            try:
                _hand_over(context, await asyncio.to_thread(server_ssl_context, config))
            except TlsError as error:
                log.error("the gateway goes on with the TLS files it has: %s", error)
            else:
                log.info("TLS files read: %s", ", ".join(str(path) for path in _files(config)))
            seen = stamp
        await asyncio.sleep(period)


def grpc_server_credentials(config: TlsConfig) -> grpc.ServerCredentials:
    """The same for a gRPC server; it looks at the files whenever a client connects. Raises TlsError.

    gRPC knows no optional client certificates: it asks for them only where they are required.
    """
    if config.min_version != "1.2":
        log.warning(
            "gateway.tls.min_version %s holds for HTTP only: gRPC takes TLS 1.2 as well, which its library cannot be "
            "kept from; close gateway.grpc_port to clients if that must not be",
            config.min_version,
        )
    if config.client_ca is not None and config.client_certificates == "optional":
        log.warning(
            'gRPC asks no client for a certificate, as gateway.tls.client_certificates is "optional": over gRPC '
            "tenants need a key or a token"
        )
    files = _GrpcFiles(config)
    required = config.client_ca is not None and config.client_certificates == "required"
    return grpc.dynamic_ssl_server_credentials(files.read(), files, required)  # type: ignore[arg-type]  # None = no news


def probe_context(config: TlsConfig) -> ssl.SSLContext:
    """For a client that asks its own gateway's /health: no secret is sent, so nothing is verified. Raises TlsError.

    Where client certificates are required it shows the gateway's own; unless that one is good for clients too and of a
    CA in `client_ca`, the server ends the handshake with an alert, which at least shows that it lives.
    """
    server_ssl_context(config)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if config.client_ca is not None and config.client_certificates == "required":
        context.load_cert_chain(config.certificate, config.key, password="")
    return context


def names_in(certificate: Mapping[str, Any]) -> list[str]:
    """What a verified client certificate is called, written as `certificate_subjects` has it: `CN:acme`.

    `certificate` as `ssl.SSLSocket.getpeercert` gives it. SANs come first: they are what names mean today.
    """
    names = [f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ()) if kind in _SAN_KINDS]
    for part in certificate.get("subject", ()):
        names.extend(f"CN:{value}" for kind, value in part if kind == "commonName")
    return names


def grpc_certificate(auth_context: Mapping[str, Sequence[bytes]]) -> dict[str, Any] | None:
    """A gRPC client's certificate (`ServicerContext.auth_context`) as `names_in` takes it; None without one."""
    if not auth_context.get("x509_pem_cert"):
        return None
    sans = [(kind, name) for kind in _SAN_KINDS for name in _texts(auth_context, f"peer_{kind.lower()}")]
    common = tuple((("commonName", name),) for name in _texts(auth_context, "x509_common_name"))
    return {"subject": common, "subjectAltName": tuple(sans)}


class _GrpcFiles:
    """Gives gRPC the files' content when it has changed."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._seen: object = None

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        stamp = _stamp(self._config)
        if stamp == self._seen:
            return None
        try:
            return self.read()
        except TlsError as error:
            self._seen = stamp
            log.error("gRPC goes on with the TLS files it has: %s", error)
            return None

    def read(self) -> grpc.ServerCertificateConfiguration:
        stamp = _stamp(self._config)
        server_ssl_context(self._config)
        chain, key, *roots = (_read(path) for path in _files(self._config))
        if _stamp(self._config) != stamp:
            raise TlsError(f"{self._config.certificate} or a file beside it is being written")
        self._seen = stamp
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots[0] if roots else None)


def _hand_over(context: ssl.SSLContext, successor: ssl.SSLContext) -> None:
    def choose(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        connection.context = successor

    # OpenSSL calls this at the start of every handshake, whether or not the client names a server.
    context.sni_callback = choose


def _files(config: TlsConfig) -> Iterator[Path]:
    yield config.certificate
    yield config.key
    if config.client_ca is not None:
        yield config.client_ca


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path} cannot be read: {error.strerror}") from error


def _stamp(config: TlsConfig) -> list[tuple[int, int, int] | None]:
    return [_stamp_of(path) for path in _files(config)]


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:  # whoever reads it says why
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _texts(auth_context: Mapping[str, Sequence[bytes]], field: str) -> list[str]:
    return [value.decode(errors="replace") for value in auth_context.get(field, ())]
