"""Random weights as a safetensors file, the same bytes on every machine.

Three things keep them the same: Philox's integer stream, which NumPy promises not to change (NEP 19); one key per
tensor, drawn from the seed and the tensor's name, so no order matters; and only such float operations as IEEE 754
rounds in one way.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from tandem.core.shape import ModelShape, Weight

Float32s = npt.NDArray[np.float32]

_STORED_AS = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}

# Spreads under which a random model of this architecture still says different things: the matrices' falls with the
# width, so that activations keep their size.
_EMBEDDING_STD = 1.0
_MATRIX_STD_TIMES_ROOT_HIDDEN = 1.28
_NORM_RANGE = (0.7, 1.3)
_CORRECTION_RANGE = (-0.1, 0.1)


def write_weights(
    path: Path, shape: ModelShape, *, seed: int, dtype: str, head_scale: Mapping[int, float] | None = None
) -> None:
    """Write all tensors of `shape` to `path`.

    `dtype` is "float32" or "bfloat16"; router biases are always float32. `head_scale` multiplies rows of the output
    head, by token id: with a factor of 0 a token is never the likeliest, with one above 1 it is said more often.
    """
    stored = [(weight, _dtype_of(weight, dtype)) for weight in shape.weights()]
    # Wider types first, then by name: the order that the safetensors library writes, which keeps tensors aligned.
    stored.sort(key=lambda item: (-_STORED_AS[item[1]][1], item[0].name))
    with path.open("wb") as file:
        _write_header(file, stored)
        for weight, kind in stored:
            values = _values(weight, seed=seed, hidden_size=shape.hidden_size)
            if weight.name == "lm_head.weight":
                for token, factor in (head_scale or {}).items():
                    row = slice(token * shape.hidden_size, (token + 1) * shape.hidden_size)
                    values[row] *= np.float32(factor)
            file.write((_bfloat16(values) if kind == "bfloat16" else values.astype("<f4")).tobytes())


def _dtype_of(weight: Weight, dtype: str) -> str:
    return "float32" if weight.name.endswith("e_score_correction_bias") else dtype


def _write_header(file: BinaryIO, stored: list[tuple[Weight, str]]) -> None:
    """The format: length of the JSON (8 bytes, little endian), JSON padded with blanks to 8 bytes, then the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight, kind in stored:
        name, size = _STORED_AS[kind]
        begin, end = end, end + weight.size * size
        header[weight.name] = {"dtype": name, "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _values(weight: Weight, *, seed: int, hidden_size: int) -> Float32s:
    bits = _bits(f"{seed}/{weight.name}", weight.size)
    if weight.name.endswith("e_score_correction_bias"):
        return _uniform(bits, *_CORRECTION_RANGE)
    if "norm" in weight.name:
        return _uniform(bits, *_NORM_RANGE)
    if "embed_tokens" in weight.name:
        return _bell(bits, _EMBEDDING_STD)
    return _bell(bits, _MATRIX_STD_TIMES_ROOT_HIDDEN / math.sqrt(hidden_size))


def _bits(key: str, count: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def _uniform(bits: npt.NDArray[np.uint64], low: float, high: float) -> Float32s:
    unit = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (unit * (high - low) + low).astype(np.float32)


def _bell(bits: npt.NDArray[np.uint64], std: float) -> Float32s:
    """The sum of four uniform 16-bit integers, centred and scaled: near to normal, and exact up to the last product."""
    mask = np.uint64(0xFFFF)
    total = sum((bits >> np.uint64(shift)) & mask for shift in (0, 16, 32, 48))
    centred = np.asarray(total).astype(np.int64) - 2 * 0xFFFF
    return (centred.astype(np.float64) * (std / math.sqrt(4 * (65536**2 - 1) / 12))).astype(np.float32)


def _bfloat16(values: Float32s) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even, as the upper half of the float32."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")
