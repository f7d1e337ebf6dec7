"""Errors as an OpenAI client expects them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import math

import msgspec

from tandem.core.pair_events import Failure, FailureKind

LONGEST = 2000
"""Characters of an error's message."""


class ApiError(Exception):
    """An answer that is an error. `message` tells a person what was wrong and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float = 0.0,
    ) -> None:
        """`retry_after` in seconds, 0 = no such header."""
        super().__init__(message)
        self.status = status
        # What a client sent may be in it, of any length.
        self.message = message if len(message) <= LONGEST else message[:LONGEST] + " …"
        self.type = type
        self.param = param if param is None else param[:200]
        self.code = code
        self.retry_after = retry_after

    def body(self, *, in_stream: bool = False) -> bytes:
        """`in_stream`: there is no header to say when to try again."""
        error: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if in_stream and self.retry_after:
            error["retry_after"] = max(1, math.ceil(self.retry_after))
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        if not self.retry_after:
            return []
        return [(b"retry-after", str(max(1, math.ceil(self.retry_after))).encode())]


def bad_value(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400: a field that the client got wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str = "") -> ApiError:
    """400: a field that would change the answer and that this server does not act on."""
    message = f"'{param}' is not supported by this server{': ' + why if why else '.'}"
    return ApiError(400, message, param=param, code="unsupported_parameter")


_TIMEOUTS = frozenset({FailureKind.DEADLINE, FailureKind.NO_FIRST_TOKEN, FailureKind.STALLED})


def from_failure(failure: Failure) -> ApiError:
    """What the client is told when its request has failed for good."""
    if failure.kind is FailureKind.BAD_REQUEST:
        return ApiError(400, failure.message, code="invalid_request")
    if failure.kind in _TIMEOUTS:
        return ApiError(504, f"The answer took too long: {failure.message}.", type="server_error", code="timeout")
    if failure.kind is FailureKind.NO_CAPACITY:
        message = f"The model cannot take requests now: {failure.message}. Try again shortly."
        return ApiError(503, message, type="server_error", code="no_capacity", retry_after=failure.retry_after or 2.0)
    if failure.kind is FailureKind.STOPPING:
        message = f"The request failed: {failure.message}."
        return ApiError(503, message, type="server_error", code="stopping", retry_after=failure.retry_after)
    message = f"The request failed in the engine ({failure.kind.value}): {failure.message}"
    return ApiError(503, message, type="server_error", code="engine_failure", retry_after=failure.retry_after or 1.0)
