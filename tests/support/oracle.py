"""What the fleet is compared with: transformers' own implementation of the architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM


class Oracle:
    """`DeepseekV3ForCausalLM` in float32, on one thread."""

    def __init__(self, model: Path) -> None:
        torch.set_num_threads(1)
        self.model: Any = DeepseekV3ForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def complete(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy continuation."""
        ids, cache, found = torch.tensor([prompt]), None, []
        for _ in range(tokens):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            found.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[found[-1]]])
        return found

    @torch.no_grad()
    def expert_choices(self, ids: list[int]) -> dict[int, torch.Tensor]:
        """Layer → expert ids [len(ids), top-k] that the router chooses for each token of the sequence."""
        chosen: dict[int, torch.Tensor] = {}
        with self._watch_experts(chosen):
            self.model(torch.tensor([ids]), use_cache=False)
        return chosen

    @contextmanager
    def _watch_experts(self, chosen: dict[int, torch.Tensor]) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(self.model.model.layers):
            if hasattr(layer.mlp, "experts"):

                def note(module: Any, args: Any, kwargs: Any, number: int = number) -> None:
                    values = [*args, *kwargs.values()]
                    chosen[number] = next(v for v in values if v.dtype == torch.int64)

                hooks.append(layer.mlp.experts.register_forward_pre_hook(note, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
