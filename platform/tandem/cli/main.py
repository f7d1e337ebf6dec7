"""The `tandem` command."""

from __future__ import annotations

import typer

from tandem.cli import bench, chat, demo, doctor, down, groups, keys, model, node, refresh, simulate, status, up, usage

app = typer.Typer(
    name="tandem",
    help="Serve DeepSeek-R1 from pairs of prefill and decode groups of SGLang workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(up.up)
app.command()(down.down)
app.command()(status.status)
app.command()(chat.chat)
app.command()(groups.drain)
app.command()(groups.scale)
app.command()(refresh.refresh)
app.command()(doctor.doctor)
app.command()(demo.demo)
app.command()(bench.bench)
app.command()(usage.usage)
app.add_typer(keys.app)
app.add_typer(model.app)
app.add_typer(node.app)
app.add_typer(simulate.app)
