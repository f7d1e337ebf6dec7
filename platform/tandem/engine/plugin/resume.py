"""A request that began on another engine: `sampling_params.custom_params = {"tandem_resumed": n}`.

The last n of its input ids are output that the client already has. For the model they are a prompt; penalties and
the grammar must take them for what they are. SGLang carries `custom_params` to every scheduler of a group untouched,
and without a custom logit processor (a flag that Tandem does not give) nothing of it reads them.
"""

from __future__ import annotations

from typing import Any

RESUMED = "tandem_resumed"


class ResumeError(ValueError):
    """The request cannot be resumed; the message says why."""


def resumed_tokens(request: Any) -> list[int]:
    """The ids of a request's output that it brought along; empty for one that began here. Raises `ResumeError`."""
    params = request.sampling_params.custom_params
    if not isinstance(params, dict) or RESUMED not in params:
        return []
    count, size = params[RESUMED], len(request.origin_input_ids)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < size:
        raise ResumeError(f"{RESUMED} is {count!r}; it must be a number of tokens, at least 0 and fewer than {size}")
    return list(request.origin_input_ids[size - count :]) if count else []
