"""The fields of a request that steer sampling, and those that are harmless: one table that says what each may be.

A field that is in no table is unknown (400); one in REFUSED would change the answer and is answered with a 400 that
names it, unless it has the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from tandem.core.tenants import Priority
from tandem.gateway.errors import ApiError, bad_value, unsupported

Check = Callable[[str, Any], Any]
"""(field, value) → the value to use; raises ApiError."""

MAX_STOPS = 16
MAX_BIASES = 1024
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


def one_of(*allowed: str) -> Check:
    def check(param: str, value: Any) -> str:
        if text(param, value) not in allowed:
            names = ", ".join(f"'{name}'" for name in allowed)
            raise bad_value(param, f"Invalid value for '{param}': '{value!s:.40}'. Supported values are: {names}.")
        return str(value)

    return check


def object_of(param: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    return value


def flag(body: Mapping[str, Any], field: str, *, where: str = "", default: bool = False) -> bool:
    """A boolean field that may be left out."""
    value = body.get(field)
    return default if value is None else boolean(where + field, value)


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


def token_ids(param: str, value: Any) -> list[int]:
    """At most 1,024 ids; that they are in the vocabulary is not checked."""
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise wrong_type(param, "an array of token ids", value)
    if len(value) > MAX_BIASES:
        raise bad_value(param, f"'{param}' has {len(value)} ids; the most is {MAX_BIASES}.", "array_above_max_length")
    return value


def metadata(param: str, value: Any) -> dict[str, str]:
    """OpenAI's bounds: 16 pairs, keys of 64 and values of 512 characters."""
    pairs = object_of(param, value)
    if len(pairs) > 16:
        message = f"'{param}' has {len(pairs)} pairs; the most is 16."
        raise bad_value(param, message, "object_above_max_properties")
    for key, one in pairs.items():
        if len(key) > 64:
            raise bad_value(param, f"A key of '{param}' is longer than 64 characters.", "string_above_max_length")
        if len(text(f"{param}.{key}", one)) > 512:
            message = f"'{param}.{key}' is longer than 512 characters."
            raise bad_value(f"{param}.{key}", message, "string_above_max_length")
    return pairs


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
    "stop_token_ids": ("stop_token_ids", token_ids),
}
"""API field → (SGLang's name in `sampling_params`, what it may be)."""

HARMLESS: dict[str, Check] = {
    "safety_identifier": text,
    "store": boolean,
    "prompt_cache_retention": text,
    "include_obfuscation": boolean,
}
"""Accepted, and without effect on the answer."""

REFUSED: dict[str, Collection[Any]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "prompt_logprobs": (0, False),
}
"""Field → the values (beside null) that ask for nothing. Any other is refused for now."""

_WHY = {
    "functions": "use 'tools'",
    "function_call": "use 'tool_choice'",
    "suffix": "this model continues text, it does not fill in",
    "modalities": "this model writes text only",
    "audio": "this model writes text only",
    "min_tokens": "prefill and decode count an answer's tokens apart, so the engine cannot hold it exactly",
}

_TIERS: dict[str, Priority | None] = {
    "auto": None,
    "default": None,
    "priority": Priority.HIGH,
    "flex": Priority.LOW,
}


def sampling_params(body: Mapping[str, Any], defaults: Mapping[str, float], vocab_size: int) -> dict[str, Any]:
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
    if (biases := body.get("logit_bias")) is not None and (found := _biases(biases, vocab_size)):
        params["logit_bias"] = found
    return params


def priority(body: Mapping[str, Any]) -> Priority | None:
    """The class that `priority` or `service_tier` asks for; None = the tenant's own. Raises ApiError."""
    tier = body.get("service_tier")
    if tier is not None:
        tier = one_of(*_TIERS)("service_tier", tier)
    value = body.get("priority")
    if value is None:
        return None if tier is None else _TIERS[tier]
    if isinstance(value, str):
        return Priority(one_of(*Priority)("priority", value))
    # As vLLM has it: lower goes first.
    level = integer(-(2**31), 2**31 - 1)("priority", value)
    return Priority.HIGH if level < 0 else Priority.LOW if level > 0 else Priority.NORMAL


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
                raise unsupported(field, _WHY.get(field, ""))
        else:
            raise ApiError(400, f"Unknown parameter: '{field:.80}'.", param=field[:80], code="unknown_parameter")


def _biases(value: Any, vocab_size: int) -> dict[str, float]:
    biases = object_of("logit_bias", value)
    if len(biases) > MAX_BIASES:
        message = f"'logit_bias' has {len(biases)} tokens; the most is {MAX_BIASES}."
        raise bad_value("logit_bias", message, "object_above_max_properties")
    found: dict[str, float] = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
            message = f"A key of 'logit_bias' is {token!r:.40}; it must be a token id from 0 to {vocab_size - 1}."
            raise bad_value("logit_bias", message)
        found[str(int(token))] = number(-100, 100)(f"logit_bias.{token}", bias)
    return found


def _out_of_range(param: str, value: object, wanted: str, code: str) -> ApiError:
    message = f"Invalid value for '{param}': expected a value {wanted}, but got {value!s:.40} instead."
    return bad_value(param, message, code)


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string", list: "an array"}
    return names.get(type(value), "an object")
