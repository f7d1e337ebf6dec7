"""One container of a pod: its process, its probes, its restarts, and what its status says."""

from __future__ import annotations

import enum
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from kube.kubelet.probes import Outcome, Prober, act
from kube.kubelet.processes import ContainerProcess, Ended, NotStarted
from kube.kubelet.report import now
from kube.kubelet.rest import Object

if TYPE_CHECKING:
    from kube.kubelet.pod import Pod

_MINIMUM_GRACE_S = 2.0
"""After a preStop hook that took all of the grace."""
_LONG_S = 10.0
"""One that ran for so many times the base back-off is restarted at once."""


class Phase(enum.Enum):
    """Of a container."""

    NEW = "waits for its first start"
    STARTING = "its process is being made"
    RUNNING = "its process runs"
    WAITING = "is to be started again in a while"
    ENDED = "stays ended"


class Container:
    """All methods are called on the pod's thread."""

    def __init__(self, pod: Pod, spec: Object, *, init: bool) -> None:
        self.spec = spec
        self.init = init
        self.name: str = spec["name"]
        self.phase = Phase.NEW
        self.state: Object = {"waiting": {"reason": "PodInitializing"}}
        self.last_state: Object = {}
        self.restarts = 0
        self.ready = False
        self.started = False
        self.process: ContainerProcess | None = None
        self._pod = pod
        self._probers: list[Prober] = []
        self._backoffs = 0
        self._begun = 0.0
        self._doomed = False
        self._stopping = False

    @property
    def active(self) -> bool:
        """Whether there is, or is about to be, a process."""
        return self.phase in (Phase.STARTING, Phase.RUNNING)

    @property
    def exit_code(self) -> int | None:
        """Of the last end, once it stays ended."""
        return int(self.state["terminated"]["exitCode"]) if self.phase is Phase.ENDED else None

    def status(self) -> Object:
        """As in containerStatuses."""
        image = self.spec.get("image", "")
        return {
            "name": self.name,
            "image": image,
            "imageID": f"process://{image}" if self.phase is not Phase.NEW else "",
            "ready": self.exit_code == 0 if self.init else self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last_state,
        }

    def start(self, order: dict[str, Any]) -> None:
        """Start its process by an order for `isolate.py`."""
        self.phase = Phase.STARTING
        self._doomed = self._stopping = False
        self._begun = time.monotonic()
        log = self._pod.log_path(self.name, self.restarts)
        # The thread lives as long as the process: the process dies with the thread that started it.
        threading.Thread(target=self._live, args=(order, log), name=f"container-{self.name}", daemon=True).start()

    def _live(self, order: dict[str, Any], log: Any) -> None:
        try:
            process = ContainerProcess(order, log)
        except (NotStarted, OSError) as error:
            message = str(error)
            with log.open("a") as file:
                file.write(f"{message}\n")
            self._pod.post(lambda: self._ended(Ended(128, None), message))
            return
        self._pod.post(lambda: self._runs(process))
        ended = process.wait()
        self._pod.post(lambda: self._ended(ended, None))

    def _runs(self, process: ContainerProcess) -> None:
        self.process = process
        self.phase = Phase.RUNNING
        self.state = {"running": {"startedAt": now()}}
        self._pod.tell("Started", f"Started container {self.name}")
        if self._doomed:
            process.send(signal.SIGKILL)
        elif self._pod.ending:
            self.stop(self._pod.grace)
        else:
            self._probe(process)
        self._pod.changed()

    def _probe(self, process: ContainerProcess) -> None:
        startup = self.spec.get("startupProbe")
        if startup is not None:
            self._add_prober("Startup", startup, process)
            return
        self._has_started(process)

    def _has_started(self, process: ContainerProcess) -> None:
        self.started = True
        readiness, liveness = self.spec.get("readinessProbe"), self.spec.get("livenessProbe")
        if readiness is None:
            self.ready = True
        else:
            self._add_prober("Readiness", readiness, process)
        if liveness is not None:
            self._add_prober("Liveness", liveness, process)

    def _add_prober(self, kind: str, probe: Object, process: ContainerProcess) -> None:
        def once(within: float) -> Outcome:
            return act(probe, self.spec, process, self._pod.address, within)

        def told(decided: bool | None, success: bool, seen: str) -> None:
            self._pod.post(lambda: self._probed(kind, process, decided, success, seen))

        prober = Prober(probe, once, told)
        self._probers.append(prober)
        prober.start()

    def _probed(self, kind: str, process: ContainerProcess, decided: bool | None, success: bool, seen: str) -> None:
        if process is not self.process or self._stopping:
            return  # of a process that has ended or is about to
        if not success:
            self._pod.tell("Unhealthy", f"{kind} probe failed: {seen}", "Warning")
        if decided is None:
            return
        if kind == "Readiness":
            self.ready = decided
        elif not decided:
            self._pod.tell("Killing", f"Container {self.name} failed {kind.lower()} probe, will be restarted")
            self.stop(self._pod.grace)
        elif kind == "Startup":
            self._stop_probers()
            self._has_started(process)
        self._pod.changed()

    def _stop_probers(self) -> None:
        for prober in self._probers:
            prober.stop()
        self._probers.clear()

    def stop(self, grace: float) -> None:
        """preStop, SIGTERM, and SIGKILL when `grace` seconds are over."""
        if self.process is None or self._stopping:
            return
        self._stopping = True
        self._stop_probers()
        thread = threading.Thread(target=self._stop, args=(self.process, grace), name="stop", daemon=True)
        thread.start()

    def _stop(self, process: ContainerProcess, grace: float) -> None:
        deadline = time.monotonic() + grace
        hook = self.spec.get("lifecycle", {}).get("preStop")
        if hook is not None and grace > 0:
            success, seen = act(hook, self.spec, process, self._pod.address, grace)
            if not success and not process.ended_within(0):
                self._pod.tell("FailedPreStopHook", f"preStop of {self.name}: {seen}", "Warning")
        process.send(signal.SIGTERM)
        if not process.ended_within(max(_MINIMUM_GRACE_S if grace > 0 else 0.0, deadline - time.monotonic())):
            process.send(signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL at once."""
        self._doomed = True
        self._stop_probers()
        if self.process is not None:
            self.process.send(signal.SIGKILL)

    def wait_for(self, reason: str, message: str) -> None:
        """It cannot start yet."""
        self.state = {"waiting": {"reason": reason, "message": message}}

    def _ended(self, ended: Ended, failed: str | None) -> None:
        self._stop_probers()
        if self.process is not None:
            self.process.close()
            self.process = None
        self.ready = self.started = False
        terminated: Object = {
            "exitCode": ended.code,
            "reason": "StartError" if failed else "Completed" if ended.code == 0 else "Error",
            "startedAt": self.state.get("running", {}).get("startedAt", now()),
            "finishedAt": now(),
        }
        if ended.signal is not None:
            terminated["signal"] = ended.signal
        if failed is not None:
            terminated["message"] = failed
            self._pod.tell("Failed", f"Error: {failed}", "Warning")
        self.phase = Phase.ENDED
        self.state = {"terminated": terminated}
        if not self._pod.ending and self._pod.restarts(self, ended.code):
            self._wait_for_restart()
        self._pod.changed()

    def _wait_for_restart(self) -> None:
        base = self._pod.backoff_s
        if time.monotonic() - self._begun > _LONG_S * base:
            self._backoffs = 0
        self.phase = Phase.WAITING
        delay = 0.0 if self._backoffs == 0 else min(base * 2 ** (self._backoffs - 1), 30 * base)
        self._backoffs += 1
        self.last_state, ended = self.state, self.state
        if delay:
            message = f"back-off {delay:g}s restarting failed container={self.name}"
            self.state = {"waiting": {"reason": "CrashLoopBackOff", "message": message}}
            self._pod.tell("BackOff", "Back-off restarting failed container", "Warning")
        self._pod.later(delay, lambda: self._again(ended))

    def _again(self, ended: Object) -> None:
        if self.phase is Phase.WAITING and not self._pod.ending:
            self.last_state = ended
            self.restarts += 1
            self.phase = Phase.NEW
            self._pod.changed()
