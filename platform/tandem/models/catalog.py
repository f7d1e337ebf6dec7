"""Shapes by name: published ones, the tiny model's, and any checkpoint folder's."""

from __future__ import annotations

import json
from pathlib import Path

from tandem.core.shape import ModelShape, ShapeError
from tandem.models.tiny import tiny_config

_PUBLISHED = {"r1": ("DeepSeek-R1", "deepseek-r1.json")}

KNOWN = ("r1", "tiny")
"""Names that `load_shape` takes beside folders."""


def load_shape(where: str | Path) -> ModelShape:
    """The shape of "r1", of "tiny" (with its default options), or of the checkpoint in a folder.

    A folder of such a name needs "./" before it. Raises ShapeError when there is no such model, or its `config.json`
    is not of this architecture.
    """
    if where == "tiny":
        return ModelShape.from_config(tiny_config(), name="tiny")
    if isinstance(where, str) and where in _PUBLISHED:
        name, file = _PUBLISHED[where]
        return _read(Path(__file__).parent / "shapes" / file, name)
    folder = Path(where)
    if not folder.is_dir():
        raise ShapeError(f"{where} is neither a folder nor one of {', '.join(KNOWN)}")
    return _read(folder / "config.json", folder.absolute().name)


def _read(path: Path, name: str) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ShapeError(f"{path} is missing; a checkpoint folder has one") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShapeError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ShapeError(f"{path} does not hold a JSON object")
    try:
        return ModelShape.from_config(config, name=name)
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from error
