"""A pod's volumes, as folders of this machine.

Honoured: emptyDir (medium Memory: in memory, with its sizeLimit), configMap, secret, downwardAPI, projected (of these
and service-account tokens), hostPath, persistentVolumeClaim. Contents are written once, when the pod starts: later
changes of a ConfigMap, and new tokens after an hour, do not reach a pod that runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kube.kubelet.quantity import parse
from kube.kubelet.rest import Object
from kube.kubelet.spec import Find, NotYet, field, resource, values_of

SHM = "shm"
"""Name of the folder that is /dev/shm."""
_SHM_BYTES = 64 << 20
"""As container runtimes give, when no volume is mounted there."""

Token = Callable[[Object], str]
"""Of a serviceAccountToken source: a token."""
Claim = Callable[[str], Path | None]
"""Of a claim's name: the folder it is bound to, or None."""


class Volumes:
    """The volumes of one pod, under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}
        self.memory: dict[str, int | None] = {str(folder / SHM): _SHM_BYTES}
        """Folders that the sandbox makes file systems in memory: bytes, or None for half of the machine's."""

    def prepare(self, pod: Object, find: Find, token: Token, claim: Claim, allocatable: Mapping[str, str]) -> None:
        """Make them. Raises NotYet while something is missing; may be called again then."""
        (self.folder / SHM).mkdir(parents=True, exist_ok=True)
        for volume in pod["spec"].get("volumes", []):
            name = volume["name"]
            own = self.folder / f"volume-{name}"
            if "hostPath" in volume:
                self.paths[name] = _host_path(volume["hostPath"])
                continue
            if "persistentVolumeClaim" in volume:
                wanted = volume["persistentVolumeClaim"]["claimName"]
                bound = claim(wanted)
                if bound is None:
                    raise NotYet("FailedMount", f'persistentvolumeclaim "{wanted}" is not there, or not bound')
                self.paths[name] = bound
                continue
            own.mkdir(exist_ok=True)
            self.paths[name] = own
            if "emptyDir" in volume:
                own.chmod(0o777)
                empty = volume["emptyDir"] or {}
                if empty.get("medium") == "Memory":
                    limit = empty.get("sizeLimit")
                    self.memory[str(own)] = None if limit is None else int(parse(limit))
                continue
            for path, content, mode in _contents(volume, pod, find, token, allocatable):
                _write(own, path, content, mode)

    def mounts(self, container: Object) -> list[dict[str, object]]:
        """A container's volumeMounts, shallow ones first, as `isolate.py` takes them."""
        found = []
        for mount in sorted(container.get("volumeMounts", []), key=lambda one: one["mountPath"].count("/")):
            source = self.paths[mount["name"]]
            if mount.get("subPath"):
                source = source / mount["subPath"]
                if not source.exists():
                    source.mkdir(parents=True)
            target = os.path.normpath(mount["mountPath"])
            found.append({"source": str(source), "target": target, "read_only": bool(mount.get("readOnly"))})
        return found


def _host_path(source: Object) -> Path:
    path = Path(source["path"])
    if source.get("type") == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        raise NotYet("FailedMount", f"hostPath {path} does not exist")
    return path


def _write(base: Path, path: str, content: bytes, mode: int) -> None:
    target = base / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(mode)


_File = tuple[str, bytes, int]


def _contents(volume: Object, pod: Object, find: Find, token: Token, allocatable: Mapping[str, str]) -> Iterator[_File]:
    """Files of a volume: path, content, mode."""
    if "projected" in volume:
        mode = volume["projected"].get("defaultMode", 0o644)
        for source in volume["projected"].get("sources", []):
            yield from _source(source, mode, pod, find, token, allocatable)
        return
    if "secret" in volume:
        secret = volume["secret"]
        source = {"secret": {**secret, "name": secret["secretName"]}}
        yield from _source(source, secret.get("defaultMode", 0o644), pod, find, token, allocatable)
        return
    for kind in ("configMap", "downwardAPI"):
        if kind in volume:
            mode = volume[kind].get("defaultMode", 0o644)
            yield from _source({kind: volume[kind]}, mode, pod, find, token, allocatable)
            return
    raise NotYet("FailedMount", f"volume {volume['name']} is of a kind that the process kubelet does not know")


def _source(
    source: Object, mode: int, pod: Object, find: Find, token: Token, allocatable: Mapping[str, str]
) -> Iterator[_File]:
    if "serviceAccountToken" in source:
        asked = source["serviceAccountToken"]
        yield asked["path"], token(asked).encode(), 0o600 if mode == 0o644 else mode
    for kind, key in (("configmaps", "configMap"), ("secrets", "secret")):
        if key in source:
            try:
                values = values_of(find, kind, source[key])
            except NotYet as missing:
                raise NotYet("FailedMount", missing.message) from missing
            yield from _items(values, source[key], mode)
    if "downwardAPI" in source:
        for item in source["downwardAPI"].get("items", []):
            if "fieldRef" in item:
                text = field(pod, item["fieldRef"]["fieldPath"])
            else:
                text = resource(pod, item["resourceFieldRef"], "", allocatable)
            yield item["path"], text.encode(), item.get("mode", mode)


def _items(values: Mapping[str, bytes], source: Object, mode: int) -> Iterator[_File]:
    items = source.get("items")
    if items is None:
        yield from ((key, content, mode) for key, content in values.items())
        return
    for item in items:
        if item["key"] in values:
            yield item["path"], values[item["key"]], item.get("mode", mode)
        elif not source.get("optional"):
            raise NotYet("FailedMount", f"references non-existent key: {item['key']}")
