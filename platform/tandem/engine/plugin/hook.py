"""What a hook is, and the check that all of them took."""

from __future__ import annotations

import importlib
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


def broken_import(targets: Iterable[str]) -> str:
    """The error at the bottom of the first import of a target's module that fails, with the module's name; empty if all
    of them can be imported. SGLang looks targets up by `pkgutil.resolve_name`, which hides such errors: its log only
    says that a package has no such attribute."""
    for target in targets:
        name = ""
        for part in target.split("."):
            name = f"{name}.{part}".lstrip(".")
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001 - whatever a library raises while it is imported
                if isinstance(error, ModuleNotFoundError) and error.name == name:
                    break  # a class or a function of the module before it
                bottom = _bottom(error)
                return f"{name} cannot be imported: {type(bottom).__name__}: {bottom}"
    return ""


def _bottom(error: BaseException) -> BaseException:
    """What an error was raised from in the end."""
    seen = {id(error)}
    while (below := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        if id(below) in seen or not (error.__cause__ or isinstance(below, ImportError)):
            break
        seen.add(id(below))
        error = below
    return error
