"""Penalties count every token of a request's output, once, before the next one is chosen.

SGLang 0.5.23 begins to count anew whenever a request enters a batch. That is right once. Of a request whose decoding
was interrupted (retracted for want of memory, then taken up again) it forgets everything but the last token, and of a
resumed one it never knew.

With the overlap scheduler, the default on GPUs, it also counts a token one step late, and the first one twice: when a
batch is made up, the token before is known on the GPU only. A resumed request would then say something else than the
uninterrupted one, whose first token is another. So what is known is counted when the batch is made up, and what is not
where SGLang looks up that token for the forward pass anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tandem.engine.plugin.resume import ResumeError, resumed_tokens

_COUNTED = "tandem_counted"
"""Attribute of a request: how many of its output tokens its row of the penalizers holds."""
_BEHIND = "tandem_behind"
"""Attribute of a batch's sampling info: the rows whose last token is on the GPU only."""


def count_history(info: Any, cls: Any, batch: Any, vocab_size: int) -> Any:
    """After `SamplingBatchInfo.from_schedule_batch`: count what each request has said before this batch."""
    # A batch whose prompt was computed elsewhere goes on to its next token at once, and counts its last one then.
    skip = 1 if batch.forward_mode is not None and batch.forward_mode.is_prebuilt() else 0
    said: list[list[int]] = []
    for request in batch.reqs:
        counted = max(0, len(request.output_ids) - skip)
        setattr(request, _COUNTED, counted)
        said.append(_brought(request) + list(request.output_ids[:counted]) if _penalized(request) else [])
    if info.penalizer_orchestrator.is_required:
        _count(info.penalizer_orchestrator, said)
        # What was brought along is already taken off the request's min_new_tokens.
        _set_lengths(info.penalizer_orchestrator, [getattr(request, _COUNTED) for request in batch.reqs])
    return info


def count_new(original: Callable[..., None], batch: Any) -> None:
    """In place of `ScheduleBatch.cumulate_penalty_output_tokens`: count what each request has said since the last time,
    and note for whom a token is not known yet. Speculative decoding calls it for tokens of its own."""
    if not batch.spec_algorithm.is_none():
        original(batch)
        return
    info = batch.sampling_info
    said: list[list[int]] = []
    lengths: list[int] = []
    behind: list[int] = []
    for row, (request, length) in enumerate(zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True)):
        known = len(request.output_ids)
        said.append(list(request.output_ids[getattr(request, _COUNTED, 0) :]) if _penalized(request) else [])
        setattr(request, _COUNTED, known)
        # The KV of all tokens but the last is there.
        chosen = length + 1 - len(request.origin_input_ids)
        lengths.append(max(chosen, known))
        if chosen > known:
            behind.append(row)
    _count(info.penalizer_orchestrator, said)
    _set_lengths(info.penalizer_orchestrator, lengths)
    setattr(info, _BEHIND, behind)


@contextmanager
def count_in_flight(
    original: Callable[..., AbstractContextManager[None]], scheduler: Any, batch: Any, **how: Any
) -> Iterator[None]:
    """Around `Scheduler._forward_isolation`, where the batch has its input tokens and a copy of its penalties, both on
    the stream of the forward pass: add those tokens that were not known before."""
    info = batch.sampling_info
    # Noted for this pass: the next one has other rows, and no note when the last penalized request has gone.
    behind = vars(info).pop(_BEHIND, []) if info is not None else []
    with original(scheduler, batch, **how):
        if behind and info.penalizer_orchestrator.is_required:
            _add(info.penalizer_orchestrator, batch.sampling_info, batch.input_ids, behind)
        yield


def _penalized(request: Any) -> bool:
    """Whether anything depends on what its row holds: a row without penalties need not be counted."""
    params = request.sampling_params
    return (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) != (0.0, 0.0, 1.0)


def _brought(request: Any) -> list[int]:
    if request.to_finish is not None:
        return []  # an aborted request has lost its prompt, and is answered with its error
    try:
        return resumed_tokens(request)
    except ResumeError:
        return []  # refused at intake; should one come by another way, it must not take the scheduler down


def _count(orchestrator: Any, said: list[list[int]]) -> None:
    """Count so many tokens of each row in every penalizer that is in use."""
    import torch
    from sglang.srt.sampling import penaltylib
    from sglang.srt.utils.common import async_h2d

    if not any(said):
        return
    places = [(row, token) for row, tokens in enumerate(said) for token in tokens]
    rows, ids = async_h2d(places, dtype=torch.int64, device=orchestrator.device).T
    for kind, penalizer in _in_use(orchestrator):
        if kind is penaltylib.BatchedFrequencyPenalizer:
            prices = penalizer.frequency_penalties[rows, 0]
            penalizer.cumulated_frequency_penalties.index_put_((rows, ids), prices, accumulate=True)
        elif kind is penaltylib.BatchedPresencePenalizer:
            penalizer.cumulated_presence_penalties[rows, ids] = penalizer.presence_penalties[rows, 0]
        elif kind is penaltylib.BatchedRepetitionPenalizer:
            penalizer.cumulated_repetition_penalties[rows, ids] = penalizer.repetition_penalties[rows, 0]


def _set_lengths(orchestrator: Any, lengths: list[int]) -> None:
    from sglang.srt.sampling import penaltylib
    from sglang.srt.utils.common import async_h2d

    for kind, penalizer in _in_use(orchestrator):
        if kind is penaltylib.BatchedMinNewTokensPenalizer:
            counts = async_h2d(lengths, dtype=penalizer.len_output_tokens.dtype, device=orchestrator.device)
            penalizer.len_output_tokens.copy_(counts.unsqueeze(1))


def _add(orchestrator: Any, copy: Any, input_ids: Any, behind: list[int]) -> None:
    """Add one token of each row in `behind` to the penalties of one forward pass."""
    import torch
    from sglang.srt.sampling import penaltylib
    from sglang.srt.utils.common import async_h2d

    rows = async_h2d(behind, dtype=torch.int64, device=orchestrator.device)
    ids = input_ids[rows].long()
    for kind, penalizer in _in_use(orchestrator):
        if kind is penaltylib.BatchedFrequencyPenalizer:
            copy.acc_additive_penalties[rows, ids] -= penalizer.frequency_penalties[rows, 0]
        elif kind is penaltylib.BatchedPresencePenalizer:
            counted = penalizer.cumulated_presence_penalties[rows, ids]
            copy.acc_additive_penalties[rows, ids] -= penalizer.presence_penalties[rows, 0] - counted
        elif kind is penaltylib.BatchedRepetitionPenalizer:
            copy.acc_scaling_penalties[rows, ids] = penalizer.repetition_penalties[rows, 0]


def _in_use(orchestrator: Any) -> Iterator[tuple[Any, Any]]:
    """Kind and penalizer."""
    return ((kind, penalizer) for kind, penalizer in orchestrator.penalizers.items() if penalizer.is_prepared())
