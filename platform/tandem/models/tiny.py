"""The tiny model: DeepSeek R1's architecture at 6.7 million parameters, made from a seed and never downloaded.

It has everything that R1's serving needs (MLA, sigmoid group-limited routing with a correction bias, a shared expert,
YaRN, R1's special tokens and conversation format), so the engine runs the same code for it. What it says is noise, but
the same noise everywhere: the folder's bytes depend only on the options.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tandem.core.shape import ModelShape, ShapeError
from tandem.models.tokenizer import BOS_ID, EOS, EOS_ID, SPECIAL_IDS, VOCAB_SIZE, tokenizer_config, tokenizer_json
from tandem.models.weights import write_weights

FORMAT = 1
"""Raised when the same options give other bytes; older folders are then made again."""

MARK = "tandem.json"
"""The file that says how a folder was made."""

MLA: Mapping[str, Mapping[str, int]] = {
    "tiny": {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    "r1": {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
"""What `mla` can be: the keys of `config.json` that it decides."""

_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_ROPE_ORIGINAL_CONTEXT = 1024

# A trained model does not say control tokens out of place, and its reasoning ends. So they are silenced in the output
# head, all but the end of the text, and `</think>` comes about once in 60 tokens rather than once in 1,000.
_HEAD_SCALE = {number: 0.0 for text, number in SPECIAL_IDS.items() if text != EOS} | {SPECIAL_IDS["</think>"]: 1.5}


class TinyError(ValueError):
    """The options do not make a model, or the folder must not be written to. The message says why."""


class TinyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be chosen. The defaults are the model that a fleet without a model path serves."""

    seed: int = 0
    layers: int = 4
    dense_layers: int = 1
    hidden_size: int = 256
    heads: int = 8
    experts: int = 16
    expert_groups: int = 4
    topk_groups: int = 2
    experts_per_token: int = 4
    context: int = 4096
    """Longest sequence in tokens, a multiple of 1,024: YaRN stretches 1,024 positions to it."""
    dtype: str = "float32"
    mla: str = "tiny"
    """Sizes of the latent and the heads: of the tiny model, or R1's own, which are the ones that GPU kernels know."""

    def __post_init__(self) -> None:
        for field in ("layers", "heads", "experts", "expert_groups", "topk_groups", "experts_per_token"):
            if getattr(self, field) < 1:
                raise TinyError(f"{field} is {getattr(self, field)}; it must be 1 or more")
        if not 0 <= self.seed < 2**63:
            raise TinyError(f"seed is {self.seed}; it must be 0 or more, and below 2^63")
        if not 0 <= self.dense_layers < self.layers:
            raise TinyError(
                f"dense_layers is {self.dense_layers}; of {self.layers} layers at least one must have experts"
            )
        if self.hidden_size < 128 or self.hidden_size % 64:
            raise TinyError(f"hidden_size is {self.hidden_size}; it must be a multiple of 64, and 128 or more")
        if self.context < 2 * _ROPE_ORIGINAL_CONTEXT or self.context % _ROPE_ORIGINAL_CONTEXT:
            raise TinyError(
                f"context is {self.context}; it must be a multiple of {_ROPE_ORIGINAL_CONTEXT}, "
                f"and {2 * _ROPE_ORIGINAL_CONTEXT} or more, since SGLang's CPU engine needs YaRN"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise TinyError(f"dtype is {self.dtype!r}; it must be float32 or bfloat16")
        if self.mla not in MLA:
            raise TinyError(f"mla is {self.mla!r}; it must be {' or '.join(MLA)}")


def tiny_config(options: TinyOptions | None = None) -> dict[str, object]:
    """The content of `config.json`, with the keys of R1's. Raises TinyError for impossible options."""
    o = options or TinyOptions()
    mla = MLA[o.mla]
    config: dict[str, object] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "first_k_dense_replace": o.dense_layers,
        "hidden_act": "silu",
        "hidden_size": o.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 2 * o.hidden_size,
        "kv_lora_rank": mla["kv_lora_rank"],
        "max_position_embeddings": o.context,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": o.hidden_size // 2,
        "moe_layer_freq": 1,
        "n_group": o.expert_groups,
        "n_routed_experts": o.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": o.heads,
        "num_experts_per_tok": o.experts_per_token,
        "num_hidden_layers": o.layers,
        "num_key_value_heads": o.heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 96,
        "qk_nope_head_dim": mla["qk_nope_head_dim"],
        "qk_rope_head_dim": mla["qk_rope_head_dim"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": o.context / _ROPE_ORIGINAL_CONTEXT,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": _ROPE_ORIGINAL_CONTEXT,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": o.topk_groups,
        "topk_method": "noaux_tc",
        "torch_dtype": o.dtype,
        "use_cache": True,
        "v_head_dim": mla["v_head_dim"],
        "vocab_size": VOCAB_SIZE,
    }
    try:
        ModelShape.from_config(config)
    except ShapeError as error:
        raise TinyError(str(error)) from error
    return config


def ensure_tiny(folder: Path, **options: Any) -> bool:
    """Make the model in `folder`, unless it is there; the keywords are the fields of TinyOptions.

    A folder made with other options or an older format is replaced, and one that was not made here is refused
    (TinyError). The folder appears whole or not at all, and several processes may call this at once.
    Returns whether it was made now.
    """
    chosen = _options(options)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder.parent):
        if _is_made(folder, chosen):
            return False
        if folder.exists() and not folder.is_dir():
            raise TinyError(f"{folder} is not a folder; choose another place for the model")
        if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
            raise TinyError(f"{folder} holds files that Tandem did not make; choose an empty or a new folder")
        _make(folder, chosen)
    return True


def _options(options: dict[str, Any]) -> TinyOptions:
    try:
        return msgspec.convert(options, TinyOptions)
    except msgspec.ValidationError as error:
        raise TinyError(f"tiny model: {error}") from error


def _is_made(folder: Path, options: TinyOptions) -> bool:
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    sizes = {name: (folder / name).stat().st_size for name in _FILES if (folder / name).is_file()}
    return bool(mark == _mark(options, sizes))


def _mark(options: TinyOptions, sizes: dict[str, int]) -> dict[str, object]:
    return {"made_by": "tandem model make", "format": FORMAT, "options": msgspec.to_builtins(options), "bytes": sizes}


def _make(folder: Path, options: TinyOptions) -> None:
    config = tiny_config(options)
    # We hold the lock: a scratch folder that is there already was left by a process that was killed.
    scratch = folder.parent / f".{folder.name}.making"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        new = scratch / "new"
        new.mkdir(parents=True)
        _write_json(new / "config.json", config)
        _write_json(new / "generation_config.json", _generation_config())
        _write_json(new / "tokenizer.json", tokenizer_json())
        _write_json(new / "tokenizer_config.json", tokenizer_config(options.context))
        shape = ModelShape.from_config(config)
        weights = new / "model.safetensors"
        write_weights(weights, shape, seed=options.seed, dtype=options.dtype, head_scale=_HEAD_SCALE)
        _write_json(new / MARK, _mark(options, {name: (new / name).stat().st_size for name in _FILES}))
        if folder.exists():
            folder.rename(scratch / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(scratch)


def _generation_config() -> dict[str, object]:
    """R1's recommended sampling."""
    return {"bos_token_id": BOS_ID, "do_sample": True, "eos_token_id": EOS_ID, "temperature": 0.6, "top_p": 0.95}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _one_at_a_time(parent: Path) -> Iterator[None]:
    """Hold a lock on the parent folder itself, so no lock file is left behind. Making a model takes about a second."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
