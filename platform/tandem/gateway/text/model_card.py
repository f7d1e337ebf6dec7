"""What the gateway knows of the model that it serves, from the checkpoint's own small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tandem.core.shape import ModelShape, ShapeError


class ModelError(Exception):
    """The checkpoint folder lacks what the gateway needs; the message says which file."""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """The served model."""

    name: str
    path: str
    context: int
    """Tokens of prompt and answer together, at most; a prompt alone may have `PROMPT_RESERVE` fewer."""
    vocab_size: int
    sampling: dict[str, float]
    shape: ModelShape | None = None
    """None for an architecture that is not known."""
    """The checkpoint's own sampling defaults (`generation_config.json`), for what a request leaves open."""


CONTEXT_RESERVE = 2
"""Tokens of the context, or of the KV pool if that is smaller, that SGLang 0.5.23 never fills (`managers/scheduler.py`,
`max_req_len`; `managers/tokenizer_manager.py` shortens an answer that would)."""
PROMPT_RESERVE = 4
"""Tokens beyond those that a prompt must leave (`max_req_input_len`)."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_card(folder: Path, name: str | None = None, kv_tokens: int | None = None) -> ModelCard:
    """Read `config.json` and `generation_config.json`; `name` defaults to the folder's. Raises ModelError.

    Args:
        kv_tokens: the smallest KV pool of a DP rank that may hold a request; None = not known, so no limit.
    """
    config = read_json(folder / "config.json")
    context, vocab = config.get("max_position_embeddings"), config.get("vocab_size")
    if not isinstance(context, int) or not isinstance(vocab, int):
        raise ModelError(f"{folder / 'config.json'} has no max_position_embeddings or no vocab_size")
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    sampling = {key: float(generation[key]) for key in _SAMPLING if isinstance(generation.get(key), int | float)}
    if generation.get("do_sample") is False:
        # transformers writes its sampling defaults beside it; greedy means none of them.
        sampling = {}
    return ModelCard(
        name=name or folder.name or folder.resolve().name,
        path=str(folder),
        context=min(context, kv_tokens or context) - CONTEXT_RESERVE,
        vocab_size=vocab,
        sampling=sampling,
        shape=_shape(config),
    )


def _shape(config: dict[str, Any]) -> ModelShape | None:
    try:
        return ModelShape.from_config(config)
    except ShapeError:
        # Whether the engines can run it is theirs to say; here it only feeds a metric.
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ModelError."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return found
