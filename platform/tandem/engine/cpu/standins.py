"""Import-time stand-ins for `triton`, `torchvision` and `sgl_kernel`.

SGLang imports all three unconditionally, and none has a usable CPU build. The CPU path decorates functions with
triton and names classes of torchvision, but runs none of their code; what it does call of `sgl_kernel` is in
`kernels.py`. A package that is really installed is left alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tandem.engine.cpu.versions import EngineError

STANDINS = ("triton", "torchvision", "sgl_kernel")


class _Anything:
    """Base of every stand-in class: takes any arguments, does nothing."""

    def __init_subclass__(cls, **_: object) -> None:
        super().__init_subclass__()

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args, self.kwargs = args, kwargs


class StandIn(ModuleType):
    """A module whose attributes appear when named: classes if capitalised, else further stand-ins.

    Called as a decorator it returns the function unchanged. Launching a "kernel" (`kernel[grid](…)`) raises.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        found: Any = sys.modules.get(full)
        if found is None:
            if name[:1].isupper():
                found = type(name, (_Anything,), {"__module__": self.__name__})
            else:
                found = StandIn(full)
                found.__path__ = []
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function

    def __bool__(self) -> bool:
        return False

    def __getitem__(self, grid: object) -> Any:
        raise EngineError(f"{self.__name__} is a stand-in: the CPU path must not launch this kernel")


class _Constexpr:
    def __init__(self, value: object = None) -> None:
        self.value = value


def _fill(module: StandIn) -> None:
    if module.__name__ == "triton":
        vars(module).update(
            __version__="3.6.0",
            cdiv=lambda a, b: -(a // -b),
            next_power_of_2=lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
        )
    elif module.__name__ == "triton.language":
        vars(module)["constexpr"] = _Constexpr
    elif module.__name__ == "torchvision":
        vars(module)["__version__"] = "0.28.0"
    elif module.__name__ == "sgl_kernel":
        from tandem.engine.cpu import kernels

        vars(module).update({name: getattr(kernels, name) for name in kernels.__all__})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = frozenset(roots)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.roots:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, StandIn)
        _fill(module)


def install() -> tuple[str, ...]:
    """Put stand-ins on the import path for what is missing; return their names.

    transformers decides once, and remembers, whether torchvision is there. It is asked before the stand-in exists,
    so it keeps to its torchvision-free code.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return ()
    missing = tuple(name for name in STANDINS if importlib.util.find_spec(name) is None)
    if "torchvision" in missing:
        from transformers.utils import import_utils

        import_utils.is_torchvision_available()
        import_utils.is_torchvision_v2_available()
    sys.meta_path.append(_Finder(missing))
    if "torchvision" in missing and import_utils.is_torchvision_available():
        raise EngineError("transformers took the torchvision stand-in for the real one; its version is not known")
    return missing
