"""The shape of a DeepSeek-V3-architecture model, and what follows from it: tensors, parameters, KV bytes per token.

The names and shapes of the tensors are those of a Hugging Face checkpoint of `DeepseekV3ForCausalLM`. The layer for
multi-token prediction (MTP, `num_nextn_predict_layers`) is left out of every count, as it is in the published
"671 B parameters"; so are the scales that a quantized checkpoint stores beside its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Self

import msgspec

ARCHITECTURE = "DeepseekV3ForCausalLM"

# field of ModelShape → key of config.json
_INTEGERS = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "routed_experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_groups": "n_group",
    "topk_groups": "topk_group",
    "moe_intermediate_size": "moe_intermediate_size",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
}
_MAY_BE_ZERO = {"dense_layers", "shared_experts"}

# What the tensor list below takes for granted; another value means other tensors.
_FIXED = {
    "attention_bias": False,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
}


class ShapeError(ValueError):
    """The configuration is not one of this architecture, or contradicts itself. The message says where."""


class Weight(NamedTuple):
    """One tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """Parameter counts of the whole model, by where they sit."""

    embedding: int
    attention: int
    dense_mlp: int
    router: int
    """Gate matrices and score correction biases."""
    shared_experts: int
    routed_experts: int
    norms: int
    head: int
    """0 when it is the embedding (`tie_word_embeddings`)."""

    @property
    def total(self) -> int:
        return sum(msgspec.structs.astuple(self))


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of the model, named as in the paper rather than as in `config.json`."""

    name: str = "deepseek_v3"
    hidden_size: int
    layers: int
    dense_layers: int
    """The first layers, which have one plain MLP instead of experts."""
    heads: int
    q_lora_rank: int | None
    """None = the query is projected in one step."""
    kv_lora_rank: int
    """Width of the compressed latent that MLA caches in place of keys and values."""
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    """Width of the rotary key, cached beside the latent and shared by all heads."""
    v_head_dim: int
    routed_experts: int
    shared_experts: int
    experts_per_token: int
    expert_groups: int
    """The router first picks `topk_groups` of these groups, then experts inside them."""
    topk_groups: int
    moe_intermediate_size: int
    intermediate_size: int
    vocab_size: int
    context: int
    """Longest sequence in tokens (`max_position_embeddings`)."""
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    """The checkpoint's own data type."""
    quantization: str = ""
    """Quantization of the layers' matrices, such as "fp8"; empty = none."""

    def __post_init__(self) -> None:
        if self.dense_layers > self.layers:
            raise ShapeError(
                f"first_k_dense_replace {self.dense_layers} is more than the {self.layers} layers there are"
            )
        if self.routed_experts % self.expert_groups:
            raise ShapeError(
                f"n_routed_experts {self.routed_experts} is not divisible by n_group {self.expert_groups}, "
                "and the router compares groups of equal size"
            )
        in_group = self.routed_experts // self.expert_groups
        if in_group < 2:
            raise ShapeError(
                f"n_group {self.expert_groups} leaves {in_group} expert in a group, "
                "and the router scores a group by its best two"
            )
        if self.topk_groups > self.expert_groups:
            raise ShapeError(f"topk_group {self.topk_groups} is more than n_group {self.expert_groups}")
        if self.experts_per_token > self.topk_groups * in_group:
            raise ShapeError(
                f"num_experts_per_tok {self.experts_per_token} is more than the {self.topk_groups * in_group} experts "
                f"in topk_group {self.topk_groups} groups of {in_group}"
            )
        if self.qk_rope_head_dim % 2:
            raise ShapeError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd, and rotary embedding turns pairs")

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, name: str | None = None) -> Self:
        """The shape that a Hugging Face `config.json` describes.

        Raises ShapeError when it is of another architecture, or a value is missing, of the wrong type or impossible.
        """
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
            raise ShapeError(
                f"architectures is {architectures!r}; Tandem serves {ARCHITECTURE} (DeepSeek V3, R1, Kimi K2)"
            )
        for key, expected in _FIXED.items():
            if config.get(key, expected) != expected:
                raise ShapeError(f"{key} is {config[key]!r}; of this architecture only {expected!r} is supported")
        quantization = config.get("quantization_config")
        return cls(
            name=name or str(config.get("model_type", "deepseek_v3")),
            q_lora_rank=None if config.get("q_lora_rank") is None else _integer(config, "q_lora_rank", least=1),
            tie_word_embeddings=config.get("tie_word_embeddings") is True,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            quantization=str(quantization.get("quant_method", "")) if isinstance(quantization, Mapping) else "",
            **{
                field: _integer(config, key, least=0 if field in _MAY_BE_ZERO else 1)
                for field, key in _INTEGERS.items()
            },
        )

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    # -- tensors

    def attention_weights(self) -> list[Weight]:
        """The matrices of one layer's attention; `q_b_proj`, `kv_b_proj` and `o_proj` are split by heads under TP."""
        query = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        if self.q_lora_rank is None:
            first = [Weight("q_proj.weight", (query, self.hidden_size))]
        else:
            first = [
                Weight("q_a_proj.weight", (self.q_lora_rank, self.hidden_size)),
                Weight("q_b_proj.weight", (query, self.q_lora_rank)),
            ]
        return [
            *first,
            Weight("kv_a_proj_with_mqa.weight", (latent, self.hidden_size)),
            Weight("kv_b_proj.weight", (self.heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank)),
            Weight("o_proj.weight", (self.hidden_size, self.heads * self.v_head_dim)),
        ]

    def norm_weights(self) -> list[Weight]:
        """The norms of one layer."""
        return [
            Weight("input_layernorm.weight", (self.hidden_size,)),
            Weight("post_attention_layernorm.weight", (self.hidden_size,)),
            *([] if self.q_lora_rank is None else [Weight("self_attn.q_a_layernorm.weight", (self.q_lora_rank,))]),
            Weight("self_attn.kv_a_layernorm.weight", (self.kv_lora_rank,)),
        ]

    def router_weights(self) -> list[Weight]:
        """The router of one expert layer."""
        return [
            Weight("gate.weight", (self.routed_experts, self.hidden_size)),
            Weight("gate.e_score_correction_bias", (self.routed_experts,)),
        ]

    def mlp_weights(self, inner: int) -> list[Weight]:
        """One gated MLP: a dense layer's, the shared experts' (stored as one) or a routed expert's."""
        return [
            Weight("gate_proj.weight", (inner, self.hidden_size)),
            Weight("up_proj.weight", (inner, self.hidden_size)),
            Weight("down_proj.weight", (self.hidden_size, inner)),
        ]

    @property
    def shared_intermediate_size(self) -> int:
        return self.moe_intermediate_size * self.shared_experts

    def weights(self) -> Iterator[Weight]:
        """Every tensor of the checkpoint, by its name there (44,000 of them for R1)."""
        yield Weight("model.embed_tokens.weight", (self.vocab_size, self.hidden_size))
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            yield from _under(at, self.norm_weights())
            yield from _under(at + "self_attn.", self.attention_weights())
            if layer < self.dense_layers:
                yield from _under(at + "mlp.", self.mlp_weights(self.intermediate_size))
                continue
            yield from _under(at + "mlp.", self.router_weights())
            if self.shared_experts:
                yield from _under(at + "mlp.shared_experts.", self.mlp_weights(self.shared_intermediate_size))
            for expert in range(self.routed_experts):
                yield from _under(f"{at}mlp.experts.{expert}.", self.mlp_weights(self.moe_intermediate_size))
        yield Weight("model.norm.weight", (self.hidden_size,))
        if not self.tie_word_embeddings:
            yield Weight("lm_head.weight", (self.vocab_size, self.hidden_size))

    # -- counts

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return _elements(self.mlp_weights(self.moe_intermediate_size))

    @property
    def parameters_by_part(self) -> Parameters:
        vocabulary = self.vocab_size * self.hidden_size
        return Parameters(
            embedding=vocabulary,
            attention=self.layers * _elements(self.attention_weights()),
            dense_mlp=self.dense_layers * _elements(self.mlp_weights(self.intermediate_size)),
            router=self.moe_layers * _elements(self.router_weights()),
            shared_experts=self.moe_layers * _elements(self.mlp_weights(self.shared_intermediate_size)),
            routed_experts=self.moe_layers * self.routed_experts * self.expert_parameters,
            norms=self.layers * _elements(self.norm_weights()) + self.hidden_size,
            head=0 if self.tie_word_embeddings else vocabulary,
        )

    @property
    def parameters(self) -> int:
        """Elements of all tensors of the checkpoint, without MTP and quantization scales."""
        return self.parameters_by_part.total

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with; of the embedding table it reads one row."""
        parts = self.parameters_by_part
        idle_experts = self.moe_layers * (self.routed_experts - self.experts_per_token) * self.expert_parameters
        # A tied head is the embedding table, multiplied in full; it is already counted there.
        unread_rows = 0 if self.tie_word_embeddings else parts.embedding - self.hidden_size
        return parts.total - idle_experts - unread_rows

    # -- KV cache

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that MLA caches for one token, over all layers: the latent and the rotary key."""
        return self.layers * (self.kv_lora_rank + self.qk_rope_head_dim)

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of KV cache for one token; `element_size` is 2 for bf16."""
        return self.kv_elements_per_token * element_size

    def mha_kv_bytes_per_token(self, element_size: int) -> int:
        """The same if the heads were plain multi-head attention, with a key and a value each."""
        per_head = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return self.layers * self.heads * per_head * element_size

    @property
    def mla_saving(self) -> float:
        """How many times less MLA caches than plain multi-head attention would."""
        return self.mha_kv_bytes_per_token(1) / self.kv_bytes_per_token(1)


def _integer(config: Mapping[str, object], key: str, *, least: int) -> int:
    if key not in config:
        raise ShapeError(f"{key} is missing")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ShapeError(f"{key} is {value!r}; it must be a whole number of {least} or more")
    return value


def _under(prefix: str, weights: list[Weight]) -> Iterator[Weight]:
    return (Weight(prefix + weight.name, weight.shape) for weight in weights)


def _elements(weights: list[Weight]) -> int:
    return sum(weight.size for weight in weights)
