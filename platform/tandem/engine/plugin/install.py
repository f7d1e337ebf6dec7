"""Which hooks Tandem has in SGLang on every device, and how they are put in.

SGLang only logs a plug-in or hook that fails, and would serve without it: requests would lose their past, hangs would
go unnoticed. So the process ends instead, with one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata

from tandem.engine.plugin import bootstrap, compiling, grammars, hook, penalties, progress, reap, word
from tandem.engine.plugin.hook import Hook

SWITCH = "TANDEM_ENGINE"
CPU_SWITCH = "TANDEM_CPU_ENGINE"
"""Also set for a CPU engine (`engine/cpu/plugin.py`): it compiles nothing, and need not import what does."""
KNOWN_SGLANG = "0.5.23"


class PluginError(RuntimeError):
    """The engine must not start; the message says why and what to do."""


def active() -> bool:
    """Whether this process belongs to an engine that Tandem has started."""
    return os.environ.get(SWITCH) == "1"


def hooks() -> tuple[Hook, ...]:
    """Every hook of this engine, but for those of the CPU engine."""
    return everywhere() if os.environ.get(CPU_SWITCH) == "1" else (*everywhere(), *compiling.hooks())


def everywhere() -> tuple[Hook, ...]:
    """Every hook for all devices."""
    managers = "sglang.srt.managers"
    scheduler = f"{managers}.scheduler.Scheduler"
    detokenizer = f"{managers}.detokenizer_manager.DetokenizerManager"
    tokenizer = f"{managers}.tokenizer_manager.TokenizerManager"
    disaggregation = "sglang.srt.disaggregation"
    grammar = "sglang.srt.constrained.grammar_manager.GrammarManager"
    return (
        Hook(
            "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
            penalties.count_history,
            "after",
        ),
        Hook(f"{managers}.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens", penalties.count_new, "around"),
        Hook(f"{scheduler}._forward_isolation", penalties.count_in_flight, "around"),
        Hook(f"{grammar}.process_req_with_grammar", grammars.read_at_once, "around"),
        Hook(f"{grammar}.get_ready_grammar_requests", grammars.read_when_compiled, "after"),
        Hook(
            f"{disaggregation}.decode_schedule_batch_mixin.ScheduleBatchDisaggregationDecodeMixin.process_prebuilt",
            grammars.before_prefills_token,
            "before",
        ),
        Hook(f"{tokenizer}.abort_request", reap.abort, "around"),
        Hook(f"{tokenizer}.auto_create_handle_loop", progress.serving, "after"),
        Hook(f"{scheduler}.ingest_requests", progress.turn, "before"),
        Hook(f"{scheduler}.ingest_requests", bootstrap.turn, "before"),
        Hook(f"{scheduler}.process_input_requests", progress.control, "before"),
        Hook(f"{scheduler}.run_batch", progress.forward, "before"),
        Hook(f"{scheduler}.run_batch", progress.forwarded, "after"),
        Hook(f"{scheduler}.on_idle", progress.idle, "before"),
        Hook(f"{disaggregation}.decode.DecodePreallocQueue._ensure_prefill_info", bootstrap.ensure, "around"),
        Hook(f"{disaggregation}.common.conn.CommonKVManager.try_ensure_parallel_info", bootstrap.try_ensure, "around"),
        Hook(
            f"{disaggregation}.common.conn.CommonKVReceiver._get_bootstrap_info_from_server",
            bootstrap.fetch,
            "around",
        ),
        Hook(f"{disaggregation}.common.conn._get_bootstrap_session", bootstrap.hasten, "after"),
        Hook(
            f"{disaggregation}.prefill.SchedulerDisaggregationPrefillMixin.process_disagg_prefill_inflight_queue",
            word.wait,
            "before",
        ),
        Hook(f"{detokenizer}.__init__", progress.detokenizer_starts, "after"),
        Hook(f"{detokenizer}.handle_batch_token_id_out", progress.detokenizing, "before"),
        Hook(f"{detokenizer}.handle_batch_token_id_out", progress.detokenized, "after"),
    )


def check_sglang(installed: Callable[[str], str] = metadata.version) -> None:
    """Raise `PluginError` unless SGLang is the one that the hooks know; a local part such as `+cu130` is ignored."""
    found = installed("sglang")
    if found.split("+")[0] != KNOWN_SGLANG:
        raise PluginError(
            f"SGLang is {found}, but Tandem's hooks know only {KNOWN_SGLANG}: install sglang=={KNOWN_SGLANG}"
        )


def register() -> None:
    """Put the hooks in, or end the process; does nothing unless this is one of Tandem's engines.

    SGLang calls plug-ins inside `except Exception`, and applies all hooks afterwards.
    """
    if not active():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    apply = HookRegistry.apply_hooks

    def apply_and_check() -> None:
        apply()
        _or_exit(check_hooks)

    _or_exit(check_sglang)
    hook.register(hooks())
    HookRegistry.apply_hooks = staticmethod(apply_and_check)


def check_hooks() -> None:
    """Raise `PluginError` unless every hook has taken effect in this process."""
    if missing := hook.missing(hooks()):
        if broken := hook.broken_import(missing):
            raise PluginError(f"{broken}, so Tandem's hooks did not take: mend the installation")
        raise PluginError(
            f"these hooks of Tandem did not take: {', '.join(missing)}. SGLang's log above says why; "
            "another plug-in may be in the way."
        )


def _or_exit(check: Callable[[], None]) -> None:
    try:
        check()
    except PluginError as error:
        raise SystemExit(f"tandem: {error}") from error
