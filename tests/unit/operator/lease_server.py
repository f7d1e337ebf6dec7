"""One Lease on a server in memory."""

from __future__ import annotations

from tandem_operator.kube import KubeError
from tandem_operator.names import Key, Kind, Object


class Server:
    """One Lease, with optimistic locking."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.away = False
        self.ending = False
        """Whether its namespace takes nothing new."""

    async def get(self, key: Key) -> Object | None:
        if self.away:
            raise KubeError("away", 0)
        return self.lease

    async def create(self, kind: Kind, namespace: str, obj: Object) -> Object:
        if self.lease is not None:
            raise KubeError("there", 409)
        if self.ending:
            said = "unable to create new content in namespace ai because it is being terminated"
            raise KubeError("403", 403, "Forbidden", said=said)
        self.lease = {**obj, "metadata": {**obj["metadata"], "resourceVersion": "1"}}
        return self.lease

    async def replace(self, key: Key, obj: Object) -> Object:
        assert self.lease is not None
        version = self.lease["metadata"]["resourceVersion"]
        if obj["metadata"]["resourceVersion"] != version:
            raise KubeError("faster", 409)
        self.lease = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(int(version) + 1)}}
        return self.lease
