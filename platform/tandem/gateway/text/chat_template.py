"""A model's chat template, rendered as Hugging Face's transformers renders it, without importing transformers.

Same sandbox, same options (trim_blocks, lstrip_blocks), same names: `messages`, `tools`, `add_generation_prompt`, the
special tokens (`bos_token`, …), `raise_exception`, `strftime_now`, and `tojson` without HTML escapes.
See `transformers/utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from tandem.gateway.text.model_card import ModelError, read_json


class TemplateRefusal(ValueError):
    """The template does not accept this conversation; the message is the template's own."""


class ChatTemplate:
    """A compiled chat template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)
        self.lists_tools = "tools" in names
        """Whether it has a place for `tools`; R1's own has none."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, thinking: bool | None = None
    ) -> str:
        """The prompt's text, with the opening of the assistant's answer. Raises TemplateRefusal.

        `thinking`: for templates of models that can do both; None = as the template has it by itself.
        """
        # V3.1 asks for the one name, Qwen and others for the other.
        mode = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                **mode,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise TemplateRefusal(str(error)) from error


def load_template(folder: Path) -> ChatTemplate | None:
    """The template of a checkpoint: `chat_template.jinja`, or in `tokenizer_config.json`; None if it has none."""
    config = read_json(folder / "tokenizer_config.json")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    tokens = {key: text for key, value in config.items() if key.endswith("_token") and (text := token_text(value))}
    return ChatTemplate(source, tokens)


def token_text(value: object) -> str:
    """A special token as `tokenizer_config.json` writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
