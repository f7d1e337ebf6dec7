"""The Kubernetes API with plain dictionaries, through the official client's connection.

The client's classes cost milliseconds per pod and hide fields that they don't know; a kubelet needs neither.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException

Object = dict[str, Any]

STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"
TIMEOUT_S = 30.0
_RETRY_S = 0.2

TRANSIENT = (urllib3.exceptions.HTTPError, OSError)
"""What a server that is away or being restarted makes of a request."""


def path(kind: str, namespace: str | None = None, name: str | None = None, *, group: str = "v1") -> str:
    """Path of a kind, or of one object: `group` is `v1` or as `apps/v1`, `kind` the plural and perhaps `/status`."""
    base = f"/api/{group}" if "/" not in group else f"/apis/{group}"
    plural, _, sub = kind.partition("/")
    parts = [base, *(["namespaces", namespace] if namespace else []), plural, *([name] if name else [])]
    return "/".join(parts) + (f"/{sub}" if sub else "")


class Stopped(Exception):
    """The kubelet is being stopped."""


class Rest:
    """Requests that wait out a server that is away."""

    def __init__(self, api: client.ApiClient, stopped: threading.Event) -> None:
        self._pool = api.rest_client.pool_manager
        self._host = api.configuration.host
        self._stopped = stopped

    def request(self, method: str, where: str, body: Any = None, *, content: str | None = None, **query: Any) -> Any:
        """One request, once. Raises ApiException for an answer of 400 or more, TRANSIENT when there is none."""
        answer = self._pool.request(
            method,
            self._host + where + (f"?{urlencode(query)}" if query else ""),
            body=None if body is None else json.dumps(body),
            headers={"Accept": "application/json", "Content-Type": content or "application/json"},
            timeout=TIMEOUT_S,
        )
        if answer.status >= 400:
            raise ApiException(http_resp=answer, body=answer.data.decode(errors="replace"), data=None)
        return json.loads(answer.data)

    def persist(self, method: str, where: str, body: Any = None, *, content: str | None = None, **query: Any) -> Any:
        """The same, again and again until the server answers. Raises ApiException for 400 to 499, and Stopped."""
        while True:
            if self._stopped.is_set():
                raise Stopped
            try:
                return self.request(method, where, body, content=content, **query)
            except ApiException as error:
                if error.status < 500 and error.status != 429:
                    raise
            except TRANSIENT:
                pass  # it is away; the wait below is the answer
            self._stopped.wait(_RETRY_S)

    def watch(self, where: str, version: str, within: float) -> Iterator[Object]:
        """Events after a version, for `within` seconds at most. Raises as `request` does."""
        query = urlencode({"watch": "true", "resourceVersion": version, "timeoutSeconds": int(within)})
        url = f"{self._host}{where}?{query}"
        with self._pool.request("GET", url, preload_content=False, timeout=within + 10) as answer:
            if answer.status >= 400:
                raise ApiException(status=answer.status, reason=answer.reason)
            rest = b""
            for piece in answer.stream(None):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (json.loads(line) for line in lines if line)
