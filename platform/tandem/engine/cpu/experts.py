"""The routed experts in plain torch, for rows that name experts of other ranks as -1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def moe_forward(original: Callable[..., Any], layer: Any, rows: torch.Tensor, topk_output: Any, config: Any) -> Any:
    """SGLang's `moe_forward_native`, which cannot take -1 ids, for expert parallelism.

    Sums in float32 in expert order, so that a row's result does not depend on the rows beside it.
    """
    if layer.moe_ep_size == 1:
        return original(layer, rows, topk_output, config)
    if config.activation != "silu" or config.apply_router_weight_on_input:
        raise NotImplementedError("the CPU engine knows SwiGLU experts weighted on their output, as DeepSeek-V3 has")
    weights, ids, _ = topk_output
    total = torch.zeros(rows.shape, dtype=torch.float32)
    present = torch.bincount(ids[ids >= 0].flatten(), minlength=layer.w13_weight.shape[0])
    for expert in present.nonzero().flatten().tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(rows[row], layer.w13_weight[expert]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, layer.w2_weight[expert]).float()
        total.index_add_(0, row, out * weights[row, slot, None].float())
    return total.to(rows.dtype)


def use_standard_runner(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """After `DeepEPMoE.__init__`: take the dispatch → experts → combine path, not the CUDA kernels."""
    self.deprecate_flag = True
