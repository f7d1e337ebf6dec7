"""Sampling by seed.

SGLang has it only with `--enable-deterministic-inference`, which no CPU attention backend takes for DeepSeek's
architecture; without that flag it ignores seeds. Here every request has one, its own or a random one, and a token
depends on nothing but its seed, its position and its probabilities.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable
from hashlib import blake2b
from typing import Any


def keep_seeds(original: Callable[..., Any], cls: Any, batch: Any, vocab_size: int) -> Any:
    """Around `SamplingBatchInfo.from_schedule_batch`."""
    import torch

    info = original(cls, batch, vocab_size)
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    drawn = [secrets.randbits(63) if seed is None else seed for seed in seeds]
    info.sampling_seed = torch.tensor(drawn, dtype=torch.int64)
    return info


def sample_by_seed(
    original: Callable[..., Any], self: Any, probs: Any, info: Any, positions: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around `Sampler._sample_from_probs`: (token ids, nothing captured)."""
    import torch
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    _, weights, ids, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs,
        info.top_ks,
        info.top_ps,
        info.min_ps,
        info.need_min_p_sampling,
        None,
        positions,
        return_filtered_probs=True,
    )
    places = [uniform(seed, at) for seed, at in zip(info.sampling_seed.tolist(), positions.tolist(), strict=True)]
    sums = weights.double().cumsum(dim=-1)
    aims = torch.tensor(places, dtype=torch.float64).unsqueeze(1) * sums[:, -1:]
    # The last of the likely ones, should rounding put the aim on the very end.
    last = (weights > 0).sum(dim=-1, keepdim=True) - 1
    chosen = torch.minimum(torch.searchsorted(sums, aims, right=True), last)
    return torch.gather(ids, 1, chosen).view(-1).to(torch.int32), None


def uniform(seed: int, position: int) -> float:
    """A number from 0 to below 1 that looks random, the same for the same two."""
    drawn = blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(drawn, "little") >> 11) / 2**53
