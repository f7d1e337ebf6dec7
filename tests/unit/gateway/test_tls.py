"""TLS and mTLS on real sockets: who gets in, what the server learns of them, and what a rotation changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop
from certificates import Authority, Signed

from tandem.config import TlsConfig
from tandem.gateway.access.tls import (
    TlsError,
    follow,
    grpc_certificate,
    grpc_server_credentials,
    names_in,
    probe_context,
    server_ssl_context,
)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings(server: Signed, **more: Any) -> TlsConfig:
    return TlsConfig(certificate=server.certificate, key=server.key, **more)


def trusting(ca: Authority, client: Signed | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca.file))
    if client:
        context.load_cert_chain(client.certificate, client.key)
    return context


@contextlib.asynccontextmanager
async def listening(context: ssl.SSLContext) -> AsyncIterator[int]:
    """A server that greets each client by the names in its certificate, and closes."""

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        certificate = writer.get_extra_info("ssl_object").getpeercert() or {}
        writer.write(f"hello {','.join(names_in(certificate))}".encode())
        writer.close()

    server = await asyncio.start_server(tell, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def visit(port: int, context: ssl.SSLContext) -> tuple[str, int]:
    """The names that the server greets, and the serial number of its certificate. Raises OSError when refused: in
    TLS 1.3 a client learns so only after its own handshake, as an alert or as an end without a greeting."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            certificate = writer.get_extra_info("ssl_object").getpeercert()
            said = (await reader.read()).decode()
            if not said.startswith("hello "):
                raise ConnectionResetError("refused")
            return said.removeprefix("hello "), int(certificate["serialNumber"], 16) if certificate else 0
        finally:
            writer.close()


async def served(port: int, context: ssl.SSLContext, wanted: Callable[[int], bool]) -> int:
    """The serial number that the server shows once `wanted` likes it."""
    async with asyncio.timeout(10):
        while True:
            _, serial = await visit(port, context)
            if wanted(serial):
                return serial
            await asyncio.sleep(0.01)


async def test_a_client_that_trusts_the_ca_gets_through(ca: Authority) -> None:
    server = ca.server()
    async with listening(server_ssl_context(settings(server))) as port:
        assert await visit(port, trusting(ca)) == ("", server.serial)


async def test_a_client_certificate_is_known_by_its_names(ca: Authority) -> None:
    client = ca.client("acme", uri="spiffe://corp/acme")
    async with listening(server_ssl_context(settings(ca.server(), client_ca=ca.file))) as port:
        said, _ = await visit(port, trusting(ca, client))
    assert said == "URI:spiffe://corp/acme,CN:acme"


async def test_without_a_required_client_certificate_nobody_gets_in(ca: Authority) -> None:
    async with listening(server_ssl_context(settings(ca.server(), client_ca=ca.file))) as port:
        with pytest.raises(OSError):  # noqa: PT011
            await visit(port, trusting(ca))


async def test_a_client_certificate_of_another_ca_does_not_get_in(ca: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "other").client("acme")
    config = settings(ca.server(), client_ca=ca.file, client_certificates="optional")
    async with listening(server_ssl_context(config)) as port:
        with pytest.raises(OSError):  # noqa: PT011
            await visit(port, trusting(ca, stranger))


async def test_a_servers_certificate_does_not_pass_for_a_clients(ca: Authority) -> None:
    async with listening(server_ssl_context(settings(ca.server(), client_ca=ca.file))) as port:
        with pytest.raises(OSError):  # noqa: PT011
            await visit(port, trusting(ca, ca.server("another")))


async def test_where_client_certificates_are_optional_one_gets_in_without(ca: Authority) -> None:
    config = settings(ca.server(), client_ca=ca.file, client_certificates="optional")
    async with listening(server_ssl_context(config)) as port:
        assert (await visit(port, trusting(ca)))[0] == ""
        assert (await visit(port, trusting(ca, ca.client("acme"))))[0] == "CN:acme"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_with_a_certificate_gets_no_ticket_that_outlives_its_ca(
    ca: Authority, version: ssl.TLSVersion
) -> None:
    client = trusting(ca, ca.client("acme"))
    client.maximum_version = version
    async with listening(server_ssl_context(settings(ca.server(), client_ca=ca.file))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        assert await reader.read() == b"hello CN:acme"
        assert not writer.get_extra_info("ssl_object").session.has_ticket
        writer.close()


async def test_an_older_tls_than_allowed_is_refused(ca: Authority) -> None:
    client = trusting(ca)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listening(server_ssl_context(settings(ca.server()))) as port:
        assert (await visit(port, client))[0] == ""
    async with listening(server_ssl_context(settings(ca.server(), min_version="1.3"))) as port:
        with pytest.raises(OSError):  # noqa: PT011
            await visit(port, client)


async def test_the_probe_gets_in_without_trusting_the_ca(ca: Authority) -> None:
    config = settings(ca.server(), client_ca=ca.file, client_certificates="optional")
    async with listening(server_ssl_context(config)) as port:
        assert (await visit(port, probe_context(config)))[0] == ""


@contextlib.asynccontextmanager
async def following(context: ssl.SSLContext, config: TlsConfig) -> AsyncIterator[None]:
    task = asyncio.create_task(follow(context, config, period=0.01))
    yield
    task.cancel()
    await asyncio.wait([task])


async def test_a_new_certificate_is_shown_to_new_connections(ca: Authority) -> None:
    server, successor = ca.server(), ca.server("successor")
    context = server_ssl_context(settings(server))
    async with listening(context) as port, following(context, settings(server)):
        assert (await visit(port, trusting(ca)))[1] == server.serial
        server.replace(successor)
        assert await served(port, trusting(ca), lambda serial: serial == successor.serial)


async def test_a_certificate_whose_key_is_not_there_yet_leaves_the_old_one(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    server, successor = ca.server(), ca.server("successor")
    context = server_ssl_context(settings(server))
    async with listening(context) as port, following(context, settings(server)):
        server.certificate.write_bytes(successor.certificate.read_bytes())
        async with asyncio.timeout(10):
            while "goes on with the TLS files it has" not in caplog.text:
                await asyncio.sleep(0.01)
        assert (await visit(port, trusting(ca)))[1] == server.serial
        server.key.write_bytes(successor.key.read_bytes())
        assert await served(port, trusting(ca), lambda serial: serial == successor.serial)


async def test_a_client_ca_that_was_replaced_is_no_longer_trusted(ca: Authority, tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    before, after = old.client("before"), new.client("after")
    config = settings(ca.server(), client_ca=tmp_path / "clients.pem")
    (tmp_path / "clients.pem").write_bytes(old.file.read_bytes())
    context = server_ssl_context(config)
    async with listening(context) as port, following(context, config):
        assert (await visit(port, trusting(ca, before)))[0] == "CN:before"
        (tmp_path / "clients.pem").write_bytes(new.file.read_bytes())
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    if (await visit(port, trusting(ca, after)))[0] == "CN:after":
                        break
                await asyncio.sleep(0.01)
        with pytest.raises(OSError):  # noqa: PT011
            await visit(port, trusting(ca, before))


def test_the_loop_that_the_gateway_runs_on_does_the_same(ca: Authority, tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test_a_client_certificate_is_known_by_its_names(ca))
        runner.run(test_a_new_certificate_is_shown_to_new_connections(ca))
        runner.run(test_a_client_ca_that_was_replaced_is_no_longer_trusted(ca, tmp_path))


def test_a_missing_file_is_named(ca: Authority, tmp_path: Path) -> None:
    server = ca.server()
    server.key.unlink()
    with pytest.raises(TlsError, match=r"server\.key cannot be read: No such file"):
        server_ssl_context(settings(server))


def test_a_key_of_another_certificate_is_said_to_be_so(ca: Authority) -> None:
    config = TlsConfig(certificate=ca.server().certificate, key=ca.server("another").key)
    with pytest.raises(TlsError, match="are no certificate and its key"):
        server_ssl_context(config)
    with pytest.raises(TlsError, match="are no certificate and its key"):
        grpc_server_credentials(config)


def test_a_file_without_cas_is_named(ca: Authority, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(TlsError, match=r"empty\.pem holds no CA certificates"):
        server_ssl_context(settings(ca.server(), client_ca=tmp_path / "empty.pem"))


# gRPC


@contextlib.asynccontextmanager
async def grpc_listening(config: TlsConfig) -> AsyncIterator[int]:
    """A gRPC server that answers /t/names with the names in the client's certificate."""

    async def tell(request: bytes, context: Any) -> bytes:
        return ",".join(names_in(grpc_certificate(context.auth_context()) or {})).encode()

    handler = grpc.unary_unary_rpc_method_handler(tell)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"names": handler}),))
    port = server.add_secure_port("127.0.0.1:0", grpc_server_credentials(config))
    await server.start()
    yield port
    await server.stop(0)


async def call(port: int, ca: Authority, client: Signed | None = None) -> str:
    """Raises grpc.RpcError."""
    key, chain = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.file.read_bytes(), key, chain)
    # Channels with the same target and options may share a connection, which would not show a rotation.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
        answer: bytes = await channel.unary_unary("/t/names")(b"", timeout=10)
        return answer.decode()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, []),
        ({"min_version": "1.3"}, ["gateway.tls.min_version 1.3 holds for HTTP only"]),
        ({"client_certificates": "optional"}, ["gRPC asks no client for a certificate"]),
    ],
)
def test_what_grpc_cannot_do_is_said_at_the_start(
    ca: Authority, fields: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    grpc_server_credentials(settings(ca.server(), client_ca=ca.file, **fields))
    assert [record.getMessage()[: len(one)] for record, one in zip(caplog.records, told, strict=True)] == told


async def test_grpc_knows_a_client_by_the_same_names(ca: Authority) -> None:
    client = ca.client("acme", uri="spiffe://corp/acme")
    async with grpc_listening(settings(ca.server(), client_ca=ca.file)) as port:
        assert await call(port, ca, client) == "URI:spiffe://corp/acme,CN:acme"


async def test_grpc_refuses_who_has_no_required_certificate(ca: Authority) -> None:
    async with grpc_listening(settings(ca.server(), client_ca=ca.file)) as port:
        with pytest.raises(grpc.RpcError):
            await call(port, ca)


async def test_grpc_shows_a_new_certificate_and_never_half_of_one(
    ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Authority(tmp_path, "other")
    server, successor = ca.server(), other.server("successor")
    async with grpc_listening(settings(server)) as port:
        server.certificate.write_bytes(successor.certificate.read_bytes())
        with caplog.at_level(logging.ERROR):
            assert await call(port, ca) == ""
        assert "gRPC goes on with the TLS files it has" in caplog.text
        server.key.write_bytes(successor.key.read_bytes())
        assert await call(port, other) == ""
        with pytest.raises(grpc.RpcError):
            await call(port, ca)
