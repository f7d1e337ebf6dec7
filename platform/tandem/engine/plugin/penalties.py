"""Penalties count all output of a request.

SGLang 0.5.23 begins to count anew whenever a request enters a batch. That is right once. Of a request whose decoding
was interrupted (retracted for want of memory, then taken up again) it forgets everything but the last token, and of a
resumed one it never knew.

With the overlap scheduler, the default on GPUs, SGLang counts a token one step late and the first one twice. That is
the same for every request and is left alone.
"""

from __future__ import annotations

from typing import Any

from tandem.engine.plugin.resume import ResumeError, resumed_tokens


def count_history(info: Any, cls: Any, batch: Any, vocab_size: int) -> Any:
    """After `SamplingBatchInfo.from_schedule_batch`: count what each request has said before this batch."""
    if not info.penalizer_orchestrator.is_required:
        return info
    # A batch whose prompt was computed elsewhere goes on to its next token at once, and counts its last one then.
    skip = 1 if batch.forward_mode is not None and batch.forward_mode.is_prebuilt() else 0
    for row, request in enumerate(batch.reqs):
        here = list(request.output_ids[: max(0, len(request.output_ids) - skip)])
        if (brought := _brought(request)) or here:
            _count(info.penalizer_orchestrator, row, brought, here)
    return info


def _brought(request: Any) -> list[int]:
    if request.to_finish is not None:
        return []  # an aborted request has lost its prompt, and is answered with its error
    try:
        return resumed_tokens(request)
    except ResumeError:
        return []  # refused at intake; should one come by another way, it must not take the scheduler down


def _count(orchestrator: Any, row: int, brought: list[int], here: list[int]) -> None:
    """Count tokens of one row in every penalizer that is in use."""
    import torch
    from sglang.srt.sampling import penaltylib

    ids = torch.tensor(brought + here, dtype=torch.int64).to(orchestrator.device, non_blocking=True)
    for kind, penalizer in orchestrator.penalizers.items():
        if not penalizer.is_prepared():
            continue
        if kind is penaltylib.BatchedFrequencyPenalizer:
            price = penalizer.frequency_penalties[row].expand(len(ids))
            penalizer.cumulated_frequency_penalties[row].scatter_add_(0, ids, price)
        elif kind is penaltylib.BatchedPresencePenalizer:
            penalizer.cumulated_presence_penalties[row, ids] = penalizer.presence_penalties[row]
        elif kind is penaltylib.BatchedRepetitionPenalizer:
            penalizer.cumulated_repetition_penalties[row, ids] = penalizer.repetition_penalties[row]
        elif kind is penaltylib.BatchedMinNewTokensPenalizer:
            # What was brought along is already taken off the request's min_new_tokens.
            penalizer.len_output_tokens[row] += len(here)
