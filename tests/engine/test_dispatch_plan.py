"""Dispatch arithmetic: every row reaches each rank that holds one of its experts, once, and no other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.cpu.dispatch_plan import Plan, block_slots, plan_dispatch


@st.composite
def steps(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Expert ids [rows, top-k] without repeats in a row, ranks, experts per rank. Some slots are padding (-1)."""
    ranks, per = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    k = draw(st.integers(1, min(4, ranks * per)))
    rows = draw(st.lists(st.permutations(range(ranks * per)).map(lambda p: p[:k]), min_size=0, max_size=12))
    ids = torch.tensor(rows, dtype=torch.long).reshape(len(rows), k)
    padded = draw(st.integers(0, len(rows)))
    ids[padded:] = torch.where(torch.arange(len(rows))[padded:, None] % 3 == 2, -1, ids[padded:])
    return ids, ranks, per


def sent_to(plan: Plan, rank: int) -> slice:
    return slice(sum(plan.counts[:rank]), sum(plan.counts[: rank + 1]))


@settings(deadline=None, max_examples=60)
@given(steps())
def test_a_row_goes_once_to_each_rank_that_holds_one_of_its_experts(step: tuple[torch.Tensor, int, int]) -> None:
    ids, ranks, per = step
    plan = plan_dispatch(ids, ranks, per)
    for rank in range(ranks):
        wanted = [row for row in range(len(ids)) if any(i >= 0 and i // per == rank for i in ids[row].tolist())]
        assert plan.rows[sent_to(plan, rank)].tolist() == wanted


@settings(deadline=None, max_examples=60)
@given(steps())
def test_a_destination_sees_its_own_experts_by_their_local_numbers(step: tuple[torch.Tensor, int, int]) -> None:
    ids, ranks, per = step
    plan = plan_dispatch(ids, ranks, per)
    for rank in range(ranks):
        for row, local in zip(plan.rows[sent_to(plan, rank)], plan.local_ids[sent_to(plan, rank)], strict=True):
            expected = [i - rank * per if i >= 0 and i // per == rank else -1 for i in ids[row].tolist()]
            assert local.tolist() == expected


@settings(deadline=None, max_examples=60)
@given(steps())
def test_dispatch_then_combine_computes_the_sum_over_all_experts(step: tuple[torch.Tensor, int, int]) -> None:
    ids, ranks, per = step
    hidden = torch.randn(len(ids), 3, dtype=torch.float64)
    scale = torch.randn(ranks * per, dtype=torch.float64)
    plan = plan_dispatch(ids, ranks, per)
    total = torch.zeros_like(hidden)
    for rank in range(ranks):
        local = plan.local_ids[sent_to(plan, rank)]
        factor = torch.where(local < 0, 0, scale[rank * per + local.clamp_min(0)]).sum(1, keepdim=True)
        total.index_add_(0, plan.rows[sent_to(plan, rank)], hidden[plan.rows[sent_to(plan, rank)]] * factor)
    expected = hidden * torch.where(ids < 0, 0, scale[ids.clamp_min(0)]).sum(1, keepdim=True)
    torch.testing.assert_close(total, expected)


@settings(deadline=None, max_examples=60)
@given(steps(), st.integers(0, 3))
def test_blocks_give_every_row_a_slot_of_its_own_at_its_destination(
    step: tuple[torch.Tensor, int, int], slack: int
) -> None:
    ids, ranks, per = step
    plan = plan_dispatch(ids, ranks, per)
    block = max(plan.counts) + slack
    slots = block_slots(plan, block).tolist()
    assert len(set(slots)) == len(slots)
    for rank in range(ranks):
        assert all(rank * block <= slot < (rank + 1) * block for slot in slots[sent_to(plan, rank)])
