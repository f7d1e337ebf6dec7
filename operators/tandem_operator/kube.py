"""Calls to the Kubernetes API: JSON in and out, over the official client's transport. Every call has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import kopf
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from tandem_operator.names import MANAGER, Key, Kind, Object, watched_label

_DEADLINE_S = 15.0
_PAGE = 500
"""Objects in an answer to a listing."""
_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/token"


class KubeError(Exception):
    """The API server refused, or did not answer (`status` 0). The message says what was asked and why it failed.

    `said`: the server's own sentence. `causes`: one for each field that it finds wrong.
    """

    def __init__(
        self, message: str, status: int, reason: str = "", *, said: str = "", causes: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.said = said or message
        self.causes = tuple(causes)


class Kube:
    """A connection to the API server."""

    def __init__(self, client: Any) -> None:
        """Use the credentials and connections of an `ApiClient` of `kubernetes.aio`, whose calls have no types."""
        self._client = client
        self.reached_at = 0.0
        """When the server last answered, on the loop's clock."""

    async def close(self) -> None:
        """End the connections."""
        await self._client.close()

    async def credentials(self) -> kopf.ConnectionInfo:
        """The same for kopf's watches, as they are now: a service account's token changes every hour."""
        headers: dict[str, str] = {}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], "", "GET", None)
        scheme, _, token = headers.get("authorization", headers.get("Authorization", "")).partition(" ")
        known = self._client.configuration
        return kopf.ConnectionInfo(
            server=known.host,
            ca_path=known.ssl_ca_cert,
            ca_data=known.ca_cert_data,
            insecure=not known.verify_ssl,
            scheme=scheme or None,
            token=token or None,
            certificate_path=known.cert_file,
            private_key_path=known.key_file,
        )

    async def get(self, key: Key) -> Object | None:
        """The object now, straight from the server; None = there is none."""
        try:
            return await self._call("GET", _path(key))
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def find(self, key: Key) -> Object | None:
        """The object now, whatever its labels, by the right to list; None = there is none."""
        path = f"{key.kind.path}/namespaces/{quote(key.namespace)}/{key.kind.plural}"
        found = await self._call("GET", path, query={"fieldSelector": f"metadata.name={key.name}"})
        return next(iter(found["items"] or ()), None)

    async def list(self, kind: Kind, namespace: str | None) -> Object:
        """All objects of a kind that are looked at (`watched_label`); None = of all namespaces.

        It comes in pages, all of the same moment. The server may forget that moment meanwhile (410): then it is asked
        for the whole at once.
        """
        where = kind.path + (f"/namespaces/{quote(namespace)}" if namespace else "") + f"/{kind.plural}"
        label = watched_label(kind)
        query = {"labelSelector": label} if label else {}
        items: list[Object] = []
        page = {"limit": str(_PAGE)}
        while True:
            try:
                found = await self._call("GET", where, query=query | page)
            except KubeError as error:
                if error.status != 410 or not page:
                    raise
                items, page = [], {}
                continue
            items += found["items"] or ()
            if not (rest := found["metadata"].get("continue")):
                return {**found, "items": items}
            page = {"limit": str(_PAGE), "continue": rest}

    async def apply(self, key: Key, obj: Object) -> Object:
        """Server-side apply as the operator's field manager, with force: what it says holds."""
        meta = {**obj.get("metadata", {}), "name": key.name, "namespace": key.namespace}
        return await self._call(
            "PATCH",
            _path(key),
            query={"fieldManager": MANAGER, "force": "true"},
            body={"apiVersion": key.kind.api_version, "kind": key.kind.kind, **obj, "metadata": meta},
            content="application/apply-patch+yaml",
        )

    async def patch(self, key: Key, change: Object, *, part: str = "") -> Object:
        """Merge `change` into the object, or into its `part` (status, scale).

        With a resourceVersion in it the server refuses (409) if somebody was faster.
        """
        path = _path(key) + (f"/{part}" if part else "")
        content = "application/merge-patch+json"
        return await self._call("PATCH", path, query={"fieldManager": MANAGER}, body=change, content=content)

    async def create(self, kind: Kind, namespace: str, obj: Object) -> Object:
        """Create an object. 409 = there is one of that name."""
        path = f"{kind.path}/namespaces/{quote(namespace)}/{kind.plural}"
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **obj}
        return await self._call("POST", path, query={"fieldManager": MANAGER}, body=body)

    async def replace(self, key: Key, obj: Object) -> Object:
        """Put an object in the place of the one whose resourceVersion it has; 409 = somebody was faster."""
        return await self._call("PUT", _path(key), query={"fieldManager": MANAGER}, body=obj)

    async def delete(self, key: Key, uid: str, *, orphan: bool = False) -> None:
        """Delete the very object of that uid, and what it owns after it (`orphan`: that stays). If it is gone: fine."""
        body = {"propagationPolicy": "Orphan" if orphan else "Background", "preconditions": {"uid": uid}}
        try:
            await self._call("DELETE", _path(key), body=body)
        except KubeError as error:
            if error.status not in (404, 409):
                raise

    async def serves(self, kind: Kind) -> bool:
        """Whether the server has that kind, in that version."""
        try:
            found = await self._call("GET", kind.path)
        except KubeError as error:
            if error.status == 404:
                return False
            raise
        return any(entry["name"] == kind.plural for entry in found.get("resources", ()))

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
    ) -> Object:
        headers = {"Accept": "application/json", "Content-Type": content, "User-Agent": MANAGER}
        url = f"{self._client.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
                answer = await self._client.rest_client.request(
                    method, url, headers=headers, body=body, _request_timeout=_DEADLINE_S
                )
                text = await answer.read()
        except TimeoutError as error:
            raise KubeError(f"{method} {path}: the API server did not answer within {_DEADLINE_S:g} s", 0) from error
        except (aiohttp.ClientError, OSError) as error:
            raise KubeError(f"{method} {path}: the API server cannot be reached: {error}", 0) from error
        self.reached_at = asyncio.get_running_loop().time()
        if 200 <= answer.status < 300:
            try:
                return json.loads(text)  # type: ignore[no-any-return]
            except ValueError as error:  # cut short, or not the API server's
                raise KubeError(f"{method} {path}: the answer is no JSON: {text[:200]!r}", 0) from error
        reason, message, causes = "", text.decode(errors="replace")[:500], []
        with contextlib.suppress(ValueError, AttributeError):  # not the API server's, but some proxy's answer
            told = json.loads(text)
            reason, message = told.get("reason", ""), told.get("message", message)
            causes = [cause.get("message", "") for cause in (told.get("details") or {}).get("causes") or ()]
        what = f"{method} {path}: {answer.status}: {message}"
        raise KubeError(what, answer.status, reason, said=message, causes=causes)


async def connect() -> Kube:
    """Connect with the pod's service account, or else as `kubectl` would. Raises KubeError if there is neither."""
    configuration = kubernetes_client.Configuration()
    loader: Any = kubernetes_config
    try:
        if os.path.exists(_SERVICE_ACCOUNT):  # noqa: ASYNC240 - once, before anything else
            loader.load_incluster_config(configuration)
        else:
            await loader.load_kube_config(client_configuration=configuration)
    except kubernetes_config.ConfigException as error:
        why = f"There are no credentials for a Kubernetes cluster: {error}. Run it in a pod, or set KUBECONFIG."
        raise KubeError(why, 0) from error
    return Kube(kubernetes_client.ApiClient(configuration))


def _path(key: Key) -> str:
    return f"{key.kind.path}/namespaces/{quote(key.namespace)}/{key.kind.plural}/{quote(key.name)}"
