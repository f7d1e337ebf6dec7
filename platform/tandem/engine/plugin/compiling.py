"""Where in SGLang a scheduler may be busy for minutes in the middle of a turn, on GPUs.

Kernels are compiled when they are first needed: DeepGEMM's for a new kind of matrix (10 to 20 minutes, says SGLang),
its own at their first use. Both do so under a file lock, so that one rank of a machine compiles and the others wait:
whoever is at that lock has minutes. FlashInfer's are not marked; their compilers are seen by their CPU time.
Rebalancing experts (EPLB) copies weights between all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tandem.engine.plugin.hook import Hook
from tandem.engine.plugin.progress import slowly


def hooks() -> tuple[Hook, ...]:
    """An engine runs without them too, but one that compiles for long may then look hung."""
    return (
        Hook(
            "sglang.srt.layers.deep_gemm_wrapper.compile_utils._local_rank_compile_lock",
            under_lock,
            "around",
            needed=False,
        ),
        Hook("sglang.kernels.jit.utils.compile.loader._build_lock", under_lock, "around", needed=False),
        Hook("sglang.srt.eplb.eplb_manager.EPLBManager.rebalance", rebalance, "around", needed=False),
    )


@contextmanager
def under_lock(original: Callable[..., AbstractContextManager[None]], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Around the function that makes the context in which one process at a time compiles."""
    with slowly(), original(*args, **kwargs):
        yield


def rebalance(original: Callable[..., Iterator[None]], self: Any) -> Iterator[None]:
    """Around `EPLBManager.rebalance`, a generator that goes on a little with each forward pass."""
    steps = original(self)
    while True:
        with slowly():
            if next(steps, _END) is _END:
                return
        yield


_END = object()
