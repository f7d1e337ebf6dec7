"""DeepEP's dispatch and combine on CPU, over gloo.

As in DeepEP (https://github.com/deepseek-ai/DeepEP): every rank owns its own rows; a row goes once to each rank that
holds at least one of its top-k experts, with that rank's local expert ids and weights; each rank returns the weighted
sum over its experts, and the owner adds them up. Two ways to ship the rows, chosen by the size of the step, which all
ranks know:

- *normal*, many rows: exchange counts, then exactly the rows (three collectives a layer);
- *low latency*, few rows (a decode step): blocks of fixed size, no counts (two collectives a layer).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.layers.dp_attention import get_dp_global_num_tokens
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import get_parallel

from tandem.engine.cpu.collectives import exchange
from tandem.engine.cpu.counters import A2ACounters
from tandem.engine.cpu.dispatch_plan import block_slots, plan_dispatch

LOW_LATENCY_ROWS = 32
"""Steps in which no rank has more rows than this are shipped in blocks of fixed size."""


class GlooDeepEPDispatcher(StandardDispatcher):  # type: ignore[misc]
    """Takes the place of SGLang's DeepEP dispatcher on the CPU engine."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._layer = int(config.layer_id)
        self._counters: A2ACounters | None = None

    def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> StandardDispatchOutput:
        """Send rows [rows, hidden] to their experts' ranks; return the rows this rank's experts must compute."""
        weights, ids, logits = topk_output
        self._group: dist.ProcessGroup = get_parallel().moe_ep_group.device_group
        if self._counters is None:
            self._counters = A2ACounters(self.moe_ep_rank, self._layer)
        plan = plan_dispatch(ids.long(), self.moe_ep_size, self.num_local_routed_experts)
        self._owned, self._plan, self._width = hidden_states.shape[0], plan, ids.shape[1]
        packed = torch.cat(
            [
                hidden_states[plan.rows].float(),
                plan.local_ids.float(),
                torch.where(plan.local_ids < 0, 0, weights[plan.rows].float()),
            ],
            1,
        )
        rows = get_dp_global_num_tokens() or []
        # All ranks must choose alike, so blocks need the row counts of all of them.
        agreed = len(rows) == self.moe_ep_size and max(rows) <= LOW_LATENCY_ROWS
        self._block = max(rows) if agreed else 0
        got = self._ship_blocks(packed) if self._block else self._ship_exactly(packed)
        sent = len(plan.rows) - plan.counts[self.moe_ep_rank]
        on_wire = self._block * (self.moe_ep_size - 1) if self._block else sent
        self._counters.dispatched(
            sent=sent, kept=plan.counts[self.moe_ep_rank], size=on_wire * packed.shape[1] * packed.element_size()
        )
        hidden = hidden_states.shape[1]
        return StandardDispatchOutput(
            hidden_states=got[:, :hidden].to(hidden_states.dtype),
            hidden_states_scale=None,
            topk_output=StandardTopKOutput(
                got[:, hidden + self._width :].contiguous(), got[:, hidden : hidden + self._width].int(), logits
            ),
        )

    def combine(self, combine_input: Any) -> torch.Tensor:
        """Return each row's weighted sum [rows, hidden] to its owner."""
        (computed,) = combine_input
        assert self._counters is not None
        if self._block:
            send = receive = [self._block] * self.moe_ep_size
        else:
            send, receive = self._received, self._plan.counts
        back = exchange(computed.float(), send, receive, self._group)
        others = sum(send) - send[self.moe_ep_rank]
        self._counters.combined(size=others * back.shape[1] * back.element_size())
        if self._block:
            back = back[self._slots]
        total = torch.zeros((self._owned, computed.shape[1]), dtype=torch.float32)
        return total.index_add_(0, self._plan.rows, back).to(computed.dtype)

    def _ship_exactly(self, packed: torch.Tensor) -> torch.Tensor:
        counts = torch.tensor(self._plan.counts)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self._group)
        self._received: list[int] = theirs.tolist()
        return exchange(packed, self._plan.counts, self._received, self._group)

    def _ship_blocks(self, packed: torch.Tensor) -> torch.Tensor:
        blocks = packed.new_zeros((self.moe_ep_size * self._block, packed.shape[1]))
        blocks[:, -2 * self._width : -self._width] = -1  # an unused slot names no expert
        self._slots = block_slots(self._plan, self._block)
        blocks[self._slots] = packed
        even = [self._block] * self.moe_ep_size
        return exchange(blocks, even, even, self._group)


def create_dispatcher(original: Any, config: Any, quant_method: Any) -> Any:
    """Around SGLang's `create_moe_dispatcher`: ours behind `--moe-a2a-backend deepep`."""
    from sglang.srt.layers.moe import get_moe_a2a_backend

    return GlooDeepEPDispatcher(config) if get_moe_a2a_backend().is_deepep() else original(config, quant_method)
