"""What a hook is, and the check that all of them took."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Hook(NamedTuple):
    """One function of SGLang, and what is done to it."""

    target: str
    function: Callable[..., Any]
    how: str
    """`before`, `around` or `after`, as in `sglang.srt.plugins.hook_registry.HookType`."""
    needed: bool = True
    """Whether the engine must not start without it."""


def register(hooks: Iterable[Hook]) -> None:
    """Hand hooks to SGLang, which applies those of all plug-ins together, a little later."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType(hook.how))


def missing(hooks: Iterable[Hook]) -> list[str]:
    """Targets of needed hooks that did not take in this process. Of others, SGLang's log tells."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return sorted({hook.target for hook in hooks if hook.needed} - HookRegistry._patched)
