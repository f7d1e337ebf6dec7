"""Children of fleets, pools and groups: pure functions of their specs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem.config import FleetConfig
from tandem.core.types import Role
from tandem.fleet.plan import plan_pool
from tandem.models.catalog import load_shape
from tandem_operator.names import (
    BUDGET,
    CONFIG_MAP,
    COSCHEDULING_GANG,
    FLEET_GROUPS,
    SERVICE,
    STATEFUL_SET,
    VOLCANO_GANG,
    Key,
    Kind,
    Object,
)
from tandem_operator.render.config import SpecError, fleet_config, fleet_spec
from tandem_operator.render.group import group_children
from tandem_operator.render.platform import passing_names, platform_children
from tandem_operator.render.pool import pool_budget, pool_object
from tandem_operator.revision import weights_of
from unit.operator.objects import engine, fleet, group, platform, pool, spec_of


def env(container: Object) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


# -- fleet.json


def written(**spec: Any) -> FleetConfig:
    return FleetConfig.model_validate_json(platform(**spec)[CONFIG_MAP, "r1-config"]["data"]["fleet.json"])


def test_fleet_json_is_a_configuration_for_a_cluster() -> None:
    config = written()
    assert config.gateway.host == config.control.host == "0.0.0.0"
    assert config.state.url == "redis://r1-redis.ai.svc:6379/0"
    assert config.ray.group_resources


def test_the_operator_puts_the_groups_so_fleet_json_has_none() -> None:
    pools = [written(decode={"groups": 5, "autoscaling": {"maxGroups": 9}}).decode, written().prefill]
    assert [(found.groups, found.autoscaling) for found in pools] == [(0, None), (0, None)]


def test_gateways_are_told_of_roles_whose_last_group_goes_while_nobody_asks() -> None:
    assert written(decode={"autoscaling": {"minGroups": 0}}).gateway.summoned == ("decode",)
    assert written(decode={"autoscaling": {"minGroups": 1}}).gateway.summoned == ()


def test_what_differs_between_groups_is_not_in_fleet_json() -> None:
    assert written(decode={"args": ["--x"], "env": {"A": "b"}}) == written()


def test_the_head_checks_a_layout_with_its_redundant_experts() -> None:
    config = written(decode={"nodes": 18, "redundantExperts": 32, "maxTotalTokens": 4096})
    plan = plan_pool(config, Role.DECODE, load_shape("r1"))
    assert (plan.redundant_experts, config.decode.max_total_tokens) == (32, 4096)


def test_routing_aims_at_the_slo() -> None:
    routing = written(slo={"ttftSeconds": 3, "itlSeconds": 0.5}).routing
    assert (routing.ttft_s, routing.itl_s) == (3, 0.5)


def test_the_urls_of_secrets_are_not_in_fleet_json() -> None:
    made = platform(redis={"urlSecret": {"name": "mine", "key": "url"}})
    assert "TANDEM_STATE_URL" in made[CONFIG_MAP, "r1-config"]["data"]["fleet.json"]
    head = made[STATEFUL_SET, "r1-head"]["spec"]["template"]["spec"]["containers"][0]
    assert env(head)["TANDEM_STATE_URL"] == {"secretKeyRef": {"name": "mine", "key": "url"}}


def test_certificates_are_where_the_gateway_finds_them() -> None:
    made = platform(gateway={"tlsSecret": "cert"})
    tls = json.loads(made[CONFIG_MAP, "r1-config"]["data"]["fleet.json"])["gateway"]["tls"]
    pod = made[STATEFUL_SET, "r1-gateway"]["spec"]["template"]["spec"]
    mount = next(mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "tls")
    assert tls["certificate"] == f"{mount['mountPath']}/tls.crt"
    assert pod["containers"][0]["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"


def test_a_wrong_spec_is_told_by_field() -> None:
    with pytest.raises(SpecError, match=r"spec\.prefill\.nodes: .*greater than or equal to 1"):
        fleet_spec(fleet(prefill={"nodes": 0})["spec"])


def test_a_rule_over_several_fields_is_told_too() -> None:
    with pytest.raises(SpecError, match=r"spec: its groups need 32 GPUs at least, above planning\.gpuBudget \(8\)"):
        fleet_spec(fleet(planning={"gpuBudget": 8})["spec"])


def test_a_name_that_is_too_long_for_a_fleet_is_told() -> None:
    with pytest.raises(SpecError, match="name"):
        fleet_config("a" * 40, "ai", spec_of(fleet()))


# -- head, gateway, redis


def test_every_child_belongs_to_its_fleet() -> None:
    for body in platform().values():
        assert body["metadata"]["ownerReferences"][0]["uid"] == "fleet-uid"
        assert body["metadata"]["labels"]["tandem.dev/fleet"] == "r1"


def test_a_fleet_has_head_gateway_and_redis_with_services() -> None:
    assert set(platform()) == {
        (CONFIG_MAP, "r1-config"),
        *((STATEFUL_SET, f"r1-{part}") for part in ("head", "gateway", "redis")),
        *((SERVICE, name) for name in ("r1", "r1-head", "r1-redis")),
        (BUDGET, "r1-gateway"),
    }


def test_every_child_that_not_every_fleet_has_is_known_for_removal() -> None:
    without = platform(redis={"urlSecret": {"name": "mine", "key": "url"}})
    assert {Key(kind, "ai", name) for kind, name in platform().keys() - without.keys()} == set(
        passing_names("r1", "ai")
    )


def test_only_the_head_is_told_the_secret_url_of_redis() -> None:
    spec = fleet(redis={"urlSecret": {"name": "mine", "key": "url"}})
    made, own = group(spec)
    children = {**platform_children(spec, spec_of(spec), BUDGET), **group_children(made, own)}
    knowing = {
        key.name
        for key, body in children.items()
        if key.kind is STATEFUL_SET and "secretKeyRef" in json.dumps(body["spec"]["template"])
    }
    assert knowing == {"r1-head"}


def test_only_the_head_is_given_the_tenants_of_a_secret() -> None:
    made = platform(tenantsSecret="theirs")
    assert {name for (_, name), body in made.items() if "theirs" in json.dumps(body)} == {"r1-head"}
    assert [name for (_, name), body in made.items() if "TANDEM_TENANTS" in json.dumps(body)] == ["r1-head"]


@pytest.mark.parametrize(("ray", "update"), [({}, "OnDelete"), ({"storage": "10Gi"}, "RollingUpdate")])
def test_a_head_that_forgets_with_its_pod_is_not_replaced_by_itself(ray: dict[str, str], update: str) -> None:
    assert platform(ray=ray)[STATEFUL_SET, "r1-head"]["spec"]["updateStrategy"] == {"type": update}


def test_a_gateway_has_time_left_after_its_drain() -> None:
    pod = platform()[STATEFUL_SET, "r1-gateway"]["spec"]["template"]["spec"]
    drain = int(env(pod["containers"][0])["TANDEM_DRAIN_S"])
    assert drain + 30 <= pod["terminationGracePeriodSeconds"]


def test_an_external_redis_is_not_run() -> None:
    made = platform(redis={"urlSecret": {"name": "mine", "key": "url"}})
    assert not any(name == "r1-redis" for _, name in made)


def test_a_gateway_takes_requests_before_there_is_a_pair_since_they_can_wait_in_it() -> None:
    container = platform()[STATEFUL_SET, "r1-gateway"]["spec"]["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"


def test_gateways_are_as_many_as_the_fleet_says() -> None:
    assert platform(gateway={"replicas": 3})[STATEFUL_SET, "r1-gateway"]["spec"]["replicas"] == 3


def test_a_change_of_the_configuration_restarts_no_pod() -> None:
    before, after = platform(), platform(timeouts={"drainSeconds": 7})
    assert before[CONFIG_MAP, "r1-config"] != after[CONFIG_MAP, "r1-config"]
    assert before[STATEFUL_SET, "r1-head"] == after[STATEFUL_SET, "r1-head"]


def test_a_head_with_storage_remembers_on_a_volume() -> None:
    head = platform(ray={"storage": "10Gi", "storageClass": "fast"})[STATEFUL_SET, "r1-head"]["spec"]
    claim = head["volumeClaimTemplates"][0]
    assert claim["spec"]["resources"] == {"requests": {"storage": "10Gi"}}
    assert claim["metadata"]["name"] not in {volume["name"] for volume in head["template"]["spec"]["volumes"]}


def test_the_platform_image_is_for_head_and_gateway_only() -> None:
    made = platform(images={"engine": {"name": "e"}, "platform": {"name": "p"}, "redis": {"name": "r"}})
    parts = {name: body["spec"]["template"]["spec"]["containers"][0]["image"] for (kind, name), body in made.items()
             if kind is STATEFUL_SET}  # fmt: skip
    assert parts == {"r1-head": "p", "r1-gateway": "p", "r1-redis": "r"}


# -- engines


def test_a_group_has_a_pod_for_each_node_and_starts_them_together() -> None:
    made, spec = group(fleet(decode={"nodes": 18}))
    body = group_children(made, spec)[Key(STATEFUL_SET, "ai", "r1-decode-0")]["spec"]
    assert (body["replicas"], body["podManagementPolicy"], body["serviceName"]) == (18, "Parallel", "r1-decode-0")


def test_an_upgrade_of_the_operator_restarts_no_engine() -> None:
    made, spec = group(fleet())
    body = group_children(made, spec)[Key(STATEFUL_SET, "ai", "r1-decode-0")]["spec"]
    assert body["updateStrategy"] == {"type": "OnDelete"}


def test_ranks_are_found_before_they_are_ready() -> None:
    made, spec = group(fleet())
    body = group_children(made, spec)[Key(SERVICE, "ai", "r1-decode-0")]["spec"]
    assert body["clusterIP"] == "None"
    assert body["publishNotReadyAddresses"]


def test_an_engine_joins_its_own_group() -> None:
    container = engine()["spec"]["containers"][0]
    assert container["command"] == ["tandem", "node", "join", "--group", "decode-0"]
    told = env(container)
    assert told["TANDEM_GCS"] == "r1-head.ai.svc:6380"
    assert told["TANDEM_CONTROL"] == "r1-head.ai.svc:9000"
    assert told["TANDEM_GROUP"] == "decode-0"
    assert told["TANDEM_GPUS"] == "8"
    assert told["TANDEM_HOST"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_an_engine_asks_for_its_gpus_and_devices() -> None:
    asked = engine(
        gpuResource="amd.com/gpu",
        rdma={"rdma/hca": 1},
        hugePages={"hugepages-2Mi": "4Gi"},
        resources={"requests": {"cpu": "8"}, "limits": {"memory": "1Ti"}},
    )["spec"]["containers"][0]["resources"]
    own = {"amd.com/gpu": "8", "rdma/hca": "1", "hugepages-2Mi": "4Gi"}
    assert asked == {"requests": {"cpu": "8", **own}, "limits": {"memory": "1Ti", **own}}


def test_a_group_on_cpu_asks_for_no_gpus() -> None:
    made, spec = group(fleet(device="cpu"))
    pod = group_children(made, spec)[Key(STATEFUL_SET, "ai", "r1-decode-0")]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"] == {}
    assert env(pod["containers"][0])["TANDEM_GPUS"] == "0"


def test_a_pod_that_is_stopped_leaves_first_and_has_time_to() -> None:
    pod = engine(terminationGraceSeconds=300)["spec"]
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["tandem", "node", "leave"]
    assert int(env(pod["containers"][0])["TANDEM_LEAVE_S"]) < pod["terminationGracePeriodSeconds"] == 300


def test_shared_memory_and_pinned_memory_are_given() -> None:
    pod = engine(sharedMemory="64Gi")["spec"]
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_pinned_memory_can_be_done_without() -> None:
    assert engine(ipcLock=False)["spec"]["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_host_network_keeps_the_clusters_names() -> None:
    pod = engine(hostNetwork=True)["spec"]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


def test_each_pod_of_a_group_has_a_node_of_its_own() -> None:
    terms = engine()["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms[0]["topologyKey"] == "kubernetes.io/hostname"
    assert terms[0]["labelSelector"]["matchLabels"]["tandem.dev/group"] == "decode-0"


@pytest.mark.parametrize("required", [True, False])
def test_a_groups_pods_share_a_rack(required: bool) -> None:
    affinity = engine(topology={"key": "rack", "required": required})["spec"]["affinity"]["podAffinity"]
    assert list(affinity) == [f"{'required' if required else 'preferred'}DuringSchedulingIgnoredDuringExecution"]


def test_a_given_affinity_stays_beside_our_own() -> None:
    given = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "mine"}]}}
    terms = engine(affinity=given)["spec"]["affinity"]["podAntiAffinity"]
    keys = [term["topologyKey"] for term in terms["requiredDuringSchedulingIgnoredDuringExecution"]]
    assert keys == ["mine", "kubernetes.io/hostname"]


def test_a_gang_scheduler_is_told_how_many_pods_belong_together() -> None:
    assert engine()["metadata"]["annotations"]["tandem.dev/gang-size"] == "2"


@pytest.mark.parametrize(("scheduler", "kind"), [("volcano", VOLCANO_GANG), ("coscheduling", COSCHEDULING_GANG)])
def test_a_pod_group_is_made_for_a_scheduler_that_wants_one(scheduler: str, kind: Kind) -> None:
    made, spec = group(fleet(decode={"pods": {"gang": {"scheduler": scheduler}}}))
    assert group_children(made, spec)[Key(kind, "ai", "r1-decode-0")]["spec"]["minMember"] == 2


def test_kueue_finds_its_queue_on_the_stateful_set() -> None:
    made, spec = group(fleet(decode={"pods": {"gang": {"scheduler": "kueue", "queue": "gpus"}}}))
    labels = group_children(made, spec)[Key(STATEFUL_SET, "ai", "r1-decode-0")]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"


@pytest.mark.parametrize(
    ("model", "mounted"),
    [
        ({"volume": {"claim": "weights"}}, "/models"),
        ({"path": "/models/r1", "volume": {"claim": "weights"}}, "/models"),
        ({"path": "/data/r1", "volume": {"hostPath": "/mnt/r1"}}, "/data/r1"),
    ],
)
def test_the_checkpoint_is_where_every_pod_looks_for_it(model: dict[str, Any], mounted: str) -> None:
    made, spec = group(fleet(model=model))
    pod = group_children(made, spec)[Key(STATEFUL_SET, "ai", "r1-decode-0")]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["model"] == mounted
    assert str(written(model=model).model.path).startswith(mounted)
    assert spec.template.model_path is not None


@pytest.mark.parametrize(
    ("model", "version"),
    [({"path": "/models/r1"}, "r1-9cb54911"), ({"path": "/models/r1", "version": "0528"}, "0528"), ({}, "1")],
)
def test_head_and_groups_are_told_the_same_version_of_the_weights(model: dict[str, Any], version: str) -> None:
    made = fleet(model=model)
    assert written(model=model).model.version == version
    assert weights_of(group(made)[1].template) == (model.get("path", ""), version)


def test_nobody_gets_the_rights_of_a_service_account() -> None:
    assert engine()["spec"]["automountServiceAccountToken"] is False


# -- pools


def test_a_pool_says_nothing_of_its_replicas() -> None:
    made = pool_object(fleet(decode={"groups": 4}), spec_of(fleet(decode={"groups": 4})), Role.DECODE)
    assert "replicas" not in made["spec"]
    assert made["metadata"]["annotations"][FLEET_GROUPS] == "4"


@pytest.mark.parametrize(("fleet_says", "said"), [(True, True), (False, None)])
def test_the_pause_of_one_pool_belongs_to_whoever_paused_it(fleet_says: bool, said: bool | None) -> None:
    wanted = fleet(paused=fleet_says)
    assert pool_object(wanted, spec_of(wanted), Role.DECODE)["spec"].get("paused") is said


def test_a_user_that_is_given_is_never_root_by_accident() -> None:
    assert engine(runAsUser=1000)["spec"]["securityContext"]["runAsNonRoot"] is True
    assert engine(runAsUser=0)["spec"]["securityContext"]["runAsNonRoot"] is False
    assert "runAsNonRoot" not in engine()["spec"]["securityContext"]


def test_a_group_drains_before_it_is_gone() -> None:
    assert group(fleet())[0]["metadata"]["finalizers"] == ["tandem.dev/drain"]


def test_the_budget_of_a_pool_counts_the_pods_of_all_its_groups() -> None:
    made, spec = pool(fleet())
    selector = pool_budget(made, spec, 1)["spec"]["selector"]["matchLabels"]
    pods = engine()["metadata"]["labels"]
    assert selector.items() <= pods.items()
    assert "tandem.dev/group" not in selector
