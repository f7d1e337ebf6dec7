"""Layouts that work, and the sentence that each other one gets."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.layout import (
    ELEMENT_BYTES,
    FP8_BYTES,
    USABLE_MEMORY,
    GroupLayout,
    LayoutError,
    ParallelPlan,
    plan_group,
)
from tandem.core.shape import ModelShape
from tandem.core.types import Role
from tandem.models.catalog import load_shape

R1 = load_shape("r1")
TINY = load_shape("tiny")
GIB = 2**30


def layout(role: Role = Role.PREFILL, **values: Any) -> GroupLayout:
    return GroupLayout(role=role, **values)


def cuda(nodes: int, **values: Any) -> GroupLayout:
    return layout(nodes=nodes, **{"gpus_per_node": 8, "device": "cuda", **values})


def test_a_laptop_group_is_in_the_production_layout() -> None:
    plan = plan_group(TINY, layout(nodes=2))
    assert (plan.tp, plan.ep, plan.attn_dp, plan.attn_tp) == (2, 2, 2, 1)
    assert plan.all_to_all
    assert plan.experts_per_rank == 8
    assert plan.dtype == "float32"
    assert plan.kv_tokens_per_rank == 8192


def test_a_single_gpu_has_nobody_to_exchange_with() -> None:
    plan = plan_group(TINY, layout())
    assert (plan.tp, plan.ep, plan.attn_dp) == (1, 1, 1)
    assert not plan.all_to_all


def test_a_single_gpu_holds_every_weight() -> None:
    assert plan_group(TINY, layout()).weight_bytes_per_rank == TINY.parameters * 4


def test_deepseeks_prefill_group_of_four_nodes_fits_80_gb() -> None:
    plan = plan_group(R1, cuda(4, memory_per_gpu=80 * GIB))
    assert (plan.tp, plan.experts_per_rank, plan.dtype) == (32, 8, "bfloat16")
    assert plan.kv_bytes_per_token == 70_272
    assert plan.kv_tokens_per_rank is not None
    assert plan.kv_tokens_per_rank > 400_000


def test_deepseeks_decode_group_of_18_nodes_has_two_experts_per_gpu() -> None:
    plan = plan_group(R1, cuda(18, role=Role.DECODE, redundant_experts=32))
    assert (plan.tp, plan.experts_per_rank) == (144, 2)


def test_one_node_of_h200_holds_r1_and_one_of_h100_does_not() -> None:
    assert plan_group(R1, cuda(1, memory_per_gpu=141 * GIB)).kv_tokens_per_rank
    with pytest.raises(LayoutError, match=r"93\.9 GiB of weights .* use more GPUs per group"):
        plan_group(R1, cuda(1, memory_per_gpu=80 * GIB))


def test_without_known_memory_the_engine_sizes_its_own_kv_pool() -> None:
    assert plan_group(R1, cuda(4)).kv_tokens_per_rank is None


def test_a_given_kv_pool_is_kept() -> None:
    assert plan_group(R1, cuda(4, memory_per_gpu=80 * GIB, max_total_tokens=100_000)).kv_tokens_per_rank == 100_000


@pytest.mark.parametrize(
    ("shape", "asked", "said"),
    [
        (TINY, layout(nodes=0), "nodes is 0"),
        (TINY, layout(nodes=2, redundant_experts=-1), "redundant_experts is -1"),
        (
            TINY,
            layout(nodes=3),
            "16 routed experts cannot be spread evenly over 3 GPUs (3 x 1): use 2 of them, "
            "or 2 redundant experts (18 = 3 x 6)",
        ),
        (
            R1,
            cuda(18, role=Role.DECODE),
            "256 routed experts cannot be spread evenly over 144 GPUs (18 x 8): use 128 of them, "
            "or 32 redundant experts (288 = 144 x 2)",
        ),
        (
            R1,
            cuda(18, role=Role.DECODE, redundant_experts=8),
            "256 routed experts and 8 redundant ones cannot be spread evenly over 144 GPUs",
        ),
        (TINY, layout(nodes=4, attn_dp=3), "4 GPUs cannot be divided into 3 data-parallel attention ranks"),
        (TINY, layout(nodes=4, ep=3), "4 GPUs cannot be divided into 3 expert-parallel ranks"),
        (TINY, layout(nodes=16, attn_dp=1), "16 GPUs per attention rank cannot share 8 heads"),
        (TINY, layout(nodes=6, attn_dp=1, redundant_experts=2), "8 heads cannot be split evenly over 6 GPUs"),
        (
            msgspec.structs.replace(TINY, intermediate_size=511),
            layout(nodes=2, attn_dp=1),
            "the dense layers' width 511 cannot be split evenly over 2 GPUs",
        ),
        (
            msgspec.structs.replace(TINY, moe_intermediate_size=129),
            layout(nodes=2, ep=1),
            "experts of width 129 cannot be split over 2 GPUs each",
        ),
        (R1, cuda(1, gpus_per_node=32, ep=1, attn_dp=1), "over 32 GPUs each in whole FP8 blocks of 128"),
        (R1, layout(nodes=2), "the checkpoint's weights are FP8, for which the CPU engine has no kernels"),
        (
            msgspec.structs.replace(R1, quantization="awq"),
            cuda(4),
            "the checkpoint is quantized with 'awq', which Tandem cannot lay out",
        ),
        (TINY, layout(dtype="int4"), "dtype 'int4' is not known: use auto, float32, bfloat16, float16"),
        (R1, cuda(4, gpus_per_node=4), "DeepEP's kernels between nodes need 8 GPUs on each, and this group has 4"),
        (TINY, cuda(1, gpus_per_node=12, redundant_experts=8), "DeepEP's kernels take up to 8 GPUs in a node"),
        (R1, cuda(32), "DeepEP's normal mode, which prefill uses, spans at most 20 nodes of 8 GPUs"),
        (
            R1,
            cuda(4, memory_per_gpu=80 * GIB, max_total_tokens=1_000_000),
            "use max_total_tokens 476608 or less, or more GPUs",
        ),
        (TINY, layout(nodes=2, memory_per_gpu=2**20), "each GPU would hold 16.4 MiB of weights"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(shape: ModelShape, asked: GroupLayout, said: str) -> None:
    with pytest.raises(LayoutError) as refused:
        plan_group(shape, asked)
    assert said in str(refused.value)


LAYOUTS = st.builds(
    GroupLayout,
    role=st.sampled_from(Role),
    nodes=st.integers(0, 24),
    gpus_per_node=st.sampled_from([1, 2, 3, 4, 8, 12, 16]),
    device=st.sampled_from(["cpu", "cuda"]),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    max_total_tokens=st.none() | st.integers(1, 2_000_000),
    memory_per_gpu=st.none() | st.integers(1, 200 * GIB),
    attn_dp=st.none() | st.integers(1, 64),
    ep=st.none() | st.integers(1, 64),
    redundant_experts=st.integers(0, 40),
)


def planned(shape: ModelShape, asked: GroupLayout) -> tuple[ParallelPlan | None, str]:
    try:
        return plan_group(shape, asked), ""
    except LayoutError as refused:
        return None, str(refused)


@given(shape=st.sampled_from([R1, TINY]), asked=LAYOUTS)
def test_a_layout_is_planned_soundly_or_refused_with_a_remedy(shape: ModelShape, asked: GroupLayout) -> None:
    plan, refusal = planned(shape, asked)
    if plan is None:
        assert re.search(r"use |needs at least 1", refusal)
        assert "\n" not in refusal
        return
    assert plan.tp == asked.nodes * asked.gpus_per_node
    assert plan.attn_dp * plan.attn_tp == plan.tp
    assert plan.ep * plan.moe_tp == plan.tp
    assert shape.heads % plan.attn_tp == 0
    assert plan.experts_per_rank * plan.ep == shape.routed_experts + asked.redundant_experts
    assert plan.all_to_all == (plan.tp > 1 and plan.ep == plan.attn_dp == plan.tp)

    element = FP8_BYTES if shape.quantization else ELEMENT_BYTES[plan.dtype]
    assert plan.weight_bytes_per_rank * plan.tp >= 0.999 * shape.parameters * element  # the group holds all of it
    if asked.memory_per_gpu is not None:
        assert plan.kv_tokens_per_rank is not None
        held = plan.weight_bytes_per_rank + plan.kv_tokens_per_rank * plan.kv_bytes_per_token
        assert held <= asked.memory_per_gpu * USABLE_MEMORY
    if asked.max_total_tokens is not None:
        assert plan.kv_tokens_per_rank == asked.max_total_tokens
