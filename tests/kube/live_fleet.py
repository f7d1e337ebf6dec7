"""A whole fleet in the cluster, installed by the chart: the operator's pod, Ray's head, Redis, gateway and engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from chaos.client import Outcome
from chaos.recipes import RECIPES, Expected
from chaos.traffic import References, Traffic, take_references
from kube.cluster import SOON, Cluster
from kube.kubelet import Image
from support.helm import CHART, helm
from tandem.fleet.control_client import ControlClient
from tandem.models.tiny import ensure_tiny

NAME = "mini"
RACK = "topology.tandem.dev/rack"
OPERATOR_ACCOUNT = "tandem-operator"
MODEL = "tiny"
_PAUSE_S = 0.5
"""The most that a client waits before it asks again: engines that start are to have the processors, too."""
_TOKENS_S = 120.0
"""Clients must be given a token within this, whatever happens to the fleet."""

OPERATOR_IMAGE, ENGINE_IMAGE = "tandem-operator:test", "tandem-engine:test"
NEXT_IMAGE, MISSING_IMAGE = "tandem-engine:next", "tandem-engine:missing"


def values(**spec: Any) -> dict[str, Any]:
    """Values of the chart for a fleet that two cores can run; `spec` is put over the Fleet's."""
    small = {"resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}, "nodeSelector": {RACK: "a"}}
    # More than half of a test node, so that each engine has one of its own, and only at need that of the gateway.
    engine = {
        "resources": {"requests": {"cpu": "40", "memory": "64Mi"}},
        "sharedMemory": "256Mi",
        "ipcLock": False,
        "terminationGraceSeconds": 40,
    }
    pool = {"groups": 1, "nodes": 1, "gpusPerNode": 1, "pods": engine, "rollout": {"canarySeconds": 2}}
    fleet: dict[str, Any] = {
        "device": "cpu",
        "images": {"engine": {"name": ENGINE_IMAGE}, "redis": {"name": "redis:test"}},
        "prefill": pool,
        "decode": pool,
        "gateway": {"auth": "off", "replicas": 2, "pods": small},
        "redis": {"pods": small},
        "ray": {"pods": small},
        "timeouts": {"drainSeconds": 30, "migrateSeconds": 25},
    }
    return {
        "operator": {"replicas": 1, "image": {"name": OPERATOR_IMAGE}},
        "fleet": {"create": True, "name": NAME, "spec": _over(fleet, spec)},
    }


def _over(spec: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A spec with another's fields over it; objects of both are mixed."""
    mixed = {key: {**spec.get(key, {}), **value} if isinstance(value, dict) else value for key, value in other.items()}
    return {**spec, **mixed}


def tiny(folder: Path, name: str = MODEL, seed: int = 0) -> Path:
    """A tiny model in `folder`; the default is the one that a fleet without a path serves."""
    ensure_tiny(folder / name, seed=seed)
    return folder / name


class LiveFleet:
    """A fleet that answers. Made by `install`."""

    def __init__(
        self, cluster: Cluster, namespace: str, folder: Path, spec: dict[str, Any], operator: dict[str, Any]
    ) -> None:
        """`spec`, `operator`: what it is installed with, and keeps."""
        self.cluster = cluster
        self.namespace = namespace
        self._folder = folder
        self._spec, self._operator = spec, operator
        self._references: References | None = None

    @property
    def url(self) -> str:
        """Of the gateway, by its Service's address."""
        return f"http://{self.cluster.address(NAME, self.namespace)}:8000"

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One of Tandem's objects, which must be there."""
        found = self.cluster.get(kind, name, self.namespace, group="tandem.dev/v1alpha1")
        assert found is not None, f"there is no {kind} {name}"
        return found

    def groups(self, role: str) -> dict[str, str]:
        """Phase of each group of a role, by its name."""
        listed = json.loads(self.kubectl("get", "epg", "-o", "json"))["items"]
        return {
            one["metadata"]["name"]: one.get("status", {}).get("phase", "")
            for one in listed
            if one["spec"]["role"] == role
        }

    def ready(self, role: str, count: int) -> bool:
        """Whether a role has exactly so many groups, all of them ready."""
        groups = self.groups(role)
        return len(groups) == count and set(groups.values()) <= {"Ready"}

    def epoch(self, group: str) -> int:
        """The epoch of an ExpertParallelGroup, by its name; raised whenever its engines start anew."""
        return int(self.get("expertparallelgroups", group).get("status", {}).get("epoch", 0))

    def migrations(self) -> Counter[str]:
        """How many streams the gateways gave a new pair until now, by the reason: "moved", or how they broke."""
        return self._counted("tandem_migrations_total", "reason")

    def legs(self) -> Counter[str]:
        """How many legs of requests the gateways have sent to each group and seen the end of, by the group's id."""
        return self._counted("tandem_legs_total", "group")

    def _counted(self, metric: str, label: str) -> Counter[str]:
        """A metric of all gateways, by a label."""
        counts: Counter[str] = Counter()
        for pod in self.gateways():
            answer = httpx2.get(f"http://{pod['status']['podIP']}:8000/metrics", timeout=30)
            assert answer.status_code == 200, answer.text
            for line in answer.text.splitlines():
                if found := re.fullmatch(rf'{metric}\{{.*\b{label}="(.*?)".*\}} (\S+)', line):
                    counts[found[1]] += int(float(found[2]))
        return counts

    def gateways(self) -> list[dict[str, Any]]:
        """The gateways' pods."""
        return self.pods("component", "gateway")

    def pods(self, label: str, value: str) -> list[dict[str, Any]]:
        """Pods with a label of Tandem's."""
        pods = self.cluster.kubelet.objects("pods", self.namespace)
        return [one for one in pods if one["metadata"].get("labels", {}).get(f"tandem.dev/{label}") == value]

    def control(self) -> ControlClient:
        """The head's control service."""
        (head,) = self.pods("component", "head")
        return ControlClient(f"{head['status']['podIP']}:9000")

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """kubectl in the fleet's namespace."""
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, **options)

    def upgrade(self, **spec: Any) -> None:
        """`helm upgrade`: as it was installed, but for this."""
        self.helm("upgrade", **spec)

    def helm(self, verb: str, **spec: Any) -> None:
        """`helm install` or `helm upgrade`, without a wait, with `spec` over what the fleet keeps."""
        chosen = values(**_over(self._spec, spec))
        chosen["operator"].update(self._operator)
        file = self._folder / f"values-{time.monotonic_ns()}.json"
        file.write_text(json.dumps(chosen))
        helm(verb, "tandem", CHART, "--namespace", self.namespace, "-f", file, kubeconfig=self.cluster.kubeconfig)

    def chat(self, text: str, tokens: int = 16) -> dict[str, Any]:
        """One greedy answer, whole."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        answer = httpx2.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def references(self) -> References:
        """What each recipe's answer is; greedy ones are also the oracle's."""
        if self._references is None:
            model = tiny(self._folder)
            self._references = asyncio.run(take_references(self.url, MODEL, Expected(model, self._folder)))
        return self._references

    @contextlib.contextmanager
    def traffic(self, clients: int = 2, pause_s: float = _PAUSE_S) -> Iterator[Background]:
        """Clients that ask one thing after the other meanwhile; in the end each answer must be whole and right, and
        have been given at the first try."""
        with self._asked(self.references(), self.references().fault, clients, pause_s) as background:
            yield background

    @contextlib.contextmanager
    def traffic_of(self, models: Mapping[str, Path], clients: int = 2) -> Iterator[Background]:
        """The same while weights change: each answer must be, token for token, that of the weights whose version it
        names. `models`: the folder of each version. An answer by two versions would be nobody's."""
        greedy = [recipe for recipe in RECIPES if recipe.oracle and "prompt" in recipe.fields]
        fields = {recipe.name: recipe.fields for recipe in greedy}
        expected = {version: Expected(model, self._folder) for version, model in models.items()}

        def fault(one: Outcome) -> str:
            if one.error or one.version not in expected:
                return f"{one.code}: {one.error}" if one.error else f"it names version {one.version!r}"
            asked = fields[one.recipe]
            right = expected[one.version].answer(asked["prompt"], asked["max_tokens"])
            return "" if one.tokens == right else f"other tokens than those of version {one.version}"

        with self._asked(References(greedy, {}), fault, clients, _PAUSE_S) as background:
            yield background

    @contextlib.contextmanager
    def _asked(
        self, references: References, fault: Callable[[Outcome], str], clients: int, pause_s: float
    ) -> Iterator[Background]:
        background = Background(self.url, references, clients, pause_s)
        try:
            yield background
            background.progress(20)
        finally:
            background.stop()
        done = background.done
        assert done
        wrong = [f"{one.name} ({one.recipe}): {why}" for one in done if (why := fault(one))]
        again = [f"{one.name} ({one.recipe}): {one.tries} tries" for one in done if one.tries > 1]
        print(f"{len(done)} answers, {len(wrong)} wrong, {len(again)} of them after more than one try")
        assert not wrong, f"{len(wrong)} of {len(done)} answers: {wrong[:5]}"
        assert not again, f"connections broke for {len(again)} of {len(done)}: {again[:5]}"


class Background:
    """Traffic on a thread of its own, which is where the caller's thread is: in the cluster's network."""

    def __init__(self, base: str, references: References, clients: int, pause_s: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="traffic", daemon=True)
        self._thread.start()
        self._traffic = self._call(self._start(base, references, clients, pause_s))

    async def _start(self, base: str, references: References, clients: int, pause_s: float) -> Traffic:
        traffic = Traffic({False: base}, MODEL, references, random.Random(5))
        traffic.start(clients, pause_s)
        return traffic

    @property
    def done(self) -> list[Outcome]:
        """Requests that are over."""
        return self._traffic.done

    def progress(self, tokens: int) -> None:
        """Wait until clients have been given so many tokens more."""
        self._call(self._traffic.progress(tokens, _TOKENS_S))

    def stop(self) -> None:
        """Let what runs end."""
        try:
            self._call(self._traffic.stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(300)


def install(
    cluster: Cluster, namespace: str, folder: Path, *, operator: dict[str, Any] | None = None, **spec: Any
) -> LiveFleet:
    """`helm install`, without a wait. `operator`: further values of its own."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for image in (OPERATOR_IMAGE, ENGINE_IMAGE, NEXT_IMAGE):
        cluster.kubelet.images[image] = Image(env={"PATH": programs})
    cluster.kubelet.missing_images.add(MISSING_IMAGE)
    fleet = LiveFleet(cluster, namespace, folder, spec, operator or {})
    fleet.helm("install")
    return fleet


def uninstall(fleet: LiveFleet) -> None:
    """Remove the fleet, and when its groups have gone, for which they need an operator, the release. CRDs stay, as Helm
    has it."""
    fleet.kubectl("delete", "fleet", NAME, "--wait=false")
    fleet.cluster.wait(lambda: not fleet.kubectl("get", "fleets", "-o", "name"), SOON, "the fleet is gone")
    fleet.cluster.wait(lambda: not fleet.kubectl("get", "epp,epg", "-o", "name"), SOON, "pools and groups are gone")
    helm("uninstall", "tandem", "--namespace", fleet.namespace, kubeconfig=fleet.cluster.kubeconfig)
