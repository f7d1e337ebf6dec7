"""One pod on one of our nodes, from its binding to the deletion of its object."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kube.kubelet.actor import Actor
from kube.kubelet.container import Container, Phase
from kube.kubelet.informer import key_of
from kube.kubelet.processes import NotStarted, Sandbox
from kube.kubelet.report import now
from kube.kubelet.rest import Object
from kube.kubelet.spec import NotYet, environment, expand, service_links
from kube.kubelet.volumes import SHM, Volumes

if TYPE_CHECKING:
    from kube.kubelet.host import Host

_TRY_AGAIN_S = 0.5
_NAMES = "/.kubelet-names"
"""Where a container sees the folder with its hosts file; no volume is mounted over it, as one often is over /run."""


class Pod(Actor):
    """Everything runs on its thread but `lose`, `tell` and `log_path`."""

    def __init__(self, host: Host, pod: Object) -> None:
        super().__init__(f"pod-{pod['metadata']['name']}")
        self.key = key_of(pod)
        self.uid: str = pod["metadata"]["uid"]
        self.node: str = pod["spec"]["nodeName"]
        self.object = pod
        self.address = ""
        self.ending = False
        self.backoff_s = host.backoff_s
        spec = pod["spec"]
        self.grace = float(spec.get("terminationGracePeriodSeconds", 30))
        self.folder = host.folder / "pods" / self.uid
        self.names = self.folder / "names"
        self._host = host
        self._volumes = Volumes(self.folder)
        self._sandbox: Sandbox | None = None
        self._init = [Container(self, one, init=True) for one in spec.get("initContainers", [])]
        self._containers = [Container(self, one, init=False) for one in spec["containers"]]
        self._since = now()
        self._conditions: dict[str, Object] = {}
        self._reported: Object | None = None
        self._lost = False
        self._gone = False
        self._down = False
        self.post(self._prepare)

    # What others ask.

    def update(self, pod: Object) -> None:
        """The object has changed."""
        self.object = pod
        if "deletionTimestamp" in pod["metadata"]:
            self._terminate(float(pod["metadata"].get("deletionGracePeriodSeconds") or 0))
        self.changed()

    def vanish(self) -> None:
        """The object is gone, by force: kill all."""
        self._gone = self.ending = True
        self._kill_all()
        self.changed()

    def lose(self) -> None:
        """The node is lost: end its processes at once, and say nothing. From any thread."""
        self._lost = True
        self._host.reports.forget(self.uid)
        sandbox = self._sandbox
        for container in [*self._init, *self._containers]:
            process = container.process
            if process is not None:
                process.send(signal.SIGKILL)
        if sandbox is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sandbox.pid, signal.SIGKILL)
        self.post(self.vanish)

    def tell(self, reason: str, message: str, kind: str = "Normal") -> None:
        """An Event of this pod. From any thread."""
        if not self._lost:
            self._host.events.tell(self.object, reason, message, kind)

    def pids(self) -> list[int]:
        """Of the first process of each container that runs. From any thread."""
        processes = [one.process for one in [*self._init, *self._containers]]
        return [one.pid for one in processes if one is not None]

    def log_path(self, container: str, restart: int) -> Path:
        """Where the output of a container goes. From any thread."""
        return self._host.log_path(self.key, self.uid, container, restart)

    # Its start.

    def _prepare(self) -> None:
        if self.ending:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._volumes.prepare(
                self.object, self._find, self._token, self._claim, self._host.allocatable(self.object)
            )
        except NotYet as missing:
            self.tell(missing.reason, missing.message, "Warning")
            self._report()
            self.later(_TRY_AGAIN_S, self._prepare)
            return
        self.names.mkdir(exist_ok=True)
        (self.folder / "root").mkdir(exist_ok=True)
        spec, meta = self.object["spec"], self.object["metadata"]
        network = self._host.node_network(self.node) if spec.get("hostNetwork") else None
        try:
            self._sandbox = Sandbox(spec.get("hostname") or meta["name"], self._volumes.memory, network)
        except NotStarted as error:
            self.tell("FailedCreatePodSandBox", str(error), "Warning")
            self.later(_TRY_AGAIN_S, self._prepare)
            return
        if network is None:
            self.address = self._host.connect(self._sandbox.pid)
        else:
            self.address = self._host.node_address(self.node)
        self._host.wiring.add(self)
        if self._lost:
            self._sandbox.end()
        self.changed()

    def _find(self, kind: str, name: str) -> Object | None:
        return self._host.find(kind, self.key[0], name)

    def _token(self, source: Object) -> str:
        return self._host.token(self.object, source)

    def _claim(self, name: str) -> Path | None:
        return self._host.claim(self.key[0], name)

    # Its life.

    def restarts(self, container: Container, code: int) -> bool:
        """Whether a container that ended is started again."""
        policy = self.object["spec"].get("restartPolicy", "Always")
        if policy == "Always" and not container.init:
            return True
        return policy != "Never" and code != 0

    def changed(self) -> None:
        """Look what is to be done, and report."""
        if self.ending:
            if not self._finished and not any(one.active for one in [*self._init, *self._containers]):
                self._finish()
            return
        if self._down:
            return
        if self._sandbox is not None:
            for container in self._due():
                self._start(container)
        if self._phase() in ("Succeeded", "Failed"):
            self._report()
            self._tear_down()
            return
        self._report()

    def _due(self) -> list[Container]:
        """Containers to start now: init containers one after the other, then all others."""
        for one in self._init:
            if one.phase is Phase.ENDED and one.exit_code == 0:
                continue
            return [one] if one.phase is Phase.NEW else []
        return [one for one in self._containers if one.phase is Phase.NEW]

    def _start(self, container: Container) -> None:
        image = container.spec.get("image", "")
        if image in self._host.missing_images:
            message = f'Back-off pulling image "{image}"'
            reason = "ErrImagePull"
            if container.state.get("waiting", {}).get("reason") in ("ErrImagePull", "ImagePullBackOff"):
                reason = "ImagePullBackOff"
            else:
                self.tell("Failed", f'Failed to pull image "{image}": not found', "Warning")
            self._postpone(container, reason, message)
            return
        try:
            order = self._order(container)
        except NotYet as missing:
            self.tell("Failed", f"Error: {missing.message}", "Warning")
            self._postpone(container, missing.reason, missing.message)
            return
        if container.restarts == 0:
            self.tell("Pulled", f'Container image "{image}" already present on machine')
        self.tell("Created", f"Created container {container.name}")
        container.start(order)

    def _postpone(self, container: Container, reason: str, message: str) -> None:
        container.wait_for(reason, message)
        container.phase = Phase.WAITING

        def again() -> None:
            if container.phase is Phase.WAITING and not self.ending:
                container.phase = Phase.NEW
                self.changed()

        self.later(_TRY_AGAIN_S, again)

    def _order(self, container: Container) -> dict[str, Any]:
        """What `isolate.py` shall do. Raises NotYet."""
        assert self._sandbox is not None
        spec, pod = container.spec, self.object["spec"]
        image = self._host.image(spec.get("image", ""))
        base = {
            "PATH": self._host.path,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "HOSTNAME": pod.get("hostname") or self.key[1],
            **image.env,
            **service_links(self._host.services(), self.key[0], pod.get("enableServiceLinks", True)),
        }
        status = {
            **self.object.get("status", {}),
            "podIP": self.address,
            "hostIP": self._host.node_address(self.node),
        }
        view = {**self.object, "status": status}
        env = environment(spec, view, self._find, base, self._host.allocatable(self.object))
        command = spec.get("command") or list(image.command)
        argv = [*image.prefix, *(expand(one, env) for one in [*command, *spec.get("args", [])])]
        if not argv:
            raise NotYet("CreateContainerError", f"container {container.name} has no command, and its image none here")
        security = {**pod.get("securityContext", {}), **spec.get("securityContext", {})}
        if security.get("runAsUser"):
            note = f"runs as root, not as user {security['runAsUser']}: the process kubelet does not change users\n"
            self.log_path(container.name, container.restarts).write_text(note)
        return {
            "sandbox": self._sandbox.pid,
            "root": str(self.folder / "root"),
            "hidden": self._host.hidden,
            "memory": str(self._volumes.folder / SHM),
            # Names that the hosts file lacks are refused at once, rather than asked of a server that is not there.
            "files": {"/etc/resolv.conf": "nameserver 127.0.0.1\n", "/etc/host.conf": "multi on\n"},
            "links": {"/etc/hosts": f"{_NAMES}/hosts"},
            "mounts": [
                {"source": str(self.names), "target": _NAMES, "read_only": True},
                *self._volumes.mounts(spec),
            ],
            "read_only_root": bool(security.get("readOnlyRootFilesystem")),
            "directory": spec.get("workingDir") or "/",
            "env": env,
            "argv": argv,
        }

    # Its end.

    def _terminate(self, grace: float) -> None:
        if not self.ending:
            self.ending = True
            for container in self._containers:
                if container.active:
                    self.tell("Killing", f"Stopping container {container.name}")
        elif grace >= self.grace:
            return
        self.grace = grace
        for container in [*self._init, *self._containers]:
            container.stop(grace)
        if grace == 0:
            self._kill_all()

    def _kill_all(self) -> None:
        for container in [*self._init, *self._containers]:
            container.kill()

    def _finish(self) -> None:
        if not (self._gone or self._lost):
            self._report()
            self._host.reports.gone(self.key, self.uid)
        self._tear_down()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.finish()

    def _tear_down(self) -> None:
        self._down = True
        self._host.wiring.remove(self)
        if self._sandbox is not None:
            self._sandbox.end()
            self._sandbox = None

    # Its status.

    def _phase(self) -> str:
        if any(one.exit_code for one in self._init):
            return "Failed"
        if not all(one.exit_code == 0 for one in self._init):
            return "Pending"
        codes = [one.exit_code for one in self._containers]
        ended = [code for code in codes if code is not None]
        if len(ended) == len(codes):
            return "Failed" if any(ended) else "Succeeded"
        fresh = any(
            one.phase in (Phase.NEW, Phase.STARTING, Phase.WAITING) and not one.last_state for one in self._containers
        )
        return "Pending" if fresh else "Running"

    def _report(self) -> None:
        if self._lost or self._gone:
            return
        phase = self._phase()
        ready = phase == "Running" and all(one.ready for one in self._containers)
        given = {one["type"]: one["status"] for one in self.object.get("status", {}).get("conditions", [])}
        gates = [one["conditionType"] for one in self.object["spec"].get("readinessGates", [])]
        completed = "PodCompleted" if phase == "Succeeded" else None
        self._condition(
            "Initialized", all(one.exit_code == 0 for one in self._init), completed or "ContainersNotInitialized"
        )
        self._condition("ContainersReady", ready, completed or "ContainersNotReady")
        open_gates = [gate for gate in gates if given.get(gate) != "True"]
        reason = "ReadinessGatesNotReady" if ready and open_gates else completed or "ContainersNotReady"
        self._condition("Ready", ready and not open_gates, reason)
        status: Object = {
            "phase": phase,
            "startTime": self._since,
            "hostIP": self._host.node_address(self.node),
            "conditions": list(self._conditions.values()),
            "containerStatuses": [one.status() for one in self._containers],
        }
        if self._init:
            status["initContainerStatuses"] = [one.status() for one in self._init]
        if self.address:
            status |= {"podIP": self.address, "podIPs": [{"$patch": "replace"}, {"ip": self.address}]}
        if status != self._reported:
            self._reported = status
            self._host.reports.status(self.key, self.uid, status)

    def _condition(self, kind: str, true: bool, reason: str) -> None:
        status = "True" if true else "False"
        before = self._conditions.get(kind, {})
        since = before["lastTransitionTime"] if before.get("status") == status else now()
        self._conditions[kind] = {
            "type": kind,
            "status": status,
            "lastTransitionTime": since,
            # A patch keeps what it doesn't name: an old reason goes away by null.
            "reason": None if true else reason,
        }
