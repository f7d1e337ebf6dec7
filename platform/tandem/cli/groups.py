"""`tandem drain` and `tandem scale`: change the set of groups."""

from __future__ import annotations

from typing import Annotated

import typer

from tandem.cli.console import make_console
from tandem.cli.running import FleetName, find, run, with_control
from tandem.core.types import FleetSnapshot, GroupSpec, GroupState, Role
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.plan import group_name

LEAVING = (GroupState.DRAINING, GroupState.GONE)


def drain(
    group: Annotated[str, typer.Argument(metavar="GROUP", help="As `tandem status` names it.")],
    deadline: Annotated[float | None, typer.Option(help="Seconds after which it stops anyway.")] = None,
    wait: Annotated[bool, typer.Option(help="Return only when it is gone.")] = True,
    fleet: FleetName = "laptop",
) -> None:
    """Take a group out: no new requests, what runs ends, then it stops."""
    console = make_console()
    with console.status(f"draining {group} …"):
        run(with_control(fleet, lambda client: _drain(client, group, deadline, wait)))
    console.print(f"{group} is gone" if wait else f"{group} is draining")


def scale(
    role: Annotated[Role, typer.Argument(help="Which pool.")],
    groups: Annotated[int, typer.Argument(metavar="N", min=0, help="How many groups it shall have.")],
    fleet: FleetName = "laptop",
) -> None:
    """Change the number of groups of a pool. Surplus groups are drained, the newest first."""
    find(fleet)
    added, removed = run(with_control(fleet, lambda client: _scale(client, role, groups)))
    console = make_console()
    console.print(f"{role}: {groups} groups" + _list(", starting", added) + _list(", draining", removed))


def _list(word: str, names: list[str]) -> str:
    return f"{word} {', '.join(names)}" if names else ""


async def _drain(client: ControlClient, group: str, deadline: float | None, wait: bool) -> None:
    await client.drain(group, deadline)
    if not wait:
        return
    async for snapshot in client.watch():
        if all(one.group != group or one.state is GroupState.GONE for one in snapshot.groups):
            return


async def _scale(client: ControlClient, role: Role, wanted: int) -> tuple[list[str], list[str]]:
    snapshot = await client.fleet()
    have = sorted((spec for spec in snapshot.desired if spec.role is role and not spec.draining), key=_number)
    added = [_like(snapshot, role, name) for name in _free_names(snapshot, role, wanted - len(have))]
    for spec in added:
        await client.put_group(spec)
    removed = have[wanted:]
    for spec in removed:
        await client.drain(spec.group, None)
    return [spec.group for spec in added], [spec.group for spec in removed]


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


def _like(snapshot: FleetSnapshot, role: Role, name: str) -> GroupSpec:
    """A further group of the same size as its pool's others."""
    for spec in snapshot.desired:
        if spec.role is role:
            return GroupSpec(group=name, role=role, nodes=spec.nodes, gpus_per_node=spec.gpus_per_node)
    raise ControlError(f"the {role} pool has no group whose size a new one could take", "FAILED_PRECONDITION")
