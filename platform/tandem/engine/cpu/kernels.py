"""What the CPU path really calls of `sgl_kernel`, in plain torch."""

from __future__ import annotations

import torch

__all__ = ["assign_req_to_token_pool_cpu", "copy_all_layer_kv_cache_cpu"]


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new KV slots into its row of the request-to-token table.

    Args:
        req_pool_indices: [requests] row of each request.
        req_to_token: [rows, pool_len] the table, changed in place.
        start_offset: [requests] first column to write.
        end_offset: [requests] column after the last.
        out_cache_loc: [sum(end - start)] KV slots, request after request.
        pool_len: width of the table; unused here, part of the kernel's signature.
    """
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


def copy_all_layer_kv_cache_cpu(*_: object, **__: object) -> None:
    """Only speculative decoding calls it, which the CPU engine does not offer."""
    raise NotImplementedError("speculative decoding is not available on the CPU engine")
