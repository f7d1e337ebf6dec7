"""A fleet as tables, for people."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tandem.core.types import DpLoad, FleetSnapshot, GatewayReplica, Group, GroupState, PoolPlan, Rank, RankState

COLOURS: Mapping[str, str] = {
    GroupState.READY: "green",
    GroupState.STARTING: "yellow",
    GroupState.CORDONED: "blue",
    GroupState.DRAINING: "blue",
    GroupState.FAILED: "red",
    GroupState.GONE: "dim",
    RankState.PENDING: "dim",
    RankState.DEAD: "red",
}


def fleet_view(snapshot: FleetSnapshot, loads: Mapping[str, Sequence[DpLoad]], now: float) -> RenderableType:
    """Everything that `tandem status` shows. `now` in Unix seconds."""
    title = f"fleet {snapshot.name}: {snapshot.model_name}"
    parts: list[RenderableType] = [Text(title, style="bold"), _gateways(snapshot.gateways)]
    parts += [_plan(plan, now) for plan in snapshot.plans]
    return Stack(*parts, group_table(snapshot, loads, now))


def _gateways(gateways: Sequence[GatewayReplica]) -> RenderableType:
    """A line for each: where it answers HTTP and gRPC."""
    if not gateways:
        return Text("no gateway yet")
    table = Table(box=None, show_header=False, pad_edge=False)
    for gateway in sorted(gateways, key=lambda one: (one.url, one.replica)):
        grpc = f"gRPC {gateway.grpc}" if gateway.grpc else ""
        table.add_row(Text(gateway.replica), Text(gateway.url), Text(grpc))
    return table


def _plan(plan: PoolPlan, now: float) -> RenderableType:
    """How many groups autoscaling wants, since when and why, and what keeps it from acting."""
    since = f" for {_age(now - plan.since)}" if plan.since else ""
    text = Text(f"{plan.role.value}: {plan.wanted} groups wanted{since}", style="bold")
    text.append(f"  {plan.reason}" if plan.reason else "", style="not bold")
    text.append(f"  (waits: {plan.held})" if plan.held else "", style="not bold yellow")
    return text


def group_table(snapshot: FleetSnapshot, loads: Mapping[str, Sequence[DpLoad]], now: float) -> Table:
    """One line a group and one a rank."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("group", "epoch", "state", "for", "address", "running", "waiting", "KV used"):
        table.add_column(column, no_wrap=True)
    table.add_column("what", overflow="fold")
    for group in snapshot.groups:
        load = loads.get(group.group, ())
        table.add_row(
            Text(f"{group.group}", style="bold"),
            str(group.epoch),
            _state(group.state),
            _age(now - group.since) if group.since else "",
            group.url,
            _sum(load, "running"),
            _sum(load, "waiting"),
            f"{max(dp.token_usage for dp in load):.0%}" if load else "",
            group.reason,
        )
        for rank in group.ranks:
            table.add_row(f"  rank {rank.rank}", "", _state(rank.state), "", *_rank_cells(rank, load))
    return table


def _rank_cells(rank: Rank, load: Sequence[DpLoad]) -> tuple[str, str, str, str, str]:
    own = [dp for dp in load if dp.dp_rank == rank.rank] if len(load) > 1 else []
    where = f"{rank.host}  PID {rank.pid}" if rank.pid else rank.host
    return (
        where,
        _sum(own, "running"),
        _sum(own, "waiting"),
        f"{own[0].token_usage:.0%}" if own else "",
        rank.detail,
    )


def _sum(load: Sequence[DpLoad], field: str) -> str:
    return str(sum(getattr(dp, field) for dp in load)) if load else ""


def _state(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def progress_line(group: Group, now: float | None = None) -> str:
    """What a group is doing, in a few words."""
    ready = sum(rank.state is RankState.READY for rank in group.ranks)
    seconds = _age((now or time.time()) - group.since) if group.since else ""
    return f"{group.state} {ready}/{len(group.ranks)} ranks {seconds}".strip()
