"""The CPU plug-in switches itself on only when asked, and an engine whose hooks fail does not start."""

from __future__ import annotations

import os
import subprocess
import sys

from tandem.engine.cpu.launch_server import ENVIRONMENT

PATCHED = "from sglang.srt.plugins.hook_registry import HookRegistry; print(len(HookRegistry._patched))"
TARGETS = "from tandem.engine.plugin import install; print(len({hook.target for hook in SETS}))"
GPU = "from tandem.engine.cpu import standins; standins.install(); from sglang.srt.plugins import load_plugins; "
"""What SGLang does by itself on a GPU, with what it cannot do without on this machine."""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=100
    )


def test_every_hook_takes_on_the_pinned_engine() -> None:
    done = python(
        "from tandem.engine.cpu import launch_server, plugin; launch_server.prepare(); "
        f"{PATCHED}; {TARGETS.replace('SETS', '(*plugin.hooks(), *install.hooks())')}",
        **ENVIRONMENT,
    )
    applied, registered = done.stdout.split()[-2:]
    assert applied == registered, done.stderr


def test_on_a_gpu_the_hooks_for_all_devices_take_and_no_other() -> None:
    done = python(f"{GPU}load_plugins(); {PATCHED}; {TARGETS.replace('SETS', 'install.hooks()')}", TANDEM_ENGINE="1")
    applied, registered = done.stdout.split()[-2:]
    assert applied == registered, done.stderr


def test_on_a_gpu_too_a_hook_that_does_not_take_ends_the_process_with_one_sentence() -> None:
    breaking = (
        f"{GPU}from tandem.engine.plugin import install; real = install.hooks; "
        "gone = install.Hook('sglang.srt.managers.scheduler.Scheduler.gone', print, 'after'); "
        "install.hooks = lambda: (*real(), gone); load_plugins(); print('it goes on')"
    )
    done = python(breaking, TANDEM_ENGINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tandem: these hooks of Tandem did not take: sglang.srt.managers.scheduler.Scheduler.gone.")


def test_without_the_switch_nothing_is_hooked() -> None:
    done = python(
        "from tandem.engine.cpu import plugin; plugin.register(); "
        "import sys; assert not any(name.startswith('sglang') for name in sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_a_hook_that_does_not_take_stops_the_engine_with_one_sentence() -> None:
    breaking = (
        "import sys; from tandem.engine.cpu import launch_server, plugin; real = plugin.hooks; "
        "plugin.hooks = lambda: (*real(), "
        "plugin.Hook('sglang.srt.managers.scheduler.Scheduler.gone', print, 'after')); "
        "launch_server.main()"
    )
    done = python(breaking)
    assert done.returncode == 1
    assert "these hooks of the CPU engine did not take: sglang.srt.managers.scheduler.Scheduler.gone" in done.stderr


def test_an_unknown_version_stops_the_engine_before_it_imports_anything() -> None:
    done = python(
        "from tandem.engine.cpu import launch_server, versions; versions.KNOWN['sglang'] = '0'; launch_server.main()"
    )
    assert done.returncode == 1
    assert "tandem: the CPU engine does not know these versions: sglang is 0.5.23 (needs 0)" in done.stderr
