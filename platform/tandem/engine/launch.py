"""From a plan to the command line and environment of one rank's `python -m sglang.launch_server`.

Every flag and variable is one row of a table below: its name, its value (a constant, or a function of the launch), and
the condition under which it is given. All were checked against SGLang 0.5.23.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from tandem.core.kv_source import KvSource
from tandem.core.layout import GroupLayout, ParallelPlan
from tandem.core.types import Role
from tandem.engine.plugin.install import SWITCH

DIST_PORTS = 7
"""Ports that a group's leader listens on from `dist_init` upwards: torch's rendezvous, then SGLang's own between its
processes (`PortArgs.init_new`). Whoever picks the port must find this many free ones in a row."""


KV_EVENT_PORTS = 32
"""Two for each GPU that a node may have."""
KV_BATCHES = 1000
"""Batches of KV events that a DP rank keeps to send them again, and that may wait for one slow subscriber: a few
minutes of prefill, some tens of MB."""


class LaunchError(ValueError):
    """The rank and the addresses do not fit the plan. The message says what is missing."""


class RankEndpoints(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of one rank, chosen by whoever starts the group."""

    host: str
    """Address of this rank's node: its HTTP server listens there, and the other ranks reach it by it."""
    http_port: int
    """Each rank has its own; only rank 0's takes requests, the others answer `/health`."""
    dist_init: str
    """"host:port" of the leader's rendezvous, the same for all ranks of the group; see DIST_PORTS."""
    bootstrap_port: int = 0
    """Prefill only: port of the leader's KV bootstrap server, the same for all ranks."""
    kv_events_port: int = 0
    """Prefill only: the first of KV_EVENT_PORTS ports on `host` where this node's DP ranks publish what they cache, in
    two halves: one port each for their events, one each to send them again. 0 = they do not publish."""
    kv_topic: str = ""
    """What their messages begin with; it names the group and its epoch."""
    interface: str = ""
    """Network interface that holds `host`, such as "eth0"; empty = "lo" for a loopback host, else libraries choose."""


class _Launch(NamedTuple):
    model_path: str
    layout: GroupLayout
    plan: ParallelPlan
    rank: int
    endpoints: RankEndpoints
    served_model_name: str | None = None
    weight_version: str | None = None

    @property
    def interface(self) -> str:
        return self.endpoints.interface or ("lo" if _is_loopback(self.endpoints.host) else "")


_Value = str | int | bool | None | Callable[[_Launch], "str | int | bool | None"]
_Condition = Callable[[_Launch], bool]


class _Row(NamedTuple):
    name: str
    value: _Value
    """True gives a flag without a value; None leaves it out."""
    when: _Condition


def _always(launch: _Launch) -> bool:
    return True


def _cpu(launch: _Launch) -> bool:
    return launch.layout.device == "cpu"


def _prefill(launch: _Launch) -> bool:
    return launch.layout.role is Role.PREFILL


def _decode(launch: _Launch) -> bool:
    return launch.layout.role is Role.DECODE


def _several_gpus(launch: _Launch) -> bool:
    return launch.plan.tp > 1


def _dp_attention(launch: _Launch) -> bool:
    return launch.plan.attn_dp > 1


def _cuda_dp_attention(launch: _Launch) -> bool:
    return _dp_attention(launch) and not _cpu(launch)


def _all_to_all(launch: _Launch) -> bool:
    return launch.plan.all_to_all


def _redundant_experts(launch: _Launch) -> bool:
    return launch.plan.redundant_experts > 0


def _has_interface(launch: _Launch) -> bool:
    return bool(launch.interface)


def _cpu_with_interface(launch: _Launch) -> bool:
    return _cpu(launch) and _has_interface(launch)


def _cuda_with_interface(launch: _Launch) -> bool:
    return not _cpu(launch) and _has_interface(launch)


def _deepep_mode(launch: _Launch) -> str:
    # Normal moves many rows at once; low latency has fixed buffers of 128 rows that CUDA graphs can hold.
    # Our dispatcher for the CPU stands in for the normal one.
    return "normal" if _cpu(launch) or _prefill(launch) else "low_latency"


def _kv_pool(launch: _Launch) -> int | None:
    # SGLang measures a GPU's memory itself, better than we estimate it.
    return launch.plan.kv_tokens_per_rank if _cpu(launch) else launch.layout.max_total_tokens


def _publishes_kv(launch: _Launch) -> bool:
    # SGLang's sockets know no IPv6; without events the router goes by what it has sent where.
    return _prefill(launch) and launch.endpoints.kv_events_port > 0 and ":" not in launch.endpoints.host


def _kv_dp_ranks(launch: _Launch) -> range:
    """The DP ranks whose KV cache is published by this node: SGLang lets the first GPU of each do it."""
    per_node, per_dp_rank = launch.layout.gpus_per_node, launch.plan.tp // launch.plan.attn_dp
    first, end = launch.rank * per_node, (launch.rank + 1) * per_node
    return range(-(-first // per_dp_rank), -(-end // per_dp_rank))


def _kv_ports(launch: _Launch) -> tuple[int, int]:
    first = launch.endpoints.kv_events_port
    return first, first + KV_EVENT_PORTS // 2


def _kv_events(launch: _Launch) -> str:
    # SGLang adds the DP rank's number in the whole group, while each node has a block of ports of its own.
    before = _kv_dp_ranks(launch).start
    events, replay = (f"tcp://{launch.endpoints.host}:{port - before}" for port in _kv_ports(launch))
    config = {
        "publisher": "zmq",
        "bind": True,
        "endpoint": events,
        "replay_endpoint": replay,
        "buffer_steps": KV_BATCHES,
        "hwm": KV_BATCHES,
        "topic": launch.endpoints.kv_topic,
    }
    return msgspec.json.encode(config).decode()


FLAGS: tuple[_Row, ...] = (
    _Row("--model-path", lambda x: x.model_path, _always),
    _Row("--served-model-name", lambda x: x.served_model_name, _always),
    _Row("--weight-version", lambda x: x.weight_version, _always),
    _Row("--host", lambda x: x.endpoints.host, _always),
    _Row("--port", lambda x: x.endpoints.http_port, _always),
    # the group
    _Row("--nnodes", lambda x: x.layout.nodes, _always),
    _Row("--node-rank", lambda x: x.rank, _always),
    _Row("--dist-init-addr", lambda x: x.endpoints.dist_init, _always),
    _Row("--tp-size", lambda x: x.plan.tp, _always),
    _Row("--ep-size", lambda x: x.plan.ep, _several_gpus),
    # DP attention: every GPU its own requests. --dp-size stays away: beside --attn-dp-size it means whole replicas.
    _Row("--attn-dp-size", lambda x: x.plan.attn_dp, _dp_attention),
    _Row("--moe-dense-tp-size", 1, _dp_attention),
    # With a head of its own a rank no longer learns how many rows the others have, which our CPU dispatcher builds on.
    _Row("--enable-dp-lm-head", True, _cuda_dp_attention),
    _Row("--moe-a2a-backend", "deepep", _all_to_all),
    _Row("--deepep-mode", _deepep_mode, _all_to_all),
    _Row("--ep-num-redundant-experts", lambda x: x.plan.redundant_experts, _redundant_experts),
    # prefill and decode apart
    _Row("--disaggregation-mode", lambda x: str(x.layout.role), _always),
    _Row("--disaggregation-transfer-backend", "nixl", _always),
    _Row("--disaggregation-bootstrap-port", lambda x: x.endpoints.bootstrap_port, _prefill),
    # memory
    _Row("--dtype", lambda x: x.plan.dtype, _always),
    _Row("--page-size", lambda x: x.plan.page_size, _always),
    _Row("--max-total-tokens", _kv_pool, _always),
    # Seconds. Hangs are noticed by the rank's actor, which lets kernels be compiled for half an hour
    # (`core/heartbeat.py`); SGLang's own watchdog ends a scheduler after 300 s of one batch, whatever it does.
    _Row("--watchdog-timeout", 3600, _always),
    # What is cached where, for the router.
    _Row("--kv-events-config", _kv_events, _publishes_kv),
    # Without it every event of a stream repeats all its tokens so far.
    _Row("--incremental-streaming-output", True, _always),
    # the CPU engine
    _Row("--device", "cpu", _cpu),
    _Row("--attention-backend", "torch_native", _cpu),
    _Row("--sleep-on-idle", True, _cpu),
    # Nothing to compile, so a warm-up only delays readiness.
    _Row("--skip-server-warmup", True, _cpu),
    # Overlap hides the scheduler behind a GPU. On a CPU there is nothing to hide behind: each stream would compute one
    # step too many, and prefill would take a torch.cuda.Event when a prefix is cached.
    _Row("--disable-overlap-schedule", True, _cpu),
)

ENVIRONMENT: tuple[_Row, ...] = (
    # Tandem's own hooks in SGLang, on every device.
    _Row(SWITCH, 1, _always),
    _Row("TOKENIZERS_PARALLELISM", "false", _always),
    # What must be set before the engine is imported is in `engine/cpu/launch_server.py`.
    # SGLang wants a core list per local worker, or one NUMA node each; without its AMX kernels nothing is bound.
    _Row("SGLANG_CPU_OMP_THREADS_BIND", lambda x: "|".join(map(str, range(x.layout.gpus_per_node))), _cpu),
    # It keeps named shared memory, which a killed engine leaves behind; and in network namespaces that share /dev/shm
    # the ranks would take each other for local ones and hang.
    _Row("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", 0, _cpu),
    # Which way the ranks and the KV go. In a network namespace SGLang cannot find its own address.
    _Row("SGLANG_HOST_IP", lambda x: x.endpoints.host, _always),
    _Row("GLOO_SOCKET_IFNAME", lambda x: x.interface, _has_interface),
    _Row("NCCL_SOCKET_IFNAME", lambda x: x.interface, _cuda_with_interface),
    _Row("UCX_TLS", "tcp", _cpu),
    _Row("UCX_NET_DEVICES", lambda x: x.interface, _cpu_with_interface),
    # Seconds. The gateway's deadlines and the controller's health checks act first; these are what is left when the
    # gateway has died too, so they are short beside SGLang's 300, yet longer than a queue in front of a busy group.
    _Row("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", 60, _prefill),
    _Row("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", 60, _decode),
    _Row("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL", 2, _decode),  # SGLang takes no less
    _Row("SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE", 2, _decode),
    _Row("SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT", 5, _decode),
    _Row("SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL", 30, _prefill),
    _Row("SGLANG_HEALTH_CHECK_TIMEOUT", 5, _always),
)


def launch_args(
    model_path: str,
    layout: GroupLayout,
    plan: ParallelPlan,
    rank: int,
    endpoints: RankEndpoints,
    extra: Sequence[str] = (),
    *,
    served_model_name: str | None = None,
    weight_version: str | None = None,
) -> list[str]:
    """Arguments of rank `rank` (0 … nodes-1), to follow `python -m sglang.launch_server` or, on a CPU,
    `python -m tandem.engine.cpu.launch_server`.

    `extra` comes last, so it overrides: SGLang takes the last of two like flags. Raises LaunchError when the rank is
    not one of the group's, or an address is missing.
    """
    launch = _Launch(str(model_path), layout, plan, rank, endpoints, served_model_name, weight_version)
    _check(launch)
    arguments: list[str] = []
    for name, value in _chosen(FLAGS, launch):
        arguments += [name] if value is True else [name, str(value)]
    return [*arguments, *extra]


def launch_env(layout: GroupLayout, plan: ParallelPlan, rank: int, endpoints: RankEndpoints) -> dict[str, str]:
    """Environment of the same process, to be laid over the inherited one. Raises LaunchError as `launch_args` does."""
    launch = _Launch("", layout, plan, rank, endpoints)
    _check(launch)
    return {name: str(value) for name, value in _chosen(ENVIRONMENT, launch)}


def kv_sources(layout: GroupLayout, plan: ParallelPlan, rank: int, endpoints: RankEndpoints) -> tuple[KvSource, ...]:
    """Where the same process tells what its DP ranks cache. Raises LaunchError as `launch_args` does."""
    launch = _Launch("", layout, plan, rank, endpoints)
    _check(launch)
    if not _publishes_kv(launch):
        return ()
    events, replay = _kv_ports(launch)
    return tuple(
        KvSource(
            dp_rank=dp_rank,
            events=f"tcp://{endpoints.host}:{events + place}",
            replay=f"tcp://{endpoints.host}:{replay + place}",
            topic=endpoints.kv_topic,
        )
        for place, dp_rank in enumerate(_kv_dp_ranks(launch))
    )


def _chosen(rows: tuple[_Row, ...], launch: _Launch) -> list[tuple[str, str | int | bool]]:
    chosen = []
    for name, given, when in rows:
        if not when(launch):
            continue
        value = given(launch) if callable(given) else given
        if value is not None:
            chosen.append((name, value))
    return chosen


def _check(launch: _Launch) -> None:
    layout, endpoints = launch.layout, launch.endpoints
    if not 0 <= launch.rank < layout.nodes:
        raise LaunchError(f"rank {launch.rank} is not in this group of {layout.nodes} nodes, counted from 0")
    if launch.plan.tp != layout.gpus:
        raise LaunchError(f"the plan is for {launch.plan.tp} GPUs, but the layout has {layout.gpus}: plan it anew")
    if _prefill(launch) and not endpoints.bootstrap_port:
        raise LaunchError("a prefill group needs a bootstrap_port, where decode ranks fetch its KV addresses")
    host, _, port = endpoints.dist_init.rpartition(":")
    if not (host and port.isdecimal()):
        raise LaunchError(f'dist_init is {endpoints.dist_init!r}; it must be "host:port" of the leader')
    if int(port) + DIST_PORTS > 65536:
        raise LaunchError(f"the {DIST_PORTS} ports from dist_init port {port} on end beyond 65535: use a lower one")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name
