"""The fields of a request that steer sampling, and those that are harmless: one table that says what each may be.

A field that is in no table is unknown (400); one in REFUSED would change the answer and is answered with a 400 that
names it, unless it has the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from tandem.gateway.errors import ApiError, bad_value, unsupported

Check = Callable[[str, Any], Any]
"""(field, value) → the value to use; raises ApiError."""

MAX_STOPS = 16
INT64 = 2**63


def wrong_type(param: str, wanted: str, value: object) -> ApiError:
    message = f"Invalid type for '{param}': expected {wanted}, but got {_type_name(value)} instead."
    return bad_value(param, message, "invalid_type")


def number(low: float, high: float, *, above_low: bool = False) -> Check:
    """A number from `low` to `high`; `above_low` leaves `low` itself out."""

    def check(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(param, "a number", value)
        # Compared before anything else: an integer of 500 digits has no float.
        if value > high or value != value:
            raise _out_of_range(param, value, f"<= {high:g}", "decimal_above_max_value")
        if value < low or (above_low and value == low):
            raise _out_of_range(param, value, f"{'>' if above_low else '>='} {low:g}", "decimal_below_min_value")
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    def check(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(param, "an integer", value)
        if value > high:
            raise _out_of_range(param, value, f"<= {high}", "integer_above_max_value")
        if value < low:
            raise _out_of_range(param, value, f">= {low}", "integer_below_min_value")
        return value

    return check


def boolean(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(param, "a boolean", value)
    return value


def text(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    return value


def anything(param: str, value: Any) -> Any:
    return value


def stop_strings(param: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong_type(param, "a string or a list of strings", value)
    if len(stops) > MAX_STOPS:
        message = f"'{param}' has {len(stops)} strings; the most is {MAX_STOPS}."
        raise bad_value(param, message, "array_above_max_length")
    if not all(stops):
        raise bad_value(param, f"'{param}' must not hold an empty string.", "empty_string")
    return tuple(dict.fromkeys(stops))


SAMPLING: dict[str, tuple[str, Check]] = {
    "temperature": ("temperature", number(0, 2)),
    "top_p": ("top_p", number(0, 1)),
    "top_k": ("top_k", integer(-1, 2**31 - 1)),
    "min_p": ("min_p", number(0, 1)),
    "frequency_penalty": ("frequency_penalty", number(-2, 2)),
    "presence_penalty": ("presence_penalty", number(-2, 2)),
    "repetition_penalty": ("repetition_penalty", number(0, 2, above_low=True)),
    "seed": ("sampling_seed", integer(-INT64, INT64 - 1)),
    "ignore_eos": ("ignore_eos", boolean),
}
"""API field → (SGLang's name in `sampling_params`, what it may be)."""

HARMLESS: dict[str, Check] = {
    "user": text,
    "metadata": anything,
    "safety_identifier": text,
    "prompt_cache_key": text,
    "store": anything,
    "service_tier": text,
    "parallel_tool_calls": boolean,
}
"""Accepted, and without effect on the answer."""

REFUSED: dict[str, Collection[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Field → the values (beside null) that ask for nothing. Any other is refused for now."""


def sampling_params(body: Mapping[str, Any], defaults: Mapping[str, float]) -> dict[str, Any]:
    """SGLang's `sampling_params` for what the request says, over the model's own defaults. Raises ApiError."""
    params: dict[str, Any] = dict(defaults)
    if "top_k" in params:
        params["top_k"] = int(params["top_k"])
    for field, (name, check) in SAMPLING.items():
        if (value := body.get(field)) is not None:
            params[name] = check(field, value)
    if params.get("top_k") == 0:
        params["top_k"] = -1
    if params.get("top_p") == 0:
        # SGLang wants more than 0; nothing but the likeliest token is what it means.
        params["top_p"], params["top_k"] = 1.0, 1
    return params


def check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse what is unknown or would be silently ignored; `known` are the endpoint's own fields. Raises ApiError."""
    for field, value in body.items():
        if field in known or field in SAMPLING:
            continue
        if field in HARMLESS:
            if value is not None:
                HARMLESS[field](field, value)
        elif field in REFUSED:
            if value is not None and not any(type(value) is type(ok) and value == ok for ok in REFUSED[field]):
                raise unsupported(field, "only n = 1 is" if field == "n" else "")
        else:
            raise ApiError(400, f"Unknown parameter: '{field}'.", param=field, code="unknown_parameter")


def _out_of_range(param: str, value: object, wanted: str, code: str) -> ApiError:
    message = f"Invalid value for '{param}': expected a value {wanted}, but got {value!s:.40} instead."
    return bad_value(param, message, code)


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string", list: "an array"}
    return names.get(type(value), "an object")
