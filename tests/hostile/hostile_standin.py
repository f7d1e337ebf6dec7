"""The benchmark's stand-in workers, but that none says more than it was told to: hostile requests ask for anything.

`python -m hostile_standin --longest 4` prints the URLs by role as a JSON line, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

import msgspec
import orjson
import uvloop

from bench.gateway import standin


class Short(standin.Answer):
    """An answer of a few tokens, however many were asked for."""

    longest = 4

    def __init__(self, worker: standin.Connection, path: str, body: dict[str, Any]) -> None:
        super().__init__(worker, path, body)
        self._count = min(self._count, self.longest)


class Worker(standin.Connection):
    """One connection to one worker, whose answers are short."""

    def on_message_complete(self) -> None:
        if self._url != b"/generate":
            super().on_message_complete()
            return
        self._answer = Short(self, "/generate", orjson.loads(b"".join(self._body)))
        self.fleet.begin(self._answer)


async def serve(options: argparse.Namespace) -> None:
    """Listen until standard input ends."""
    loop = asyncio.get_running_loop()
    Short.longest = options.longest
    tokens = [standin.Token(number, "") for number in options.tokens]
    fleet = standin.Fleet(tokens, options.ttft_ms, options.itl_ms)
    urls: dict[str, list[str]] = {}
    for role in ("prefill", "decode"):
        for _ in range(2):
            made = await loop.create_server(lambda role=role: Worker(fleet, role, 8998), "127.0.0.1", 0, backlog=4096)
            urls.setdefault(role, []).append(f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}")
    print(msgspec.json.encode(urls).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, required=True, help="tokens that an answer has at the most")
    parser.add_argument("--ttft-ms", type=float, default=0)
    parser.add_argument("--itl-ms", type=float, default=0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[70, 71, 72], help="ids that are said again and again")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
