"""`tandem model`: make the tiny model, describe a model's shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tandem.core.shape import ModelShape

# Imports of the models are inside the commands: they bring NumPy, and every `tandem` command loads this file.

app = typer.Typer(name="model", help="Make the tiny model, or describe a model.", no_args_is_help=True)


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it; made if missing.")],
    seed: Annotated[int, typer.Option(help="Other seeds give other weights.")] = 0,
    layers: Annotated[int, typer.Option(help="Layers (num_hidden_layers).")] = 4,
    dense_layers: Annotated[int, typer.Option(help="First layers without experts (first_k_dense_replace).")] = 1,
    hidden_size: Annotated[int, typer.Option(help="Width, a multiple of 64.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    experts: Annotated[int, typer.Option(help="Routed experts per layer (n_routed_experts).")] = 16,
    expert_groups: Annotated[int, typer.Option(help="Groups the experts are in (n_group).")] = 4,
    topk_groups: Annotated[int, typer.Option(help="Groups a token may use (topk_group).")] = 2,
    experts_per_token: Annotated[int, typer.Option(help="Experts a token uses (num_experts_per_tok).")] = 4,
    context: Annotated[int, typer.Option(help="Longest sequence in tokens, a multiple of 1,024.")] = 4096,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    mla: Annotated[str, typer.Option(help="Sizes of MLA: tiny, or r1, R1's own; for GPUs.")] = "tiny",
) -> None:
    """Make the tiny R1-architecture model: the same bytes on every machine. A complete one is left alone."""
    from tandem.models.tiny import TinyError, ensure_tiny

    try:
        made = ensure_tiny(
            folder,
            seed=seed,
            layers=layers,
            dense_layers=dense_layers,
            hidden_size=hidden_size,
            heads=heads,
            experts=experts,
            expert_groups=expert_groups,
            topk_groups=topk_groups,
            experts_per_token=experts_per_token,
            context=context,
            dtype=dtype,
            mla=mla,
        )
    except TinyError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{folder} cannot be written: {error}")
    typer.echo(f"{folder}: {'made' if made else 'already there'}")


@app.command()
def describe(
    model: Annotated[str, typer.Argument(metavar="[DIR|r1|tiny]", help="A checkpoint folder, or a name.")] = "r1",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a model's parameters, KV bytes per token and what MLA saves."""
    from tandem.core.shape import ShapeError
    from tandem.models.catalog import load_shape

    try:
        shape = load_shape(model)
    except ShapeError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(_facts(shape), indent=2))
    else:
        Console().print(_table(shape))


def _facts(shape: ModelShape) -> dict[str, object]:
    element = _element_size(shape)
    return {
        "name": shape.name,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "parameters_by_part": msgspec.to_builtins(shape.parameters_by_part),
        "kv_elements_per_token": shape.kv_elements_per_token,
        "kv_bytes_per_token": shape.kv_bytes_per_token(element),
        "mha_kv_bytes_per_token": shape.mha_kv_bytes_per_token(element),
        "mla_saving": round(shape.mla_saving, 2),
        "shape": msgspec.to_builtins(shape),
    }


def _table(shape: ModelShape) -> Table:
    element = _element_size(shape)
    parts = shape.parameters_by_part
    share = parts.routed_experts / parts.total
    table = Table(title=shape.name, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    rows = [
        ("layers", f"{shape.layers}", f"{shape.dense_layers} dense, {shape.moe_layers} with experts"),
        ("hidden size", f"{shape.hidden_size:,}", f"{shape.heads} heads"),
        (
            "experts per layer",
            f"{shape.routed_experts}",
            f"{shape.experts_per_token} per token, from {shape.topk_groups} of {shape.expert_groups} groups; "
            f"{shape.shared_experts} shared",
        ),
        ("vocabulary", f"{shape.vocab_size:,}", f"context {shape.context:,} tokens"),
        ("parameters", _count(parts.total), f"{parts.total:,}; {share:.0%} in routed experts; without MTP"),
        ("active per token", _count(shape.active_parameters), f"{shape.active_parameters:,}"),
        (
            "KV per token",
            f"{shape.kv_bytes_per_token(element):,} bytes",
            f"MLA in {shape.dtype}: {shape.layers} x ({shape.kv_lora_rank} + {shape.qk_rope_head_dim}) x {element}",
        ),
        ("as plain multi-head", f"{shape.mha_kv_bytes_per_token(element):,} bytes", "a key and a value for each head"),
        ("MLA saves", f"{shape.mla_saving:.0f} times", ""),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _element_size(shape: ModelShape) -> int:
    """Of the KV cache, which is in the activations' type; FP8 checkpoints run in bfloat16."""
    return 4 if shape.dtype == "float32" else 2


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
