"""`tandem up`: start a fleet on this machine, or on a Ray cluster, with live progress for every rank."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from tandem.cli.console import make_console
from tandem.cli.down import end_host
from tandem.cli.running import fail
from tandem.cli.tables import group_table
from tandem.config import FleetConfig
from tandem.config_file import ConfigError, load_config
from tandem.core.types import FleetSnapshot, Group
from tandem.fleet.progress import Failed, Groups, Message, Ready, Step, read_message
from tandem.fleet.run_folder import RunFolder


def up(
    file: Annotated[Path | None, typer.Option("-f", "--file", help="fleet.yaml; none = the laptop's default.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the fleet answers; it runs on.")] = False,
) -> None:
    """Start a fleet and show how each rank comes up. Ctrl-C stops it, unless detached."""
    config = read_config(file)
    console = make_console()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    host = start_host(config)
    try:
        ready = follow(host, console)
        console.print(f"\n[green]ready[/] after {ready.seconds:.1f} s   {ready.http}/v1   control {ready.control}")
        if detach:
            let_go(host)
            console.print("`tandem chat` talks to it, `tandem status` shows it, `tandem down` stops it")
            return
        console.print("Ctrl-C stops it; in another terminal: `tandem chat`, `tandem status --watch`")
        _wait(host)
    except KeyboardInterrupt:
        console.print("stopping …")
        stop_host(config.name, host)


def read_config(file: Path | None) -> FleetConfig:
    """The configuration in `file`, or the default. Ends the command when it is wrong."""
    try:
        return load_config(file) if file else FleetConfig()
    except ConfigError as error:
        fail(str(error))


def start_host(config: FleetConfig) -> subprocess.Popen[bytes]:
    """Start the host process. It ends with this process, however that ends, unless it is let go."""
    folder = RunFolder(config.name)
    folder.make()
    with open(folder.logs / "host.log", "ab") as log:
        host = subprocess.Popen(
            [sys.executable, "-m", "tandem.fleet.host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
    assert host.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        host.stdin.write(config.model_dump_json().encode() + b"\n")
        host.stdin.flush()
    return host


def let_go(host: subprocess.Popen[bytes]) -> None:
    """Let the host run on when this process ends."""
    assert host.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        host.stdin.write(b"detach\n")
        host.stdin.close()


def follow(host: subprocess.Popen[bytes], console: Console) -> Ready:
    """Show the host's progress until the fleet is ready. Ends the command when it fails."""
    view = _View()
    assert host.stdout is not None
    with Live(view, console=console, refresh_per_second=8, transient=not console.is_terminal):
        for line in host.stdout:
            message = read_message(line)
            view.take(message)
            if isinstance(message, Ready):
                return message
            if isinstance(message, Failed):
                break
    host.wait()
    fail(view.failure or f"the host process ended with code {host.returncode}; its log is in the fleet's logs folder")


def stop_host(fleet: str, host: subprocess.Popen[bytes]) -> None:
    """End the fleet and its host."""
    with contextlib.suppress(psutil.NoSuchProcess):
        end_host(RunFolder(fleet), psutil.Process(host.pid))
    host.wait()


def _wait(host: subprocess.Popen[bytes]) -> None:
    """Wait for the host to end by itself, which is a failure."""
    assert host.stdout is not None
    failure = ""
    for line in host.stdout:
        message = read_message(line)
        if isinstance(message, Failed):
            failure = message.why
    host.wait()
    fail(failure or f"the host process ended with code {host.returncode}")


def _interrupt(*_: object) -> None:
    """SIGTERM and SIGHUP end the command as Ctrl-C does."""
    raise KeyboardInterrupt


class _View:
    """The start so far, as rich draws it."""

    def __init__(self) -> None:
        self.failure = ""
        self._steps: dict[str, tuple[float, float | None]] = {}
        self._groups: tuple[Group, ...] = ()
        self._spinners: dict[str, Spinner] = {}

    def take(self, message: Message) -> None:
        if isinstance(message, Step):
            began = self._steps.get(message.name, (time.monotonic(), None))[0]
            self._steps[message.name] = (began, message.seconds)
        elif isinstance(message, Groups):
            self._groups = message.groups
        elif isinstance(message, Failed):
            self.failure = message.why

    def __rich__(self) -> RenderableType:
        lines: list[RenderableType] = [self._step(name) for name in self._steps]
        if self._groups:
            lines.append(group_table(FleetSnapshot(groups=self._groups), {}, time.time()))
        return Stack(*lines)

    def _step(self, name: str) -> RenderableType:
        began, seconds = self._steps[name]
        if seconds is not None:
            return Text.assemble(("✓ ", "green"), name, (f"  {seconds:.1f} s", "dim"))
        spinner = self._spinners.setdefault(name, Spinner("dots"))
        spinner.update(text=Text.assemble(name, (f"  {time.monotonic() - began:.0f} s", "dim")))
        return spinner
