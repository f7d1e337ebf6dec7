"""The words of the system as values: roles, groups, ranks, states.

They are immutable `msgspec` structs, so the same object is what `core/` decides on, what the store holds (JSON) and
what `tandem status --json` prints.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from tandem.core.kv_source import KvSource


class Role(StrEnum):
    """Which half of a request a group serves."""

    PREFILL = "prefill"
    DECODE = "decode"


class GroupState(StrEnum):
    """Life of an expert-parallel group: starting → ready → cordoned → draining → gone, or failed."""

    STARTING = "starting"
    READY = "ready"
    CORDONED = "cordoned"
    DRAINING = "draining"
    GONE = "gone"
    FAILED = "failed"


class RankState(StrEnum):
    """Life of one engine process of a group."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """One engine process (one `sglang.launch_server`) of a group, on one node."""

    rank: int
    state: RankState = RankState.PENDING
    node: str = ""
    """Ray node id (hex) that holds the rank."""
    host: str = ""
    """Address that the other ranks reach it by."""
    pid: int = 0
    """PID of the engine's main process; its process group has the same number."""
    log: str = ""
    """Path of the engine's log file on its node."""
    detail: str = ""
    """What it is doing, or how it died, in one sentence."""
    metrics: str = ""
    """URL of what its engine has counted, in Prometheus' text format. Empty while there is none."""
    kv_events: tuple[KvSource, ...] = ()
    """Where its DP ranks tell what they cache; prefill only."""
    pod: str = ""
    """Kubernetes pod that it runs in; empty elsewhere."""
    kube_node: str = ""
    """Kubernetes node of that pod."""


NO_NODES = "waits for nodes"
"""So begins the reason of a group that has not been given its nodes."""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """One expert-parallel group as the fleet sees it. The store holds it under `groups/<id>`."""

    group: str
    role: Role
    epoch: int
    """Raised at each restart; what an older epoch still says is dropped."""
    state: GroupState
    reason: str = ""
    url: str = ""
    """HTTP URL of rank 0, the only rank that takes requests. Empty until known."""
    bootstrap_host: str = ""
    """Prefill only: where decode ranks find the KV bootstrap server."""
    bootstrap_port: int = 0
    dp_size: int = 1
    """DP ranks that a request can be routed to (`routed_dp_rank` in 0 … dp_size-1)."""
    weight_version: str = ""
    since: float = 0.0
    """Unix seconds when it entered this state."""
    ranks: tuple[Rank, ...] = ()
    migrate_at: float = 0.0
    """Unix seconds; from then on gateways move what it still decodes to other groups. 0 = they do not."""
    weights_path: str = ""
    """Folder of its weights on every node; empty = the fleet's own (`model.path`)."""
    loading: str = ""
    """Weight version that it is being given. Until that has ended, nobody knows which one it has. Empty = none."""
    refused: str = ""
    """Weight version that it was told to take and could not; it keeps its own. Empty = none."""
    revision: str = ""
    """Of the wish that this epoch was started by (`GroupSpec.revision`)."""
    kv_format: str = ""
    """Groups of different ones are never paired (`GroupSpec.kv_format`)."""
    failures: int = 0
    """It had failed so often in a row when it last failed; one that had been ready for long began anew."""

    @property
    def routable(self) -> bool:
        """Whether new pairs may use it."""
        return self.state is GroupState.READY


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the engines of one group are to be started, in place of what the configuration says of its pool."""

    args: tuple[str, ...] = ()
    """Further flags."""
    env: dict[str, str] = {}
    """Further environment."""
    redundant_experts: int = 0
    max_total_tokens: int | None = None
    """KV pool per DP rank, in tokens; None = what fits."""


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One group that should exist. The store holds it under `desired/<id>`.

    Another revision, KV format or engine takes effect when the group starts again; it does not restart one that runs.
    """

    group: str
    role: Role
    nodes: int
    gpus_per_node: int = 1
    cordoned: bool = False
    """No new pairs; what runs goes on."""
    draining: bool = False
    """Leave when the last room is closed, at the latest at `drain_deadline`."""
    drain_deadline: float = 0.0
    """Unix seconds; 0 while not draining."""
    migrate_at: float = 0.0
    """Unix seconds from when its streams are moved while it drains; 0 = shortly before the deadline."""
    weights_path: str = ""
    """Folder of the weights on every node; empty = the fleet's own (`model.path`)."""
    weight_version: str = ""
    """Version of the weights that it should serve; empty = those it has, or the fleet's own."""
    revision: str = ""
    """Names all that makes it as it is: image, flags, pods. Two groups of the same one are alike."""
    kv_format: str = ""
    """What its KV means to another group beyond the weights: engine, flags. Groups of different ones never pair."""
    engine: EngineSettings | None = None
    """None = as the configuration says of its pool."""
    declared_path: str = ""
    """Folder of the weights that its revision declares; empty = the one that the fleet began with. What it should serve
    is in `weights_path`: another one, if the weights were refreshed since (`declared.py`)."""
    declared_version: str = ""
    """Version of these weights; empty = it declares none, and has what the fleet has."""


class DpLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Load of one DP rank of a group, from SGLang's `/v1/loads`."""

    dp_rank: int
    running: int = 0
    waiting: int = 0
    waiting_uncached_tokens: int = 0
    token_usage: float = 0.0
    """Share of the KV pool in use, 0 to 1."""
    used_tokens: int = 0
    max_total_tokens: int = 0


class GatewayReplica(msgspec.Struct, frozen=True, kw_only=True):
    """One listening gateway replica. The store holds it under `gateways/<id>` with an expiry that it renews."""

    replica: str
    url: str
    pid: int
    node: str = ""
    grpc: str = ""
    """"host:port" of `tandem.v1.Inference`."""
    incarnation: str = ""
    """What the engines' request ids of this very run begin with."""


class PoolPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What autoscaling last decided for a pool."""

    role: Role
    wanted: int = 0
    """Groups that it should have."""
    reason: str = ""
    """Why so many, in one sentence."""
    since: float = 0.0
    """When that was decided, in Unix seconds."""
    held: str = ""
    """What keeps it from acting now, in one sentence. Empty = nothing."""


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A whole fleet at one revision: what `tandem status --json` prints and the control API tells."""

    name: str = ""
    model_path: str = ""
    """Folder of the checkpoint on every node."""
    model_name: str = ""
    """The model's name in the API."""
    model_version: str = ""
    groups: tuple[Group, ...] = ()
    desired: tuple[GroupSpec, ...] = ()
    gateways: tuple[GatewayReplica, ...] = ()
    revision: int = 0
    """Rises with every change in the fleet's store; the snapshot holds at least all changes up to it."""
    plans: tuple[PoolPlan, ...] = ()
    """Of the pools whose size follows the load, where the fleet's own controller sees to that."""
    refreshing: str = ""
    """Weight version that a refresh gives the groups now, or gives them again on its way back. Empty = none."""
