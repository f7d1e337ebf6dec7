"""NIXL for KV pools in host memory, and the count of what it moves.

SGLang names its KV memory VRAM; on the CPU engine the pool is DRAM. NIXL's UCX progress thread polls without pause
(`pthrDelay = 0` is fixed in `nixl_agent`), which is a whole core for each engine, and transfers hang when it is
switched off; so it gets a delay.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

from tandem.engine.cpu.counters import KV_BYTES, KV_TRANSFERS
from tandem.engine.cpu.versions import EngineError

PROGRESS_DELAY_US = int(os.environ.get("TANDEM_NIXL_PROGRESS_DELAY_US", "500"))


def _host(kind: str | None) -> str | None:
    return "DRAM" if kind in ("VRAM", "cuda") else kind


def _config_with_delay(binding: Any) -> type:
    class Config(binding.nixlAgentConfig):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            if name == "pthrDelay":
                value = PROGRESS_DELAY_US
            elif name == "captureTelemetry":
                value = True
            super().__setattr__(name, value)

    return Config


def _host_agent(base: type) -> type:
    class HostAgent(base):  # type: ignore[misc]
        """A `nixl_agent` whose "VRAM" is host memory and that counts the KV bytes it has written.

        What SGLang calls VRAM is exactly its KV pool, so the kind that it asked for tells KV from the small
        metadata transfers.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._kv_lists: set[int] = set()
            self._kv_transfers: set[int] = set()
            super().__init__(*args, **kwargs)

        def register_memory(self, reg_list: Any, mem_type: str | None = None, *args: Any, **kwargs: Any) -> Any:
            return super().register_memory(reg_list, _host(mem_type), *args, **kwargs)

        def get_reg_descs(self, descs: Any, mem_type: str | None = None, *args: Any, **kwargs: Any) -> Any:
            return super().get_reg_descs(descs, _host(mem_type), *args, **kwargs)

        def get_xfer_descs(self, descs: Any, mem_type: str | None = None, *args: Any, **kwargs: Any) -> Any:
            made = super().get_xfer_descs(descs, _host(mem_type), *args, **kwargs)
            if mem_type == "VRAM":
                self._kv_lists.add(id(made))
            return made

        def prep_xfer_dlist(
            self, agent_name: str, xfer_list: Any, mem_type: str | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            made = super().prep_xfer_dlist(agent_name, xfer_list, _host(mem_type), *args, **kwargs)
            if mem_type == "VRAM":
                self._kv_lists.add(id(made))
            return made

        def initialize_xfer(self, operation: str, local_descs: Any, *args: Any, **kwargs: Any) -> Any:
            handle = super().initialize_xfer(operation, local_descs, *args, **kwargs)
            if id(local_descs) in self._kv_lists:
                self._kv_lists.discard(id(local_descs))
                self._kv_transfers.add(id(handle))
            return handle

        def make_prepped_xfer(self, operation: str, local_handle: Any, *args: Any, **kwargs: Any) -> Any:
            handle = super().make_prepped_xfer(operation, local_handle, *args, **kwargs)
            if id(local_handle) in self._kv_lists:
                self._kv_transfers.add(id(handle))
            return handle

        def check_xfer_state(self, handle: Any) -> str:
            state: str = super().check_xfer_state(handle)
            if state == "PROC" or id(handle) not in self._kv_transfers:
                return state
            self._kv_transfers.discard(id(handle))
            if state == "DONE":
                KV_BYTES.inc(self.get_xfer_telemetry(handle).totalBytes)
                KV_TRANSFERS.inc()
            return state

    return HostAgent


def install() -> None:
    """Replace `nixl._api.nixl_agent` in this process. Raises `EngineError` if NIXL looks different than expected."""
    import nixl._api as api

    base = api.nixl_agent
    home = sys.modules[base.__module__]
    binding = getattr(home, "nixlBind", None)
    if binding is None or not hasattr(binding, "nixlAgentConfig"):
        raise EngineError(f"NIXL's {home.__name__} has no nixlBind.nixlAgentConfig to give a progress delay to")
    names = {name: getattr(binding, name) for name in dir(binding) if not name.startswith("__")}
    home.nixlBind = SimpleNamespace(**{**names, "nixlAgentConfig": _config_with_delay(binding)})  # type: ignore[attr-defined]
    api.nixl_agent = _host_agent(base)


def installed() -> bool:
    """Whether agents made from now on are host agents."""
    import nixl._api as api

    return bool(api.nixl_agent.__name__ == "HostAgent")
