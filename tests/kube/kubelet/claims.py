"""Persistent volume claims: each is bound to a volume of its own, a folder that lives as long as the claim."""

from __future__ import annotations

import shutil
from pathlib import Path

from kubernetes.client.exceptions import ApiException

from kube.kubelet.informer import Informer
from kube.kubelet.rest import MERGE, Object, Rest, path


class Claims:
    """Binds whatever is asked: every storage class exists, and is never full."""

    def __init__(self, rest: Rest, folder: Path, informers: dict[str, Informer]) -> None:
        self._rest = rest
        self._folder = folder
        self._informers = informers

    def folder_of(self, namespace: str, name: str) -> Path | None:
        """Folder of a claim that is bound, or None."""
        claim = self._informers["persistentvolumeclaims"].get(namespace, name)
        if claim is None or claim["status"].get("phase") != "Bound":
            return None
        return self._path(claim)

    def _path(self, claim: Object) -> Path:
        return self._folder / str(claim["metadata"]["uid"])

    def changed(self, claim: Object, gone: bool) -> None:
        """A claim is there, or gone."""
        meta, volume = claim["metadata"], f"pvc-{claim['metadata']['uid']}"
        try:
            if gone:
                shutil.rmtree(self._path(claim), ignore_errors=True)
                self._rest.persist("PATCH", path("persistentvolumes", None, volume), _NO_FINALIZERS, content=MERGE)
                self._rest.persist("DELETE", path("persistentvolumes", None, volume))
            elif claim["status"].get("phase") == "Pending" and "deletionTimestamp" not in meta:
                self._bind(claim, volume)
        except ApiException as error:
            # 404: it was deleted meanwhile; 409: bound by an earlier pass.
            if error.status not in (404, 409):
                raise

    def _bind(self, claim: Object, volume: str) -> None:
        meta, spec = claim["metadata"], claim["spec"]
        folder = self._path(claim)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        reference = {"kind": "PersistentVolumeClaim", "apiVersion": "v1"}
        reference |= {key: meta[key] for key in ("namespace", "name", "uid")}
        size = spec["resources"]["requests"]
        body = {
            "metadata": {"name": volume},
            "spec": {
                "capacity": size,
                "accessModes": spec["accessModes"],
                "persistentVolumeReclaimPolicy": "Delete",
                "storageClassName": spec.get("storageClassName"),
                "hostPath": {"path": str(folder)},
                "claimRef": reference,
            },
        }
        try:
            self._rest.persist("POST", path("persistentvolumes"), body)
        except ApiException as error:
            if error.status != 409:
                raise
        where = (meta["namespace"], meta["name"])
        self._rest.persist(
            "PATCH", path("persistentvolumes/status", None, volume), {"status": {"phase": "Bound"}}, content=MERGE
        )
        named = {"spec": {"volumeName": volume}}
        self._rest.persist("PATCH", path("persistentvolumeclaims", *where), named, content=MERGE)
        bound = {"status": {"phase": "Bound", "capacity": size, "accessModes": spec["accessModes"]}}
        self._rest.persist("PATCH", path("persistentvolumeclaims/status", *where), bound, content=MERGE)


_NO_FINALIZERS = {"metadata": {"finalizers": None}}
