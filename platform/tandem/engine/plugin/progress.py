"""Where in SGLang a process makes progress (see `engine/heartbeat.py`).

A scheduler writes at every turn of its event loop, whichever of SGLang's loops that is, and around each forward pass.
Idle schedulers come back by themselves: on GPUs SGLang's loops never sleep, ours on the CPU sleep at most a second.
The detokenizer, which sleeps until it is given work, writes when that begins and ends. The main process of the leader
writes every second from the event loop that serves HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tandem.core.heartbeat import Doing
from tandem.engine.heartbeat import Pulse, open_pulse

PULSE = "_tandem_pulse"
"""Attribute of SGLang's objects that holds theirs."""

SLOW = (
    "UpdateWeight",
    "InitWeights",
    "SendWeights",
    "BeginWeightUpdate",
    "EndWeightUpdate",
    "CheckWeights",
    "UpdateExpertBackup",
    "BackupDram",
    "ReleaseMemory",
    "ResumeMemory",
    "FlushCache",
    "ClearHiCache",
    "AttachHiCache",
    "DetachHiCache",
    "PdRoleSwitch",
    "ScaleElastic",
    "ElasticScale",
    "LoadLoRA",
    "Profile",
    "RpcReq",
)
"""What the names of requests begin with that may keep a scheduler busy for minutes (`managers/io_struct.py`)."""

_SERVING_S = 1.0

_scheduler: Pulse | None = None
"""This process's, if it is a scheduler; layers do not know theirs."""


def turn(self: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler.ingest_requests`, with which every turn of every event loop begins."""
    global _scheduler
    if not hasattr(self, PULSE):
        _scheduler = open_pulse(_scheduler_name(), patient=self.server_args.device != "cpu")
        setattr(self, PULSE, _scheduler)
    if pulse := _pulse(self):
        pulse.turn()


def control(self: Any, requests: Sequence[Any], *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler.process_input_requests`."""
    if requests and (pulse := _pulse(self)) and any(type(one).__name__.startswith(SLOW) for one in requests):
        pulse.control()


def forward(self: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler.run_batch`."""
    if pulse := _pulse(self):
        pulse.forward()


def forwarded(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler.run_batch`."""
    if pulse := _pulse(self):
        pulse.forwarded()


def layer(self: Any, *args: Any, **kwargs: Any) -> None:
    """Before `DeepseekV2DecoderLayer.forward`, on a CPU: there, 2,048 tokens of prefill take seconds."""
    if _scheduler is not None:
        _scheduler.layer()


def slowly() -> AbstractContextManager[None]:
    """Around a part of this process's turn that may take minutes."""
    return _scheduler.slowly() if _scheduler is not None else nullcontext()


def idle(self: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler.on_idle`."""
    if pulse := _pulse(self):
        pulse.now(Doing.IDLE)


def detokenizer_starts(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """After `DetokenizerManager.__init__`."""
    pulse = open_pulse("detokenizer")
    setattr(self, PULSE, pulse)
    if pulse is not None:
        pulse.now(Doing.WAITING)


def detokenizing(self: Any, *args: Any, **kwargs: Any) -> None:
    """Before `DetokenizerManager.handle_batch_token_id_out`."""
    if pulse := _pulse(self):
        pulse.now(Doing.WORKING)


def detokenized(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """After the same."""
    if pulse := _pulse(self):
        pulse.now(Doing.WAITING)


def serving(result: None, self: Any) -> None:
    """After `TokenizerManager.auto_create_handle_loop`, which the first request calls, and each later one too."""
    if not hasattr(self, PULSE):
        pulse = open_pulse("HTTP server")
        setattr(self, PULSE, pulse)
        if pulse is not None:
            self.asyncio_tasks.add(self.event_loop.create_task(_serve(pulse)))


async def _serve(pulse: Pulse) -> None:
    """Runs as long as the server: there is no event for "the event loop still runs"."""
    while True:
        pulse.now(Doing.WORKING)
        await asyncio.sleep(_SERVING_S)


def _pulse(owner: Any) -> Pulse | None:
    pulse: Pulse | None = getattr(owner, PULSE, None)
    return pulse


def _scheduler_name() -> str:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    name = f"scheduler DP {parallel.attn_dp_rank}"
    if parallel.attn_tp_size > 1:
        name += f" TP {parallel.attn_tp_rank}"
    return name if parallel.pp_size == 1 else f"{name} PP {parallel.pp_rank}"
