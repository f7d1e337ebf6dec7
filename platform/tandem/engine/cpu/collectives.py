"""Collectives that SGLang has only over NCCL, over gloo. Each wraps a method of SGLang's `GroupCoordinator`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def exchange(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """All-to-all of rows: `send[r]` rows go to rank r, `receive[r]` come from it.

    Args:
        rows: [sum(send), …], ordered by destination.

    Returns:
        [sum(receive), …], ordered by source.
    """
    got = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(got, rows.contiguous(), list(receive), list(send), group=group)
    return got


def reduce_scatterv(
    original: Callable[..., Any],
    self: Any,
    input_: torch.Tensor,
    output: torch.Tensor | None = None,
    sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    """Each rank sends chunk r to rank r, which sums what it gets."""
    world, me = self.world_size, self.rank_in_group
    chunks = list(sizes) if sizes is not None else [input_.shape[0] // world] * world
    got = exchange(input_, chunks, [chunks[me]] * world, self.device_group)
    total = got.view(world, chunks[me], *input_.shape[1:]).sum(0)
    return total if output is None else output.copy_(total)


def all_gatherv(
    original: Callable[..., Any],
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    sizes: Sequence[int] | None = None,
    output: torch.Tensor | None = None,
) -> Any:
    """Every rank gets the rows of all, which may differ in number."""
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(original, self, one, sizes) for one in input_]
    world, me = self.world_size, self.rank_in_group
    counts = list(sizes) if sizes is not None else [input_.shape[0]] * world
    got = exchange(torch.cat([input_] * world), [counts[me]] * world, counts, self.device_group)
    return got if output is None else output.copy_(got)


def all_to_all_single(original: Callable[..., Any], self: Any, output: torch.Tensor, input: torch.Tensor) -> Any:
    """In-tree it goes through a custom operator without a CPU kernel."""
    if self.world_size == 1:
        return original(self, output, input)
    return self._all_to_all_single(output, input)
