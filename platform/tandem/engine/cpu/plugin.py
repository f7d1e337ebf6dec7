"""The SGLang plug-in: what makes DeepSeek-V3-architecture models run on a CPU, beside what Tandem adds on every device.

SGLang finds it by its entry point (`sglang.srt.plugins`) in every environment that Tandem is installed in, so it does
nothing unless it is switched on: the hooks for all devices (`engine/plugin/`) by `TANDEM_ENGINE=1`, those of the CPU
engine by `TANDEM_CPU_ENGINE=1`. SGLang only logs a plug-in or hook that fails; `check_hooks` finds out.
"""

from __future__ import annotations

import os

from tandem.engine.cpu.versions import EngineError
from tandem.engine.plugin import hook, install, progress
from tandem.engine.plugin.hook import Hook

SWITCH = "TANDEM_CPU_ENGINE"


def active() -> bool:
    """Whether this process was asked to be a CPU engine."""
    return os.environ.get(SWITCH) == "1"


def hooks() -> tuple[Hook, ...]:
    """Every hook of the CPU engine."""
    from tandem.engine.cpu import collectives, dispatcher, experts, forward_count, idle, processes, seeds, shared_host

    group = "sglang.srt.distributed.parallel_state.GroupCoordinator"
    managers = "sglang.srt.managers"
    moe = "sglang.srt.layers.moe"
    return (
        Hook(f"{group}.reduce_scatterv", collectives.reduce_scatterv, "around"),
        Hook(f"{group}.all_gatherv", collectives.all_gatherv, "around"),
        Hook(f"{group}.all_to_all_single", collectives.all_to_all_single, "around"),
        Hook(f"{moe}.fused_moe_native.moe_forward_native", experts.moe_forward, "around"),
        Hook(f"{moe}.ep_moe.layer.DeepEPMoE.__init__", experts.use_standard_runner, "after"),
        Hook(f"{moe}.fused_moe_triton.layer.create_moe_dispatcher", dispatcher.create_dispatcher, "around"),
        Hook(f"{managers}.scheduler.Scheduler.init_idle_sleeper", idle.set_alarm, "after"),
        Hook(f"{managers}.scheduler.Scheduler.on_idle", idle.pause_while_pending, "around"),
        Hook(f"{managers}.scheduler.Scheduler.run_batch", forward_count.count_batch, "around"),
        Hook(
            f"{managers}.scheduler_components.idle_sleeper.IdleSleeper.maybe_sleep", idle.sleep_until_called, "around"
        ),
        Hook(
            f"{managers}.data_parallel_controller.DataParallelController.event_loop", idle.wait_for_requests, "around"
        ),
        Hook(
            "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", seeds.keep_seeds, "around"
        ),
        Hook("sglang.srt.layers.sampler.Sampler._sample_from_probs", seeds.sample_by_seed, "around"),
        Hook(f"{managers}.load_snapshot.shm_path_for", processes.load_file, "around"),
        Hook("sglang.srt.entrypoints.engine._set_envs_and_config", processes.fork_children, "after"),
        Hook("sglang.srt.models.deepseek_v2.DeepseekV2DecoderLayer.forward", progress.layer, "before"),
        Hook("sglang.srt.server_args.PortArgs.init_new", shared_host.choose_ports, "around"),
        Hook("sglang.srt.utils.network.wait_port_available", shared_host.wait_for_port, "around"),
    )


def register() -> None:
    """Entry point: called by SGLang's `load_plugins` in every engine process, on every device."""
    install.register()
    if not active():
        return
    from tandem.engine.cpu import attention, nixl_host

    attention.install()
    nixl_host.install()
    hook.register(hooks())


def check_hooks() -> None:
    """Raise `EngineError` unless everything that `register` does on a CPU has taken effect in this process."""
    from tandem.engine.cpu import attention, nixl_host

    missing = hook.missing((*hooks(), *(install.hooks() if install.active() else ())))
    missing += [
        name for name, taken in (("NIXL", nixl_host.installed()), ("MLA attention", attention.installed())) if not taken
    ]
    if missing:
        if broken := hook.broken_import(missing):
            raise EngineError(f"{broken}, so Tandem's hooks did not take: mend the installation")
        raise EngineError(
            f"these hooks of the CPU engine did not take: {', '.join(missing)}. SGLang's log above says why; "
            "the installed SGLang is not the one that Tandem was built for, or another plug-in is in the way."
        )
