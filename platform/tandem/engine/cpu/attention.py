"""MLA attention on SGLang's `torch_native` backend."""

from __future__ import annotations

from typing import Any


def _absorbed(attention: Any, forward_batch: Any) -> Any:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    return AttnForwardMethod.MLA


def install() -> None:
    """Make `torch_native` read K and V from the latent pool, which needs MLA in its absorbed form.

    Also names two functions on `torch.cpu` that `torch.cuda` has and SGLang calls on whatever the device is, and
    gives padded rows of DP attention a sequence length that is not zero.
    """
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    AttentionBackendRegistry.register("torch_native", _absorbed)
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
    for name, answer in (("is_current_stream_capturing", False), ("empty_cache", None)):
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda answer=answer: answer)


def installed() -> bool:
    """Whether MLA layers of this process run absorbed."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    return AttentionBackendRegistry.get_handler("torch_native") is _absorbed
