"""`tandem drain` and `tandem scale`: change the set of groups."""

from __future__ import annotations

from typing import Annotated

import typer

from tandem.cli.console import make_console
from tandem.cli.running import FleetName, find, run, with_control
from tandem.config import PoolConfig
from tandem.core.types import FleetSnapshot, GroupSpec, GroupState, Role
from tandem.fleet.control_client import ControlClient
from tandem.fleet.plan import group_name, pool_of


def drain(
    group: Annotated[str, typer.Argument(metavar="GROUP", help="As `tandem status` names it.")],
    deadline: Annotated[float | None, typer.Option(help="Seconds after which it stops anyway.")] = None,
    migrate: Annotated[
        bool, typer.Option("--migrate", help="Move its streams to other groups at once, not only near the deadline.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also the last ready group of its role.")] = False,
    wait: Annotated[bool, typer.Option(help="Return only when it is gone.")] = True,
    fleet: FleetName = "laptop",
) -> None:
    """Take a group out: no new requests, what runs ends or moves to other groups, then it stops."""
    console = make_console()
    with console.status(f"draining {group} …"):
        run(with_control(fleet, lambda client: _drain(client, group, deadline, migrate, force, wait)))
    console.print(f"{group} is gone" if wait else f"{group} is draining")


def scale(
    role: Annotated[Role, typer.Argument(help="Which pool.")],
    groups: Annotated[int, typer.Argument(metavar="N", min=0, help="How many groups it shall have.")],
    fleet: FleetName = "laptop",
) -> None:
    """Change the number of groups of a pool. Surplus groups are drained, those with the highest numbers first; their
    streams move to the others."""
    added, removed = run(_scale_fleet(fleet, role, groups))
    console = make_console()
    console.print(f"{role}: {groups} groups" + _list(", starting", added) + _list(", draining", removed))


def _list(word: str, names: list[str]) -> str:
    return f"{word} {', '.join(names)}" if names else ""


async def _drain(
    client: ControlClient, group: str, deadline: float | None, migrate: bool, force: bool, wait: bool
) -> None:
    await client.drain(group, deadline, migrate=migrate, force=force)
    if not wait:
        return
    async for snapshot in client.watch():
        if all(one.group != group or one.state is GroupState.GONE for one in snapshot.groups):
            return


async def _scale_fleet(fleet: str, role: Role, wanted: int) -> tuple[list[str], list[str]]:
    folder, _ = find(fleet)
    pool = pool_of(folder.config(), role)
    return await with_control(fleet, lambda client: _scale(client, role, pool, wanted))


async def _scale(client: ControlClient, role: Role, pool: PoolConfig, wanted: int) -> tuple[list[str], list[str]]:
    snapshot = await client.fleet()
    have = sorted((spec for spec in snapshot.desired if spec.role is role and not spec.draining), key=_number)
    added = _free_names(snapshot, role, wanted - len(have))
    for name in added:
        spec = GroupSpec(group=name, role=role, nodes=pool.nodes, gpus_per_node=pool.gpus_per_node)
        await client.put_group(spec)
    removed = [spec.group for spec in have[wanted:]]
    for name in removed:
        await client.drain(name, None, migrate=True, force=wanted == 0)
    return added, removed


def _number(spec: GroupSpec) -> tuple[int, str]:
    tail = spec.group.rpartition("-")[2]
    return (int(tail) if tail.isdecimal() else 0, spec.group)


def _free_names(snapshot: FleetSnapshot, role: Role, count: int) -> list[str]:
    taken = {spec.group for spec in snapshot.desired} | {
        group.group for group in snapshot.groups if group.state is not GroupState.GONE
    }
    names: list[str] = []
    number = 0
    while len(names) < count:
        name = group_name(role, number)
        if name not in taken:
            names.append(name)
        number += 1
    return names
