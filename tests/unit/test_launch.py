"""The command line and the environment of an engine rank, to the letter."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tandem.core.heartbeat import Limits
from tandem.core.layout import GroupLayout, plan_group
from tandem.core.types import Role
from tandem.engine.launch import (
    DIST_PORTS,
    KV_BATCHES,
    KV_EVENT_PORTS,
    LaunchError,
    RankEndpoints,
    kv_sources,
    launch_args,
    launch_env,
)
from tandem.models.catalog import load_shape

R1 = load_shape("r1")
TINY = load_shape("tiny")

LAPTOP_PREFILL = GroupLayout(role=Role.PREFILL, nodes=2)
LAPTOP_DECODE = GroupLayout(role=Role.DECODE, nodes=2)
R1_PREFILL = GroupLayout(role=Role.PREFILL, nodes=4, gpus_per_node=8, device="cuda")
R1_DECODE = GroupLayout(role=Role.DECODE, nodes=18, gpus_per_node=8, device="cuda", redundant_experts=32)


def at(rank: int, **values: Any) -> RankEndpoints:
    leader = RankEndpoints(host="127.0.0.1", http_port=30000, dist_init="127.0.0.1:31000", bootstrap_port=8998)
    return msgspec.structs.replace(leader, **({"http_port": 30000 + rank} | values))


def arguments(layout: GroupLayout, rank: int = 0, *extra: str, **values: Any) -> str:
    shape = TINY if layout.device == "cpu" else R1
    return " ".join(launch_args("/model", layout, plan_group(shape, layout), rank, at(rank, **values), extra))


def environment(layout: GroupLayout, rank: int = 0, **values: Any) -> dict[str, str]:
    shape = TINY if layout.device == "cpu" else R1
    return launch_env(layout, plan_group(shape, layout), rank, at(rank, **values))


def test_a_laptops_prefill_leader() -> None:
    assert arguments(LAPTOP_PREFILL, 0) == (
        "--model-path /model --host 127.0.0.1 --port 30000"
        " --nnodes 2 --node-rank 0 --dist-init-addr 127.0.0.1:31000 --tp-size 2 --ep-size 2"
        " --attn-dp-size 2 --moe-dense-tp-size 1 --moe-a2a-backend deepep --deepep-mode normal"
        " --disaggregation-mode prefill --disaggregation-transfer-backend nixl --disaggregation-bootstrap-port 8998"
        " --dtype float32 --page-size 1 --max-total-tokens 8192 --watchdog-timeout 3600 --incremental-streaming-output"
        " --device cpu --attention-backend torch_native --sleep-on-idle --skip-server-warmup"
        " --disable-overlap-schedule"
    )


def test_a_laptops_decode_leader() -> None:
    assert arguments(LAPTOP_DECODE, 0) == (
        "--model-path /model --host 127.0.0.1 --port 30000"
        " --nnodes 2 --node-rank 0 --dist-init-addr 127.0.0.1:31000 --tp-size 2 --ep-size 2"
        " --attn-dp-size 2 --moe-dense-tp-size 1 --moe-a2a-backend deepep --deepep-mode normal"
        " --disaggregation-mode decode --disaggregation-transfer-backend nixl"
        " --dtype float32 --page-size 1 --max-total-tokens 8192 --watchdog-timeout 3600 --incremental-streaming-output"
        " --device cpu --attention-backend torch_native --sleep-on-idle --skip-server-warmup"
        " --disable-overlap-schedule"
    )


@pytest.mark.parametrize("layout", [LAPTOP_PREFILL, LAPTOP_DECODE, R1_PREFILL, R1_DECODE])
def test_a_follower_differs_from_its_leader_in_rank_and_port_alone(layout: GroupLayout) -> None:
    follower = arguments(layout, 0).replace("--port 30000", "--port 30001").replace("--node-rank 0", "--node-rank 1")
    assert arguments(layout, 1) == follower


def test_r1s_prefill_over_four_nodes() -> None:
    assert arguments(R1_PREFILL, 3, host="10.0.0.4", dist_init="10.0.0.1:31000") == (
        "--model-path /model --host 10.0.0.4 --port 30003"
        " --nnodes 4 --node-rank 3 --dist-init-addr 10.0.0.1:31000 --tp-size 32 --ep-size 32"
        " --attn-dp-size 32 --moe-dense-tp-size 1 --enable-dp-lm-head --moe-a2a-backend deepep --deepep-mode normal"
        " --disaggregation-mode prefill --disaggregation-transfer-backend nixl --disaggregation-bootstrap-port 8998"
        " --dtype bfloat16 --page-size 64 --watchdog-timeout 3600 --incremental-streaming-output"
    )


def test_r1s_decode_over_eighteen_nodes() -> None:
    assert arguments(R1_DECODE, 17, host="10.0.1.18", dist_init="10.0.1.1:31000") == (
        "--model-path /model --host 10.0.1.18 --port 30017"
        " --nnodes 18 --node-rank 17 --dist-init-addr 10.0.1.1:31000 --tp-size 144 --ep-size 144"
        " --attn-dp-size 144 --moe-dense-tp-size 1 --enable-dp-lm-head --moe-a2a-backend deepep"
        " --deepep-mode low_latency --ep-num-redundant-experts 32"
        " --disaggregation-mode decode --disaggregation-transfer-backend nixl"
        " --dtype bfloat16 --page-size 64 --watchdog-timeout 3600 --incremental-streaming-output"
    )


def test_a_single_gpu_gets_no_flag_of_a_group() -> None:
    given = arguments(GroupLayout(role=Role.DECODE))
    assert "--tp-size 1" in given
    for flag in ("--ep-size", "--attn-dp-size", "--moe-a2a-backend", "--enable-dp-lm-head", "--moe-dense-tp-size"):
        assert flag not in given


def test_an_own_kv_pool_is_told_to_a_gpu_too() -> None:
    assert "--max-total-tokens 65536" in arguments(msgspec.structs.replace(R1_PREFILL, max_total_tokens=65536))


def test_sglangs_watchdog_is_later_than_every_judgement_of_ours() -> None:
    words = arguments(R1_DECODE).split()
    assert float(words[words.index("--watchdog-timeout") + 1]) > Limits().patient_s


def test_extra_flags_come_last_and_so_win() -> None:
    assert arguments(LAPTOP_DECODE, 0, "--page-size", "16").endswith("--page-size 16")


def test_name_and_weight_version_are_told_to_the_engine() -> None:
    plan = plan_group(TINY, LAPTOP_DECODE)
    given = launch_args("/m", LAPTOP_DECODE, plan, 0, at(0), served_model_name="tiny", weight_version="7")
    assert given[:6] == ["--model-path", "/m", "--served-model-name", "tiny", "--weight-version", "7"]


def test_the_environment_of_a_laptops_prefill_rank() -> None:
    assert environment(LAPTOP_PREFILL) == {
        "TANDEM_ENGINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_CPU_OMP_THREADS_BIND": "0",
        "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
        "SGLANG_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "UCX_TLS": "tcp",
        "UCX_NET_DEVICES": "lo",
        "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "60",
        "SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL": "30",
        "SGLANG_HEALTH_CHECK_TIMEOUT": "5",
    }


def test_the_environment_of_r1s_decode_rank_leaves_the_gpu_and_rdma_alone() -> None:
    assert environment(R1_DECODE, 3, host="10.0.1.4", interface="eth0") == {
        "TANDEM_ENGINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_HOST_IP": "10.0.1.4",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "60",
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
        "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "2",
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "5",
        "SGLANG_HEALTH_CHECK_TIMEOUT": "5",
    }


def test_several_workers_of_a_node_get_a_core_each() -> None:
    layout = GroupLayout(role=Role.DECODE, gpus_per_node=4)
    assert environment(layout)["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1|2|3"


def test_without_a_known_interface_the_libraries_choose() -> None:
    assert "GLOO_SOCKET_IFNAME" not in environment(LAPTOP_DECODE, host="10.77.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_goes_by_its_own_interface(host: str) -> None:
    assert environment(LAPTOP_DECODE, host=host)["UCX_NET_DEVICES"] == "lo"


@pytest.mark.parametrize(
    ("rank", "values", "said"),
    [
        (2, {}, "rank 2 is not in this group of 2 nodes"),
        (-1, {}, "rank -1 is not in this group"),
        (0, {"bootstrap_port": 0}, "a prefill group needs a bootstrap_port"),
        (0, {"dist_init": "127.0.0.1"}, 'it must be "host:port"'),
        (0, {"dist_init": ":31000"}, 'it must be "host:port"'),
        (0, {"dist_init": "127.0.0.1:65530"}, "use a lower one"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused(rank: int, values: dict[str, Any], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        arguments(LAPTOP_PREFILL, rank, **values)


def test_the_highest_port_that_leaves_room_is_taken() -> None:
    assert f":{65536 - DIST_PORTS}" in arguments(LAPTOP_PREFILL, dist_init=f"127.0.0.1:{65536 - DIST_PORTS}")


def test_a_plan_of_another_layout_is_refused() -> None:
    with pytest.raises(LaunchError, match="the plan is for 2 GPUs, but the layout has 1"):
        launch_env(GroupLayout(role=Role.DECODE), plan_group(TINY, LAPTOP_DECODE), 0, at(0))


# KV events


def told(layout: GroupLayout, rank: int, **values: Any) -> tuple[dict[str, Any], list[tuple[int, str, str]]]:
    """What the engine is told of its KV events, and where they are said to be."""
    plan, where = plan_group(TINY if layout.device == "cpu" else R1, layout), at(rank, **values)
    given = launch_args("/m", layout, plan, rank, where)
    config = json.loads(given[given.index("--kv-events-config") + 1])
    return config, [(source.dp_rank, source.events, source.replay) for source in kv_sources(layout, plan, rank, where)]


def test_a_laptops_prefill_rank_publishes_what_it_caches_on_its_own_node() -> None:
    config, sources = told(LAPTOP_PREFILL, 1, kv_events_port=16032, kv_topic="prefill-0/1/")
    assert config == {
        "publisher": "zmq",
        "bind": True,
        "endpoint": "tcp://127.0.0.1:16031",
        "replay_endpoint": "tcp://127.0.0.1:16047",
        "buffer_steps": KV_BATCHES,
        "hwm": KV_BATCHES,
        "topic": "prefill-0/1/",
    }
    # SGLang adds the number of the DP rank, which is 1.
    assert sources == [(1, "tcp://127.0.0.1:16032", "tcp://127.0.0.1:16048")]


def test_the_dp_ranks_of_a_node_publish_on_a_port_each() -> None:
    config, sources = told(R1_PREFILL, 3, host="10.0.0.4", kv_events_port=16032)
    assert config["endpoint"] == f"tcp://10.0.0.4:{16032 - 24}"
    assert [dp_rank for dp_rank, _, _ in sources] == list(range(24, 32))
    ports = {int(url.rpartition(":")[2]) for _, *urls in sources for url in urls}
    assert ports == set(range(16032, 16040)) | set(range(16048, 16056))
    assert max(ports) < 16032 + KV_EVENT_PORTS


def test_gpus_that_share_their_attention_publish_once() -> None:
    layout = msgspec.structs.replace(R1_PREFILL, attn_dp=8)
    assert [[dp_rank for dp_rank, _, _ in told(layout, rank, kv_events_port=16032)[1]] for rank in range(4)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    across = msgspec.structs.replace(R1_PREFILL, attn_dp=2)
    assert [[dp_rank for dp_rank, _, _ in told(across, rank, kv_events_port=16032)[1]] for rank in range(4)] == [
        [0],
        [],
        [1],
        [],
    ]


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        (LAPTOP_PREFILL, {}),
        (LAPTOP_DECODE, {"kv_events_port": 16032}),
        (LAPTOP_PREFILL, {"kv_events_port": 16032, "host": "::1"}),
    ],
)
def test_without_ports_as_decode_and_over_ipv6_nothing_is_published(
    layout: GroupLayout, values: dict[str, Any]
) -> None:
    assert "--kv-events-config" not in arguments(layout, 0, **values)
    assert kv_sources(layout, plan_group(TINY, layout), 0, at(0, **values)) == ()
