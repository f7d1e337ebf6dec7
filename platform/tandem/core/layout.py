"""How one expert-parallel group splits the model over its GPUs: a pure function, which refuses what cannot work.

The production layout, taken when nothing else is asked for, is the one that DeepSeek serves R1 with: attention is data
parallel (every GPU owns its own requests and a whole copy of the attention, dense and shared weights), and the routed
experts are spread over all GPUs of the group, reached by all-to-all. A group of one GPU holds the whole model.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tandem.core.shape import ModelShape
from tandem.core.types import Role

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

FP8_BYTES = 1 + 4 / (128 * 128)
"""Bytes per weight of DeepSeek's FP8 checkpoints: one, and a float32 scale for each block of 128 by 128."""

USABLE_MEMORY = 0.85
"""Share of a GPU's memory for weights and KV; the rest is for activations, all-to-all buffers and CUDA graphs."""

LEAST_KV_TOKENS = 4096
"""A DP rank with a smaller KV pool could not hold one request of ordinary length."""

CPU_KV_TOKENS = 8192
"""KV pool per DP rank on a CPU when none is given."""

# DeepEP V1's kernels between nodes are built for 8 NVLink peers per node and at most 20 nodes in normal mode
# (NUM_MAX_NVL_PEERS, NUM_MAX_RDMA_PEERS in its csrc/kernels/configs.cuh).
DEEPEP_GPUS_PER_NODE = 8
DEEPEP_NORMAL_NODES = 20


class LayoutError(ValueError):
    """The group cannot run like that. The message is one sentence: why, and what would work."""


class GroupLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for."""

    role: Role
    nodes: int = 1
    """Nodes, each with one engine process; the ranks of the group."""
    gpus_per_node: int = 1
    """GPUs per node; on a CPU the engine runs one worker for each."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "auto"
    """Data type of activations, KV and unquantized weights; auto = float32 on cpu, the checkpoint's own on cuda."""
    max_total_tokens: int | None = None
    """KV pool per DP rank in tokens; None = what fits (8,192 on cpu)."""
    memory_per_gpu: int | None = None
    """Bytes; None = not known, so not checked."""
    attn_dp: int | None = None
    """Data-parallel attention ranks; None = one per GPU. Fewer = the heads are split within each."""
    ep: int | None = None
    """Ranks that the routed experts are spread over; None = all GPUs. Fewer = each expert is split as well."""
    redundant_experts: int = 0
    """Further copies of busy experts, so that an expert count that the group's size does not divide still fits."""
    page_size: int | None = None
    """KV page in tokens, the same for both roles; None = 1 on cpu, 64 on cuda."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


class ParallelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is told, and what follows from it for each GPU."""

    tp: int
    """All GPUs of the group, in SGLang's words."""
    ep: int
    attn_dp: int
    attn_tp: int
    """GPUs that share the heads of one DP rank."""
    moe_tp: int
    """GPUs that share each routed expert."""
    all_to_all: bool
    """Tokens travel to their experts by DeepEP; otherwise each rank runs its experts on all tokens, to be summed."""
    experts_per_rank: int
    redundant_experts: int
    dtype: str
    page_size: int
    kv_bytes_per_token: int
    kv_tokens_per_rank: int | None
    """KV pool of a DP rank: as asked for, else an estimate; None when the memory is not known."""
    weight_bytes_per_rank: int
    """An estimate, a few per cent off: kernels pad and repack weights."""

    @property
    def dp_ranks(self) -> int:
        """Ranks that a request can be routed to."""
        return self.attn_dp


def plan_group(shape: ModelShape, layout: GroupLayout) -> ParallelPlan:
    """The plan for a group of this layout. Raises LayoutError for one that cannot work."""
    tp = layout.gpus
    _check_counts(layout)
    attn_dp = layout.attn_dp if layout.attn_dp is not None else tp
    ep = layout.ep if layout.ep is not None else tp
    _check_attention(shape, tp, attn_dp)
    dtype = _dtype(shape, layout)
    _check_experts(shape, layout, tp, ep)
    # On any other layout a rank does not own its rows, and DeepEP would send each row several times.
    all_to_all = tp > 1 and ep == tp and attn_dp == tp
    if all_to_all and layout.device == "cuda":
        _check_deepep(layout)
    plan = ParallelPlan(
        tp=tp,
        ep=ep,
        attn_dp=attn_dp,
        attn_tp=tp // attn_dp,
        moe_tp=tp // ep,
        all_to_all=all_to_all,
        experts_per_rank=(shape.routed_experts + layout.redundant_experts) // ep,
        redundant_experts=layout.redundant_experts,
        dtype=dtype,
        page_size=layout.page_size or (64 if layout.device == "cuda" else 1),
        kv_bytes_per_token=shape.kv_bytes_per_token(ELEMENT_BYTES[dtype]),
        kv_tokens_per_rank=None,
        weight_bytes_per_rank=0,
    )
    plan = msgspec.structs.replace(plan, weight_bytes_per_rank=_weight_bytes(shape, plan))
    return msgspec.structs.replace(plan, kv_tokens_per_rank=_kv_tokens(layout, plan))


# -- refusals


def _check_counts(layout: GroupLayout) -> None:
    for name in ("nodes", "gpus_per_node", "attn_dp", "ep", "page_size", "max_total_tokens", "memory_per_gpu"):
        value = getattr(layout, name)
        if value is not None and value < 1:
            raise LayoutError(f"{name} is {value}, and a group needs at least 1")
    if layout.redundant_experts < 0:
        raise LayoutError(f"redundant_experts is {layout.redundant_experts}, and it cannot be negative")


def _check_attention(shape: ModelShape, tp: int, attn_dp: int) -> None:
    if tp % attn_dp:
        raise LayoutError(
            f"{tp} GPUs cannot be divided into {attn_dp} data-parallel attention ranks of equal size: "
            f"use {_divisor_below(tp, attn_dp)}, or {tp} for one per GPU"
        )
    attn_tp = tp // attn_dp
    if attn_tp > shape.heads:
        raise LayoutError(
            f"{attn_tp} GPUs per attention rank cannot share {shape.heads} heads, since each needs one at least: "
            f"use more attention ranks (attn_dp {tp} is one per GPU)"
        )
    if shape.heads % attn_tp:
        raise LayoutError(
            f"{shape.heads} heads cannot be split evenly over {attn_tp} GPUs per attention rank: "
            f"use attn_dp {tp}, which gives each GPU whole attention"
        )
    if attn_dp == 1 and shape.dense_layers and shape.intermediate_size % tp:
        raise LayoutError(
            f"the dense layers' width {shape.intermediate_size} cannot be split evenly over {tp} GPUs: "
            f"use attn_dp {tp}, which gives each GPU the whole layer"
        )


def _check_experts(shape: ModelShape, layout: GroupLayout, tp: int, ep: int) -> None:
    if tp % ep:
        raise LayoutError(
            f"{tp} GPUs cannot be divided into {ep} expert-parallel ranks of equal size: "
            f"use {_divisor_below(tp, ep)}, or {tp} for one per GPU"
        )
    copies = shape.routed_experts + layout.redundant_experts
    if copies % ep:
        spread = f"{tp} GPUs ({layout.nodes} x {layout.gpus_per_node})" if ep == tp else f"{ep} expert-parallel ranks"
        have = f"{shape.routed_experts} routed experts"
        if layout.redundant_experts:
            have += f" and {layout.redundant_experts} redundant ones"
        further = layout.redundant_experts + -copies % ep
        raise LayoutError(
            f"{have} cannot be spread evenly over {spread}: use {_divisor_below(copies, ep)} of them, "
            f"or {further} redundant experts ({shape.routed_experts + further} = {ep} x "
            f"{(shape.routed_experts + further) // ep})"
        )
    moe_tp = tp // ep
    # An FP8 block shares one scale, so it cannot be cut.
    unit = 128 if shape.quantization == "fp8" else 1
    if shape.moe_intermediate_size % (moe_tp * unit):
        blocks = " in whole FP8 blocks of 128" if unit > 1 else ""
        raise LayoutError(
            f"experts of width {shape.moe_intermediate_size} cannot be split over {moe_tp} GPUs each{blocks}: "
            f"use ep {tp}, which keeps experts whole"
        )


def _check_deepep(layout: GroupLayout) -> None:
    per_node = DEEPEP_GPUS_PER_NODE
    if layout.nodes > 1 and layout.gpus_per_node != per_node:
        raise LayoutError(
            f"DeepEP's kernels between nodes need {per_node} GPUs on each, and this group has {layout.gpus_per_node}: "
            f"use gpus_per_node {per_node}, or a single node"
        )
    if layout.nodes == 1 and layout.gpus_per_node > per_node and layout.gpus_per_node % per_node:
        raise LayoutError(
            f"DeepEP's kernels take up to {per_node} GPUs in a node or a multiple of {per_node}, "
            f"and this node has {layout.gpus_per_node}: use {layout.gpus_per_node // per_node * per_node}"
        )
    if layout.role is Role.PREFILL and layout.gpus > per_node * DEEPEP_NORMAL_NODES:
        raise LayoutError(
            f"DeepEP's normal mode, which prefill uses, spans at most {DEEPEP_NORMAL_NODES} nodes of {per_node} GPUs, "
            f"and this group has {layout.gpus} GPUs: use several smaller prefill groups"
        )


def _dtype(shape: ModelShape, layout: GroupLayout) -> str:
    if shape.quantization not in ("", "fp8"):
        raise LayoutError(
            f"the checkpoint is quantized with {shape.quantization!r}, which Tandem cannot lay out: "
            "use one in fp8, or one that is not quantized"
        )
    if shape.quantization and layout.device == "cpu":
        raise LayoutError(
            "the checkpoint's weights are FP8, for which the CPU engine has no kernels: "
            "use a bfloat16 or float32 checkpoint, or device cuda"
        )
    dtype = layout.dtype
    if dtype == "auto":
        dtype = "float32" if layout.device == "cpu" else shape.dtype
    if dtype not in ELEMENT_BYTES:
        raise LayoutError(f"dtype {dtype!r} is not known: use auto, {', '.join(ELEMENT_BYTES)}")
    return dtype


# -- estimates


def _weight_bytes(shape: ModelShape, plan: ParallelPlan) -> int:
    parts = shape.parameters_by_part
    split_by_heads = ("q_proj", "q_b_proj", "kv_b_proj", "o_proj")
    attention = shape.layers * sum(
        weight.size // (plan.attn_tp if weight.name.startswith(split_by_heads) else 1)
        for weight in shape.attention_weights()
    )
    # With DP attention the dense layers are whole on each GPU (--moe-dense-tp-size 1), and so are embedding and head
    # but for the split within an attention rank; with DeepEP so are the shared experts.
    dense = parts.dense_mlp // (1 if plan.attn_dp > 1 else plan.tp)
    shared = parts.shared_experts // (1 if plan.all_to_all else plan.tp)
    routed = shape.moe_layers * plan.experts_per_rank * shape.expert_parameters // plan.moe_tp
    vocabulary = (parts.embedding + parts.head) // plan.attn_tp
    element = ELEMENT_BYTES[plan.dtype]
    matrix_element = FP8_BYTES if shape.quantization == "fp8" else element
    matrices = attention + dense + shared + routed
    return round(matrices * matrix_element) + (vocabulary + parts.router + parts.norms) * element


def _kv_tokens(layout: GroupLayout, plan: ParallelPlan) -> int | None:
    asked = layout.max_total_tokens
    if asked is None and layout.device == "cpu":
        asked = CPU_KV_TOKENS
    if layout.memory_per_gpu is None:
        return asked
    usable = int(layout.memory_per_gpu * USABLE_MEMORY)
    fitting = (usable - plan.weight_bytes_per_rank) // plan.kv_bytes_per_token
    needed = asked or LEAST_KV_TOKENS
    if fitting < needed:
        raise LayoutError(
            f"each GPU would hold {_size(plan.weight_bytes_per_rank)} of weights and "
            f"{_size(needed * plan.kv_bytes_per_token)} of KV for {needed:,} tokens, but of its "
            f"{_size(layout.memory_per_gpu)} only {_size(usable)} can be used for them: {_remedy(plan, usable)}"
        )
    return asked or fitting // plan.page_size * plan.page_size


def _remedy(plan: ParallelPlan, usable: int) -> str:
    fitting = (usable - plan.weight_bytes_per_rank) // plan.kv_bytes_per_token
    if fitting >= LEAST_KV_TOKENS:
        return f"use max_total_tokens {fitting // plan.page_size * plan.page_size} or less, or more GPUs"
    return "use more GPUs per group, or GPUs with more memory"


def _divisor_below(number: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if number % d == 0)


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
