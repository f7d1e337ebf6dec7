"""Where a fleet of this machine keeps its files, and the record of the host process that runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from tandem.config import FleetConfig
from tandem.gateway.stop_socket import NODE_FOLDER_VARIABLE

RUN_VARIABLE = "TANDEM_RUN"
"""Set in the environment of every process of a run, so that exactly these can be found again."""


POD_VARIABLE, KUBE_NODE_VARIABLE = "TANDEM_POD_NAME", "TANDEM_NODE_NAME"
"""Kubernetes tells a pod its own name, and that of its node, by these."""


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The host process of a running fleet, as `host.json`."""

    pid: int
    created: float
    """Start time of the process (Unix seconds): tells it from a later one with the same PID."""
    run: str
    """Value of `TANDEM_RUN` in all its processes."""
    scratch: str
    """Folder of sockets and of Ray's session: short, because a Unix socket's path may have 107 bytes."""
    store: str
    """URL of the store."""
    ray: str = ""
    """Address of the Ray cluster, once it is up."""
    namespace: str = ""
    """Ray namespace of the fleet's actors."""

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class AlreadyRunningError(RuntimeError):
    """Another host process runs a fleet of this name."""


def node_folder() -> Path:
    """This node's own folder, of a short path."""
    return Path(os.environ.get(NODE_FOLDER_VARIABLE) or Path(tempfile.gettempdir()) / "tandem-node")


def state_home() -> Path:
    """`$TANDEM_HOME`, else the user's state folder by the XDG convention."""
    if home := os.environ.get("TANDEM_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tandem"


class RunFolder:
    """The folder of one fleet: `host.json`, `config.json`, `logs/`, the embedded store, the tiny model."""

    def __init__(self, fleet: str) -> None:
        self.fleet = fleet
        self.path = state_home() / fleet
        self.logs = self.path / "logs"
        self.store = self.path / "store"
        self._record = self.path / "host.json"
        self._config = self.path / "config.json"

    def record(self) -> HostRecord | None:
        """The last host's record, or None if there is none."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=HostRecord)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def write(self, record: HostRecord) -> None:
        """Replace the record."""
        self._replace(self._record, msgspec.json.format(msgspec.json.encode(record)))

    def config(self) -> FleetConfig:
        """The configuration of the last run. Raises OSError if there was none."""
        return FleetConfig.model_validate_json(self._config.read_bytes())

    def write_config(self, config: FleetConfig) -> None:
        """Keep the configuration of this run."""
        self._replace(self._config, config.model_dump_json(indent=2).encode())

    def make(self) -> None:
        """Make the folder, for this user's eyes: it holds the store's URL, with its password, and the logs."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        draft.replace(path)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Be the only host of this fleet. Raises `AlreadyRunningError`."""
        self.make()
        with open(self.path / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                record = self.record()
                who = f" (PID {record.pid})" if record else ""
                raise AlreadyRunningError(
                    f"a fleet named {self.fleet} already runs here{who}: "
                    "`tandem status` shows it, `tandem down` stops it"
                ) from error
            yield

    def clear(self) -> None:
        """Forget the last run: its processes, its sockets, its record. Logs, usage records and the store stay: API keys
        are in it. What the store says of groups is the next host's to clear.

        Only for who holds the folder (`hold`): otherwise the last run may be one that runs.
        """
        if record := self.record():
            sweep(record.run)
            shutil.rmtree(record.scratch, ignore_errors=True)
        self._record.unlink(missing_ok=True)


def make_scratch() -> Path:
    """A new folder with a short path, readable by this user only."""
    return Path(tempfile.mkdtemp(prefix="tandem-"))


def processes_of(run: str) -> list[psutil.Process]:
    """Every process that belongs to `run`, except this one: those with its mark, and all below them.

    SGLang's workers write their titles over their environment, so the mark alone does not find them; the guard above
    each of them keeps it.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RUN_VARIABLE) == run:
                found |= {below.pid: below for below in [process, *process.children(recursive=True)]}
    found.pop(os.getpid(), None)
    return list(found.values())


def sweep(run: str, deadline: float = 10.0) -> int:
    """SIGKILL what is left of `run`; return how many processes that were.

    A process that starts others while it is swept is met again, until none is left or `deadline` seconds have passed.
    """
    ends = time.monotonic() + deadline
    killed: set[int] = set()
    while (left := processes_of(run)) and time.monotonic() < ends:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
                killed.add(process.pid)
        psutil.wait_procs(left, timeout=max(0.0, ends - time.monotonic()))
    return len(killed)
