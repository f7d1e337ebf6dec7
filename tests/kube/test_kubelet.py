"""The process kubelet: pods really run, reach each other, and get what their specs promise."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from kube.cluster import Cluster
from kube.kubelet import Image
from kube.manifests import claim, config_map, pod, secret, service, workload
from kube.pods import FOREVER, SOON, end_of, fetch, gone, main_status, output, ready, serve

# What runs.


def test_a_deployment_answers_through_its_service(cluster: Cluster, namespace: str) -> None:
    web = workload("Deployment", "web", 2, pod("web", *serve("$HOSTNAME")))
    cluster.apply(web, service("web", 80), namespace=namespace)
    address = cluster.address("web", namespace)
    answers: set[str] = set()

    def both() -> bool:
        answers.add(fetch(address))
        return len(answers) == 2

    cluster.wait(both, SOON, "an answer of each pod")
    assert all(one.startswith("web-") for one in answers)


def test_a_service_without_endpoints_refuses(cluster: Cluster, namespace: str) -> None:
    cluster.apply(service("nobody", 80), namespace=namespace)
    address = cluster.address("nobody", namespace)

    def refused() -> bool:
        try:
            urllib.request.urlopen(f"http://{address}/", timeout=5).close()
        except urllib.error.URLError as error:
            return isinstance(error.reason, ConnectionRefusedError)
        return False

    cluster.wait(refused, SOON, "a refusal")


def test_pods_of_a_stateful_set_find_each_other_by_their_names(cluster: Cluster, namespace: str) -> None:
    read = "import urllib.request as u; print(u.urlopen('http://peer-1.peer:8000').read())"
    script = f'until python -c "{read}"; do sleep 0.5; done & {serve("I am $HOSTNAME")[2]}'
    template = pod("peer", "sh", "-c", script)
    headless = service("peer", 8000, clusterIP="None")
    peers = workload("StatefulSet", "peer", 2, template, serviceName="peer", podManagementPolicy="Parallel")
    cluster.apply(headless, peers, namespace=namespace)
    cluster.wait(lambda: "I am peer-1" in cluster.kubelet.logs("peer-0", namespace=namespace), SOON, "peer-1's answer")


def test_every_pod_has_an_address_of_its_own_and_a_new_one_next_time(cluster: Cluster, namespace: str) -> None:
    seen = set()
    for _ in range(2):
        cluster.apply(pod("a", *FOREVER), namespace=namespace)
        ready(cluster, namespace, "a")
        found = cluster.pod("a", namespace)
        assert found is not None
        seen.add(found["status"]["podIP"])
        cluster.kubectl("delete", "pod", "a", "--namespace", namespace, "--grace-period", "1")
        gone(cluster, namespace, "a")
    assert len(seen) == 2


def test_a_pod_sees_its_own_processes_alone(cluster: Cluster, namespace: str) -> None:
    assert output(cluster, namespace, "sh", "-c", "echo $$$$ /proc/[0-9]*") == "1 /proc/1"


def test_a_job_completes(cluster: Cluster, namespace: str) -> None:
    template = {"spec": pod("job", "true", restartPolicy="Never")["spec"]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"}, "spec": {"template": template}}
    cluster.apply(job, namespace=namespace)

    def succeeded() -> bool:
        found = cluster.get("jobs", "once", namespace, group="batch/v1")
        return found is not None and found["status"].get("succeeded") == 1

    cluster.wait(succeeded, SOON, "the job's success")


def test_a_pod_talks_to_the_api_server_as_its_service_account(cluster: Cluster, namespace: str) -> None:
    script = """
import os, ssl, urllib.error, urllib.request
own = "/var/run/secrets/kubernetes.io/serviceaccount"
url = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}/api/v1/secrets"
asked = urllib.request.Request(url, headers={"Authorization": "Bearer " + open(f"{own}/token").read()})
try:
    urllib.request.urlopen(asked, context=ssl.create_default_context(cafile=f"{own}/ca.crt"))
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""
    said = output(cluster, namespace, "python", "-c", script)
    assert said.startswith("403")
    assert f"system:serviceaccount:{namespace}:default" in said


# What it is given.


def test_environment_of_every_kind(cluster: Cluster, namespace: str) -> None:
    cluster.apply(config_map("map", one="1", two="2"), secret("hidden", key="open"), namespace=namespace)
    env = [
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "ONE", "valueFrom": {"configMapKeyRef": {"name": "map", "key": "one"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "hidden", "key": "key"}}},
        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "BOTH", "value": "$(ONE) and $(KEY), $$(ONE), $(NOBODY)"},
    ]
    container = {
        "env": env,
        "envFrom": [{"prefix": "MAP_", "configMapRef": {"name": "map"}}],
        "resources": {"limits": {"cpu": "3"}},
    }
    said = output(cluster, namespace, "env", container=container).splitlines()
    values = dict(line.partition("=")[::2] for line in said)
    found = cluster.pod("once", namespace)
    assert found is not None
    assert values["NODE"] == found["spec"]["nodeName"]
    assert values["ADDRESS"] == found["status"]["podIP"]
    assert (values["ONE"], values["KEY"], values["CPU"], values["MAP_two"]) == ("1", "open", "3", "2")
    assert values["BOTH"] == "1 and open, $(ONE), $(NOBODY)"


def test_volumes_of_every_kind(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    cluster.apply(config_map("map", file="from a map"), secret("hidden", file="from a secret"), namespace=namespace)
    (tmp_path / "file").write_text("from the host")
    volumes = [
        {"name": "map", "configMap": {"name": "map", "items": [{"key": "file", "path": "sub/name"}]}},
        {"name": "hidden", "secret": {"secretName": "hidden"}},
        {"name": "host", "hostPath": {"path": str(tmp_path)}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "labels", "downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    ]
    mounts = [{"name": one["name"], "mountPath": f"/vol/{one['name']}"} for one in volumes]
    script = (
        "cat sub/name ../hidden/file ../host/file ../labels/l; df -B1 --output=size ../memory; stat -f -c %T ../memory"
    )
    container = {"volumeMounts": mounts, "workingDir": "/vol/map"}
    said = output(cluster, namespace, "sh", "-c", script, volumes=volumes, container=container)
    assert said.startswith('from a mapfrom a secretfrom the hostapp="once"')
    assert said.endswith("1048576\ntmpfs")


def test_a_read_only_root_is_one_and_its_volumes_are_not(cluster: Cluster, namespace: str) -> None:
    container = {
        "securityContext": {"readOnlyRootFilesystem": True},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    script = "touch /tmp/file && echo written; touch /file 2>&1"
    said = output(
        cluster, namespace, "sh", "-c", script, volumes=[{"name": "tmp", "emptyDir": {}}], container=container
    )
    assert said.startswith("written")
    assert "Read-only file system" in said


def test_what_a_pod_writes_on_its_root_stays_there(cluster: Cluster, namespace: str) -> None:
    output(cluster, namespace, "sh", "-c", "echo mine > /etc/written-by-a-pod")
    assert not Path("/etc/written-by-a-pod").exists()


def test_a_claim_outlives_the_pod_that_wrote_to_it(cluster: Cluster, namespace: str) -> None:
    kept = {
        "volumes": [{"name": "kept", "persistentVolumeClaim": {"claimName": "kept"}}],
        "container": {"volumeMounts": [{"name": "kept", "mountPath": "/kept"}]},
    }
    writer = pod("writer", "sh", "-c", "echo still here > /kept/file", restartPolicy="Never", **kept)
    cluster.apply(claim("kept"), writer, namespace=namespace)
    end_of(cluster, "writer", namespace)
    cluster.kubectl("delete", "pod", "writer", "--namespace", namespace)
    assert output(cluster, namespace, "cat", "/kept/file", **kept) == "still here"


def test_init_containers_run_one_after_the_other_before_the_rest(cluster: Cluster, namespace: str) -> None:
    mounts = [{"name": "work", "mountPath": "/work-of-init"}]
    init = [
        {"name": name, "image": "test", "command": ["sh", "-c", command], "volumeMounts": mounts}
        for name, command in (("first", "echo a > /work-of-init/f"), ("second", "echo b >> /work-of-init/f"))
    ]
    volumes = [{"name": "work", "emptyDir": {}}]
    container = {"volumeMounts": mounts}
    said = output(
        cluster, namespace, "cat", "/work-of-init/f", volumes=volumes, initContainers=init, container=container
    )
    assert said == "a\nb"


def test_an_image_may_stand_for_an_environment(cluster: Cluster, namespace: str) -> None:
    cluster.kubelet.images["tandem:v2"] = Image(env={"VERSION": "2"})
    assert output(cluster, namespace, "sh", "-c", "echo $VERSION", container={"image": "tandem:v2"}) == "2"


def test_an_image_that_is_missing_is_pulled_once_it_is_there(cluster: Cluster, namespace: str) -> None:
    cluster.kubelet.missing_images.add("nowhere:v1")
    cluster.apply(pod("late", *FOREVER, container={"image": "nowhere:v1"}), namespace=namespace)

    def cannot() -> bool:
        waiting = main_status(cluster, "late", namespace)["state"].get("waiting", {})
        return waiting.get("reason") in ("ErrImagePull", "ImagePullBackOff")

    cluster.wait(cannot, SOON, "ErrImagePull")
    cluster.kubelet.missing_images.discard("nowhere:v1")
    ready(cluster, namespace, "late")
