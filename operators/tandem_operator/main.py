"""`tandem-operator run`: the operator as a process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer

from tandem_operator.kube import KubeError

app = typer.Typer(
    help="The Kubernetes operator of Tandem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """As JSON."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


@app.callback()
def _root() -> None:
    """The Kubernetes operator of Tandem."""


@app.command()
def run(
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            help="Namespace to look after; repeat it for several. None: TANDEM_OPERATOR_NAMESPACES, with commas,"
            ' or all ("*").'
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of /healthz, /readyz and /metrics; 0 = any free one.")] = 8080,
    lease: Annotated[
        str, typer.Option(help="Name of the Lease by which one of several replicas leads.")
    ] = "tandem-operator",
    lease_namespace: Annotated[str | None, typer.Option(help="Its namespace; none = the pod's own.")] = None,
    lease_s: Annotated[
        float, typer.Option("--lease-seconds", min=3, help="Another replica leads after the leader was silent so long.")
    ] = 15.0,
    resync_s: Annotated[
        float,
        typer.Option("--resync-seconds", min=1, help="All is listed anew so often: a watch may have missed some."),
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the operator until it is told to stop. Exits with 1 when it cannot go on, or does not lead any more."""
    from tandem_operator.operator import LeadershipLost
    from tandem_operator.operator import run as run_operator

    _log_to_stdout(log_level)
    identity = f"{os.environ.get('TANDEM_POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    try:
        asyncio.run(
            run_operator(
                namespaces=tuple(namespace)
                if namespace
                else _namespaces(os.environ.get("TANDEM_OPERATOR_NAMESPACES", "")),
                port=port,
                lease=lease,
                lease_namespace=lease_namespace or _own_namespace(),
                identity=identity,
                lease_s=lease_s,
                resync_s=resync_s,
            )
        )
    except (LeadershipLost, KubeError, OSError) as error:
        logging.getLogger("tandem_operator").error("%s", error)
        raise typer.Exit(1) from error
    except Exception as error:
        logging.getLogger("tandem_operator").exception("The operator cannot go on; its pod is started anew.")
        raise typer.Exit(1) from error


def _namespaces(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if "*" in names else names


def _own_namespace() -> str:
    if given := os.environ.get("TANDEM_POD_NAMESPACE"):
        return given
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


def _log_to_stdout(level: str) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # kopf tells of each event that it passes on.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("kopf.objects").setLevel(logging.ERROR)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
