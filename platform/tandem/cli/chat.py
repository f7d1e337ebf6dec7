"""`tandem chat`: talk to the fleet in a terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from tandem.bench.client import Client, Piece, RequestFailed, Timing, refusal, timed
from tandem.cli.console import make_console
from tandem.cli.https import Access, Ca, Certificate, CertificateKey, GatewayClient, Key, access_to
from tandem.cli.running import FleetName, NotRunning, find, run, snapshot_from_store
from tandem.config import FleetConfig
from tandem.engine.http1 import HttpFailure

WITHIN_S = 120.0


def chat(
    message: Annotated[str | None, typer.Argument(help="One question; none = a conversation, until Ctrl-D.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.6,
    fleet: FleetName = "laptop",
    url: Annotated[
        str | None, typer.Option(help="A gateway that is not of this machine's fleet, such as https://r1.example.com.")
    ] = None,
    key: Key = None,
    ca: Ca = None,
    certificate: Certificate = None,
    certificate_key: CertificateKey = None,
) -> None:
    """Stream an answer. What the model thinks is dim."""
    access = Access(key=key or "", ca=ca, certificate=certificate, certificate_key=certificate_key)
    run(_chat(fleet, url, access, message, {"max_tokens": max_tokens, "temperature": temperature}))


async def _chat(fleet: str, url: str | None, access: Access, message: str | None, options: dict[str, Any]) -> None:
    base, model, config = await endpoint(fleet) if url is None else (url.rstrip("/").removesuffix("/v1"), "", None)
    access = access_to(config, await _with_key(access, config))
    console = make_console()
    conversation: list[dict[str, str]] = []
    client = GatewayClient(access)
    try:
        model = model or await _model(client, base)
        while (line := message or await _read_line(console)) is not None:
            conversation.append({"role": "user", "content": line})
            answer, _ = await say(client, base, {"model": model, "messages": conversation, **options}, console)
            conversation.append({"role": "assistant", "content": answer})
            if message is not None:
                return
    except RequestFailed as error:
        raise _advised(error, access) from None


async def endpoint(fleet: str) -> tuple[str, str, FleetConfig]:
    """URL of a gateway of `fleet`, the model's name, and the fleet's configuration. Raises `NotRunning`."""
    snapshot, _ = await snapshot_from_store(fleet)
    if not snapshot.gateways:
        raise NotRunning(f"fleet {fleet} has no gateway yet: `tandem status` says how far it is")
    return snapshot.gateways[0].url, snapshot.model_name, find(fleet)[0].config()


async def say(client: Client, base: str, body: dict[str, Any], console: Console) -> tuple[str, Timing]:
    """Stream one answer to the console; return its text without the reasoning, and how long it took."""
    texts: list[str] = []

    def show(piece: Piece) -> None:
        console.print(piece.reasoning, style="dim", end="", markup=False, highlight=False)
        console.print(piece.text, end="", markup=False, highlight=False)
        texts.append(piece.text)

    timing = await timed(client, base, "/v1/chat/completions", body, within=WITHIN_S, show=show)
    console.print()
    return "".join(texts), timing


async def _with_key(access: Access, config: FleetConfig | None) -> Access:
    """Ask for the key if the user wants that, or if one is needed and there is somebody to ask."""
    needed = config is not None and config.gateway.auth_required and not access.key and access.certificate is None
    if access.key != "-" and not (needed and sys.stdin.isatty()):
        return access
    key: str = await asyncio.to_thread(typer.prompt, "API key (it is not shown)", hide_input=True, err=True)
    return msgspec.structs.replace(access, key=key.strip())


async def _model(client: GatewayClient, base: str) -> str:
    """The model that a gateway serves. Raises RequestFailed."""
    try:
        status, body = await client.fetch("GET", f"{base}/v1/models")
    except HttpFailure as error:
        raise RequestFailed(str(error)) from error
    if status != 200:
        raise refusal(status, body)
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.DecodeError, KeyError, TypeError, IndexError):
        raise RequestFailed(f"{base}/v1/models names no model that you may use") from None


def _advised(error: RequestFailed, access: Access) -> RequestFailed:
    """A refusal, and what to do about it here."""
    if error.status != 401:
        return error
    advice = "is that key still good?" if access.key else "set TANDEM_API_KEY, or give --key - to be asked for a key"
    return RequestFailed(f"{error}\n{advice}", status=401)


async def _read_line(console: Console) -> str | None:
    console.print("[bold]>[/] ", end="")
    line = await asyncio.to_thread(sys.stdin.readline)
    return line.strip() or None if line else None
