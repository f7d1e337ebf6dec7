"""The contenders, each in front of the same stand-in workers: two for prefill and two for decode, on the loopback."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import msgspec
import tokenizers

from bench.gateway.processes import BenchError, Process, descendants, free_port, wait_for
from bench.gateway.standin import Token, Totals
from tandem.models.tokenizer import VOCAB_SIZE, tokenizer_config, tokenizer_json

START_S = 60.0
SERVE_STOPS_S = 20.0
"""For a Ray cluster to end with all that it started."""
CONTEXT = 131_072
"""Of the tiny model here: room for long prompts, in tokens."""
RUST_VENV = Path(".venv-bench")
SAID = 64
"""Tokens that the stand-ins say before they begin again."""


class Standins(msgspec.Struct, frozen=True):
    """The running workers."""

    urls: dict[str, list[str]]
    tokens: list[Token]
    process: Process

    def totals(self) -> Totals:
        host = self.urls["decode"][0].removeprefix("http://")
        connection = HTTPConnection(host, timeout=10)
        try:
            connection.request("GET", "/standin/totals")
            return msgspec.json.decode(connection.getresponse().read(), type=Totals)
        finally:
            connection.close()


class Contender(msgspec.Struct, frozen=True):
    """A running gateway, or none: then `url` is a worker's own."""

    name: str
    url: str
    model: str
    processes: tuple[Process, ...] = ()
    paired: bool = True
    """It sends each request to a prefill and a decode worker."""

    @property
    def pids(self) -> list[int]:
        return [pid for process in self.processes for pid in descendants(process.pid)]


class Place(msgspec.Struct, frozen=True):
    """What a contender is started with."""

    standins: Standins
    folder: Path
    model: Path
    """Checkpoint folder for those that tokenize."""


def tiny_folder(folder: Path) -> Path:
    """The small files of the tiny model, with room for long prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, object] = {
        "config.json": {"max_position_embeddings": CONTEXT, "vocab_size": VOCAB_SIZE},
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config(CONTEXT),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def spoken(model: Path) -> list[Token]:
    """Tokens of plain words, so that what each contender says can be compared letter by letter."""
    vocabulary = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab(with_added_tokens=False)
    words = sorted(
        (number, text)
        for text, number in vocabulary.items()
        if text.startswith("Ġ") and text[1:].isascii() and text[1:].isalpha()
    )
    if not words:
        raise BenchError(f"{model}/tokenizer.json has no words; choose another --model")
    return [Token(number, " " + text[1:]) for number, text in (words[n % len(words)] for n in range(SAID))]


@contextlib.contextmanager
def standins(
    folder: Path, tokens: list[Token], *, ttft_ms: float, itl_ms: float, workers: int = 2
) -> Iterator[Standins]:
    """Start so many workers of each role."""
    options = ["--ttft-ms", str(ttft_ms), "--itl-ms", str(itl_ms), "--tokens", msgspec.json.encode(tokens).decode()]
    options += ["--workers", str(workers)]
    command = [sys.executable, "-m", "bench.gateway.standin", *options]
    process = Process("the stand-in workers", command, log=folder / "standin.log", lines=True)
    try:
        yield Standins(json.loads(process.line(START_S)), tokens, process)
    finally:
        process.stop()


def direct(place: Place) -> Contender:
    """No gateway: a worker asked directly. What the machine and the generator cost themselves."""
    return Contender("direct", place.standins.urls["decode"][0], "standin", paired=False)


def tandem(place: Place) -> Contender:
    """One of Tandem's gateway replicas: one event loop, so at most one core."""
    return _tandem("tandem", place, replicas=1)


def two_tandems(place: Place) -> Contender:
    """Two replicas that share a port, as a node with two cores for the gateway has them."""
    return _tandem("tandem-x2", place, replicas=2)


def _tandem(name: str, place: Place, replicas: int) -> Contender:
    with contextlib.ExitStack() as stack:
        started: list[Process] = []
        url = ""
        for number in range(replicas):
            folder = place.folder / f"{name}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            options = ["--model", str(place.model), "--folder", str(folder), "--urls", json.dumps(place.standins.urls)]
            options += ["--port", url.rpartition(":")[2] or "0"]
            command = [sys.executable, "-m", "bench.gateway.tandem_gateway", *options]
            process = Process("Tandem's gateway", command, log=folder / "log", lines=True)
            stack.enter_context(_stopped_on_failure(process))
            url = json.loads(process.line(START_S))
            started.append(process)
        return Contender(name, url, "standin", tuple(started))


def relay(place: Place) -> Contender:
    """A relay without any work of its own: the floor for Python."""
    command = [sys.executable, "-m", "bench.gateway.relay", place.standins.urls["decode"][0]]
    process = Process("the relay", command, log=place.folder / "relay.log", lines=True)
    with _stopped_on_failure(process):
        return Contender("relay", json.loads(process.line(START_S)), "standin", (process,), paired=False)


def serve_proxy(place: Place) -> Contender:
    """The relay as an application behind Ray Serve's own HTTP proxy."""
    return _serve("serve", place, [free_port()])


def serve_haproxy(place: Place) -> Contender:
    """The same with HAProxy in front, which Serve starts and configures."""
    return _serve("serve-haproxy", place, [free_port(), free_port(), free_port()])


def _serve(name: str, place: Place, ports: list[int]) -> Contender:
    command = [sys.executable, "-m", "bench.gateway.serve_relay", "--worker", place.standins.urls["decode"][0]]
    command += ["--ports", *map(str, ports)]
    log = place.folder / f"{name}.log"
    process = Process(f"Ray Serve ({name})", command, log=log, lines=True, grace_s=SERVE_STOPS_S)
    with _stopped_on_failure(process):
        return Contender(name, json.loads(process.line(START_S)), "standin", (process,), paired=False)


def sglang_router(place: Place) -> Contender:
    """sglang-router, the Rust router that SGLang's repository had."""
    return _rust(place, "sglang-router", "sglang_router.launch_router")


def smg(place: Place) -> Contender:
    """smg, what became of it."""
    return _rust(place, "smg", "smg.launch_router")


CONTENDERS: dict[str, Callable[[Place], Contender]] = {
    "direct": direct,
    "relay": relay,
    "serve": serve_proxy,
    "serve-haproxy": serve_haproxy,
    "tandem": tandem,
    "tandem-x2": two_tandems,
    "sglang-router": sglang_router,
    "smg": smg,
}


FASTEST = {"serve": 60.0}
"""Requests/s above which one only falls behind on two cores; then its queue would be measured."""


def _rust(place: Place, name: str, module: str) -> Contender:
    python = RUST_VENV / "bin" / "python"
    if not python.exists():
        raise BenchError(f"{python} is missing: `make bench-gateway` makes it, or leave {name} out with --contenders")
    port, metrics = free_port(), free_port()
    workers: list[str] = []
    for url in place.standins.urls["prefill"]:
        workers += ["--prefill", url, "8998"]
    for url in place.standins.urls["decode"]:
        workers += ["--decode", url]
    policies = ["--prefill-policy", "cache_aware", "--decode-policy", "power_of_two"]
    command = [str(python), "-m", module, "--host", "127.0.0.1", "--port", str(port), "--pd-disaggregation"]
    command += [*workers, *policies, "--prometheus-port", str(metrics), "--prometheus-host", "127.0.0.1"]
    command += ["--log-level", "warn"]
    process = Process(name, command, log=place.folder / f"{name}.log")
    with _stopped_on_failure(process):
        wait_for(f"http://127.0.0.1:{port}/readiness", process, START_S)
        return Contender(name, f"http://127.0.0.1:{port}", "standin", (process,))


@contextlib.contextmanager
def _stopped_on_failure(process: Process) -> Iterator[None]:
    try:
        yield
    except BaseException:
        process.stop()
        raise


@contextlib.contextmanager
def running(place: Place, names: list[str]) -> Iterator[list[Contender]]:
    """Start these contenders; all are stopped at the end, however it comes."""
    started: list[Contender] = []
    try:
        for name in names:
            started.append(CONTENDERS[name](place))
        yield started
    finally:
        for contender in started:
            for process in contender.processes:
                process.stop()
