"""Text to token ids, once per request, with the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from tandem.gateway.api.tools import ToolFormat, format_of, instructions
from tandem.gateway.text.chat_template import ChatTemplate, load_template, token_text
from tandem.gateway.text.fast_encode import FastEncoder
from tandem.gateway.text.model_card import ModelError, read_json
from tandem.gateway.text.reasoning import END, START


class ChatPrompt(NamedTuple):
    """A conversation, ready for the engine."""

    ids: list[int]
    thinking: bool
    """The template has opened `<think>`: the answer begins as reasoning."""


class Tokenizer:
    """Encodes prompts. Safe to use from several threads; the heavy part runs without the GIL."""

    def __init__(self, inner: tokenizers.Tokenizer, template: ChatTemplate | None, bos: str = "") -> None:
        """`bos`: the token to begin a plain prompt with, where the tokenizer does not do it by itself."""
        self.inner = inner
        self._encoder = FastEncoder(inner)
        self._template = template
        self._bos = inner.token_to_id(bos) if bos else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a checkpoint folder; raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{path} is missing: the gateway needs a tokenizer of the `tokenizers` library")
        inner = tokenizers.Tokenizer.from_file(str(path))
        inner.no_truncation()
        inner.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        bos = token_text(config.get("bos_token")) if config.get("add_bos_token") else ""
        return cls(inner, load_template(folder), bos)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the special tokens that the model wants around one."""
        ids = self._encode(text, special=True)
        if self._bos is not None and ids[:1] != [self._bos]:
            # LlamaTokenizerFast, R1's class, adds it although tokenizer.json does not say so.
            ids.insert(0, self._bos)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens by their names."""
        return self.inner.decode(list(ids), skip_special_tokens=False)

    @property
    def tool_format(self) -> ToolFormat:
        """How the model calls tools, by its template."""
        return ToolFormat.R1 if self._template is None else format_of(self._template.source)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        thinking: bool | None = None,
        prefix: bool = False,
    ) -> ChatPrompt:
        """A conversation through the model's template. Raises TemplateRefusal, ModelError.

        Args:
            thinking: whether the answer is to begin with reasoning; None = as the template has it.
            prefix: the last message is the beginning of the answer.
        """
        if self._template is None:
            raise ModelError("the model has no chat template: use /v1/completions")
        begun = messages[-1] if prefix else None
        if tools and not self._template.lists_tools:
            messages = [{"role": "system", "content": instructions(tools, self.tool_format)}, *messages]
        text = self._template.render(messages[:-1] if prefix else messages, tools or None, thinking=thinking)
        opened = text.rstrip().endswith(START)
        if begun is not None:
            text, opened = _begin(text, opened, begun)
        elif opened and thinking is False:
            # A template that always opens the reasoning: it is closed at once.
            text, opened = f"{text.rstrip()}\n\n{END}\n\n", False
        return ChatPrompt(self._encode(text, special=False), opened)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return self._encoder.encode(text, special=special)


def _begin(text: str, opened: bool, message: Mapping[str, Any]) -> tuple[str, bool]:
    """The prompt with the beginning of the answer, and whether that ends inside the reasoning.

    With `reasoning_content` alone the reasoning goes on. With `content` the reasoning is over: it is what the message
    says of it, or none.
    """
    reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
    if not opened:
        return text + content, False
    if reasoning and not content:
        return text + reasoning, True
    return f"{text}{reasoning}\n{END}\n\n{content}", False
