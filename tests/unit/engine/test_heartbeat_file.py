"""What a process writes about its progress, its watcher reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tandem.core.heartbeat import Beat, Doing, Limits
from tandem.engine import heartbeat
from tandem.engine.heartbeat import Pulse, open_pulse, read_beats
from tandem.fleet.engine_health import ProgressCheck


def beat(folder: Path) -> Beat:
    return read_beats(folder)[os.getpid()]


def test_a_turn_with_a_forward_pass_is_read_as_it_was_written(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "scheduler DP 3")
    pulse.turn()
    pulse.forward()
    assert beat(tmp_path) == Beat(who="scheduler DP 3", moves=2, doing=Doing.FORWARD, turns=1, forwards=1)


@pytest.mark.parametrize("step", ["turn", "forward", "layer", "forwarded", "control"])
def test_every_step_is_progress(tmp_path: Path, step: str) -> None:
    pulse = Pulse(tmp_path, "one")
    before = beat(tmp_path).moves
    getattr(pulse, step)()
    assert beat(tmp_path).moves == before + 1


def test_a_layer_does_not_change_what_it_is_about(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "one")
    pulse.forward()
    pulse.layer()
    assert beat(tmp_path).doing is Doing.FORWARD


def patience(folder: Path, pulse: Pulse, turns: int) -> list[bool]:
    found = []
    for _ in range(turns):
        pulse.turn()
        found.append(beat(folder).patient)
    return found


def test_after_a_control_request_there_is_patience_for_a_few_turns(tmp_path: Path) -> None:
    """Other ranks may still be at it, and this one waits for them."""
    pulse = Pulse(tmp_path, "one")
    pulse.control()
    assert beat(tmp_path).patient
    assert patience(tmp_path, pulse, 4) == [True, True, False, False]


def test_on_a_gpu_there_is_patience_until_the_first_forward_pass_is_over(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "one", patient=True)
    assert patience(tmp_path, pulse, 5) == [True] * 5
    pulse.forward()
    pulse.forwarded()
    assert patience(tmp_path, pulse, 4) == [True, True, False, False]


def test_a_control_request_before_the_first_forward_pass_does_not_end_the_patience(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "one", patient=True)
    pulse.control()
    assert patience(tmp_path, pulse, 5) == [True] * 5


def test_a_slow_part_of_a_forward_pass_has_patience_and_then_the_pass_goes_on(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "one")
    pulse.turn()
    pulse.forward()
    with pulse.slowly():
        within = beat(tmp_path)
    assert (within.doing, within.patient, beat(tmp_path).doing) == (Doing.CONTROL, True, Doing.FORWARD)
    assert patience(tmp_path, pulse, 4) == [True, True, False, False]


def test_a_slow_part_that_fails_ends_too(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "one")
    pulse.forward()
    with pytest.raises(RuntimeError), pulse.slowly():
        raise RuntimeError("nvcc failed")
    assert beat(tmp_path).doing is Doing.FORWARD


def test_without_a_folder_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heartbeat.FOLDER, raising=False)
    assert open_pulse("one") is None


def test_a_folder_that_is_not_there_is_told_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(heartbeat.FOLDER, str(tmp_path / "no"))
    assert open_pulse("scheduler DP 0") is None
    assert "scheduler DP 0 shows no progress, so nobody will notice if it hangs" in caplog.text


def test_files_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "short.beat").write_bytes(b"x")
    (tmp_path / "zero.beat").write_bytes(bytes(heartbeat.SIZE))
    assert read_beats(tmp_path) == {}
    assert read_beats(tmp_path / "no") == {}


def test_the_check_of_a_rank_finds_the_process_that_stands_still(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "scheduler DP 0")
    pulse.turn()
    check = ProgressCheck(tmp_path, Limits(hang_s=3, blocked_s=3))
    assert [check.ailment(now) for now in (0.0, 1.0, 2.0)] == ["", "", ""]
    pulse.turn()
    assert [check.ailment(now) for now in (3.0, 4.0, 5.0)] == ["", "", ""]
    assert check.ailment(6.0).startswith("hangs: its scheduler DP 0 has made no progress for 3 s (")


def test_a_process_that_has_gone_is_not_judged_by_its_file(tmp_path: Path) -> None:
    Pulse(tmp_path, "scheduler DP 0").turn()
    file = next(tmp_path.glob("*.beat"))
    data = bytearray(file.read_bytes())
    data[8:16] = (2**22 + 1).to_bytes(8, "little")  # a PID beyond the kernel's highest
    file.write_bytes(data)
    check = ProgressCheck(tmp_path, Limits(hang_s=1, blocked_s=1))
    assert [check.ailment(float(now)) for now in range(9)] == [""] * 9
