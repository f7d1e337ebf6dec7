"""The CPU plug-in switches itself on only when asked, and an engine whose hooks fail does not start."""

from __future__ import annotations

import os
import subprocess
import sys

from tandem.engine.cpu.launch_server import ENVIRONMENT

PATCHED = "from sglang.srt.plugins.hook_registry import HookRegistry; print(len(HookRegistry._patched))"


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=100
    )


def test_every_hook_takes_on_the_pinned_engine() -> None:
    done = python(
        "from tandem.engine.cpu import launch_server, plugin; launch_server.prepare(); "
        f"{PATCHED}; print(len(plugin.hooks()))",
        **ENVIRONMENT,
    )
    applied, registered = done.stdout.split()[-2:]
    assert applied == registered, done.stderr


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
