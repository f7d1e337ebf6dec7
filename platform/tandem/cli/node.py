"""`tandem node`: what the pods of a fleet in Kubernetes run. Every setting has an environment variable."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.running import fail

app = typer.Typer(name="node", help="One machine of a fleet: its head, or a node that joins.", no_args_is_help=True)

Host = Annotated[str, typer.Option(envvar="TANDEM_HOST", help="Address of this machine (pod).")]
Run = Annotated[
    Path, typer.Option(envvar="TANDEM_RUN_FOLDER", help="Folder of what ends with this machine; of a short path.")
]
Probe = Annotated[int, typer.Option("--probe", envvar="TANDEM_PROBE_PORT", help="Port of /live and /ready.")]
ProbeHost = Annotated[str, typer.Option(envvar="TANDEM_PROBE_HOST", help="Address of that; empty = all.")]
RUN_FOLDER = Path("/run/tandem")


@app.command()
def head(
    config: Annotated[Path, typer.Option(envvar="TANDEM_CONFIG", help="fleet.json; read again when it changes.")],
    host: Host,
    data: Annotated[Path, typer.Option(envvar="TANDEM_DATA", help="What Ray remembers; may be a volume.")],
    name: Annotated[str, typer.Option(envvar="TANDEM_POD_NAME", help="What Ray calls it, where it joins one.")] = "",
    gcs_port: Annotated[int, typer.Option(envvar="TANDEM_GCS_PORT", help="Where nodes join.")] = 6380,
    state_url: Annotated[
        str, typer.Option(envvar="TANDEM_STATE_URL", help="In place of state.url, where a secret holds it.")
    ] = "",
    tenants: Annotated[
        Path | None, typer.Option(envvar="TANDEM_TENANTS", help="YAML file of further tenants, by name.")
    ] = None,
    run: Run = RUN_FOLDER,
    probe: Probe = 8090,
    probe_host: ProbeHost = "",
) -> None:
    """Run the head: Ray's GCS, the controller, and the gateways' deployment. Groups live on while it is away."""
    from tandem.fleet.node_head import Head, HeadSettings
    from tandem.fleet.node_process import run_node

    node = Head(
        HeadSettings(
            config=config,
            host=host,
            data=data,
            name=name,
            gcs_port=gcs_port,
            run=run,
            state_url=state_url,
            tenants=tenants,
            probe_host=probe_host,
            probe_port=probe,
        )
    )
    _end(run_node(node.run, node.own))


@app.command()
def join(
    host: Host,
    gcs: Annotated[str, typer.Option(envvar="TANDEM_GCS", help="name:port of the head.")],
    group: Annotated[str, typer.Option(envvar="TANDEM_GROUP", help="The group whose ranks this machine is for.")] = "",
    gateway: Annotated[bool, typer.Option("--gateway", help="It is for a gateway.")] = False,
    gpus: Annotated[int, typer.Option(envvar="TANDEM_GPUS", min=0, help="GPUs that it offers (cuda).")] = 0,
    ray_namespace: Annotated[
        str, typer.Option(envvar="TANDEM_RAY_NAMESPACE", help="Of the fleet, where --gcs is another's Ray cluster.")
    ] = "",
    name: Annotated[str, typer.Option(envvar="TANDEM_POD_NAME", help="What Ray calls it.")] = "",
    linger: Annotated[
        float,
        typer.Option(
            envvar="TANDEM_LINGER_S", min=0, max=30, help="A gateway's seconds from SIGTERM until it refuses."
        ),
    ] = 3.0,
    drain: Annotated[
        float, typer.Option(envvar="TANDEM_DRAIN_S", min=0, help="A gateway's seconds for its requests after that.")
    ] = 25.0,
    run: Run = RUN_FOLDER,
    probe: Probe = 8090,
    probe_host: ProbeHost = "",
) -> None:
    """Be a node of a fleet, of one group or for a gateway; wait for the head as long as that takes."""
    if gateway == bool(group):
        fail("give either --group (TANDEM_GROUP) or --gateway")
    if ray_namespace and group:
        fail("in another's Ray cluster (--ray-namespace) Ray places the groups: no node joins for one")
    from tandem.fleet.node_join import Joined, JoinSettings
    from tandem.fleet.node_process import run_node

    node = Joined(
        JoinSettings(
            host=host,
            gcs=gcs,
            group=group,
            gpus=gpus,
            name=name,
            ray_namespace=ray_namespace,
            run=run,
            probe_host=probe_host,
            probe_port=probe,
            linger=linger,
            drain=drain,
        )
    )
    _end(run_node(node.run, node.own))


@app.command()
def leave(
    control: Annotated[str, typer.Option(envvar="TANDEM_CONTROL", help="host:port of the control service.")],
    group: Annotated[str, typer.Option(envvar="TANDEM_GROUP", help="The group of this machine.")],
    within: Annotated[float, typer.Option(envvar="TANDEM_LEAVE_S", min=1, help="Seconds that it may take.")] = 120.0,
) -> None:
    """Drain this machine's group before it ends (a pod's preStop). Always succeeds: the machine ends anyway."""
    from tandem.fleet.node_leave import leave as leave_group

    asyncio.run(leave_group(control, group, within, lambda said: print(said, flush=True)))


def _end(code: int) -> None:
    """Exit at once: a thread may still wait for an answer of Ray's that will not come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
