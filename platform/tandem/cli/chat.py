"""`tandem chat`: talk to the fleet in a terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from tandem.bench.client import Piece, Timing, timed
from tandem.cli.console import make_console
from tandem.cli.running import FleetName, NotRunning, run, snapshot_from_store
from tandem.engine.http1 import Pool

WITHIN_S = 120.0


def chat(
    message: Annotated[str | None, typer.Argument(help="One question; none = a conversation, until Ctrl-D.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.6,
    fleet: FleetName = "laptop",
) -> None:
    """Stream an answer. What the model thinks is dim."""
    run(_chat(fleet, message, {"max_tokens": max_tokens, "temperature": temperature}))


async def _chat(fleet: str, message: str | None, options: dict[str, Any]) -> None:
    base, model = await endpoint(fleet)
    console = make_console()
    conversation: list[dict[str, str]] = []
    pool = Pool()
    try:
        while (line := message or await _read_line(console)) is not None:
            conversation.append({"role": "user", "content": line})
            answer, _ = await say(pool, base, {"model": model, "messages": conversation, **options}, console)
            conversation.append({"role": "assistant", "content": answer})
            if message is not None:
                return
    finally:
        await pool.close()


async def endpoint(fleet: str) -> tuple[str, str]:
    """URL of a gateway of `fleet`, and the model's name. Raises `NotRunning`."""
    snapshot, _ = await snapshot_from_store(fleet)
    if not snapshot.gateways:
        raise NotRunning(f"fleet {fleet} has no gateway yet: `tandem status` says how far it is")
    return snapshot.gateways[0].url, snapshot.model_name


async def say(pool: Pool, base: str, body: dict[str, Any], console: Console) -> tuple[str, Timing]:
    """Stream one answer to the console; return its text without the reasoning, and how long it took."""
    texts: list[str] = []

    def show(piece: Piece) -> None:
        console.print(piece.reasoning, style="dim", end="", markup=False, highlight=False)
        console.print(piece.text, end="", markup=False, highlight=False)
        texts.append(piece.text)

    timing = await timed(pool, base, "/v1/chat/completions", body, within=WITHIN_S, show=show)
    console.print()
    return "".join(texts), timing


async def _read_line(console: Console) -> str | None:
    console.print("[bold]>[/] ", end="")
    line = await asyncio.to_thread(sys.stdin.readline)
    return line.strip() or None if line else None
