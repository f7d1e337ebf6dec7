"""Which rows go to which expert-parallel rank: the arithmetic of dispatch, without the network."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """Which of this rank's rows go where."""

    rows: torch.Tensor
    """[sent] row numbers, ordered by destination."""
    counts: list[int]
    """Rows for each rank."""
    local_ids: torch.Tensor
    """[sent, top-k] expert ids as the destination numbers them, -1 for experts elsewhere."""


def plan_dispatch(expert_ids: torch.Tensor, ranks: int, experts_per_rank: int) -> Plan:
    """Which rows go to which rank.

    Args:
        expert_ids: [rows, top-k] global expert ids; -1 marks a padded slot, which goes nowhere.
    """
    owner = torch.where(expert_ids < 0, -1, expert_ids // experts_per_rank)
    needed = (owner.unsqueeze(0) == torch.arange(ranks).view(-1, 1, 1)).any(-1)
    destination, rows = needed.nonzero(as_tuple=True)
    here = owner[rows] == destination.unsqueeze(1)
    local_ids = torch.where(here, expert_ids[rows] - destination.unsqueeze(1) * experts_per_rank, -1)
    return Plan(rows, needed.sum(1).tolist(), local_ids)


def block_slots(plan: Plan, block: int) -> torch.Tensor:
    """Where each row of `plan` lies when every destination gets `block` slots.

    Returns:
        [sent] slot numbers in 0 … ranks * block - 1; `block` must be at least the largest of `plan.counts`.
    """
    counts = torch.tensor(plan.counts)
    destination = torch.arange(len(plan.counts)).repeat_interleave(counts)
    first = torch.cumsum(counts, 0) - counts
    return torch.arange(len(plan.rows)) - first[destination] + destination * block
