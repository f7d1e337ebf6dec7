"""What a Fleet says of pods arrives in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem_operator.names import SERVICE, STATEFUL_SET
from tandem_operator.render.pods import IMAGE_USER
from unit.operator.objects import engine, platform

ROOT = Path(__file__).parents[3]
TOLERATION = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("said", "field", "arrives"),
    [
        ({"tolerations": [TOLERATION]}, "tolerations", [TOLERATION]),
        ({"nodeSelector": {"gpu": "h200"}}, "nodeSelector", {"gpu": "h200"}),
        ({"priorityClassName": "urgent"}, "priorityClassName", "urgent"),
        ({"runtimeClassName": "nvidia"}, "runtimeClassName", "nvidia"),
        ({"schedulerName": "mine"}, "schedulerName", "mine"),
        ({"gang": {"scheduler": "volcano"}}, "schedulerName", "volcano"),
        ({"gang": {"scheduler": "volcano"}, "schedulerName": "mine"}, "schedulerName", "mine"),
    ],
)
def test_what_is_said_of_pods_arrives_in_them(said: dict[str, Any], field: str, arrives: object) -> None:
    assert engine(**said)["spec"][field] == arrives
    assert field not in engine()["spec"]


@pytest.mark.parametrize(
    ("said", "where", "arrives"),
    [
        ({"labels": {"team": "a"}}, "labels", {"team": "a"}),
        ({"annotations": {"note": "b"}}, "annotations", {"note": "b"}),
        ({"gang": {"scheduler": "volcano"}}, "annotations", {"scheduling.k8s.io/group-name": "r1-decode-0"}),
        ({"gang": {"scheduler": "coscheduling"}}, "labels", {"scheduling.x-k8s.io/pod-group": "r1-decode-0"}),
    ],
)
def test_what_is_said_of_pods_is_written_on_them(said: dict[str, Any], where: str, arrives: dict[str, str]) -> None:
    assert arrives.items() <= engine(**said)["metadata"][where].items()
    assert not arrives.items() <= engine()["metadata"][where].items()


def test_a_group_stays_what_it_is_whatever_labels_are_given() -> None:
    assert engine(labels={"tandem.dev/group": "mine"})["metadata"]["labels"]["tandem.dev/group"] == "decode-0"


def test_images_are_pulled_with_the_secrets_that_are_named() -> None:
    made = platform(images={"engine": {"name": "e", "pullSecrets": ["mine"]}})
    assert made[STATEFUL_SET, "r1-head"]["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "mine"}]


def test_huge_pages_are_mounted_for_each_size() -> None:
    pod = engine(hugePages={"hugepages-1Gi": "8Gi"})["spec"]
    (volume,) = (volume for volume in pod["volumes"] if volume.get("emptyDir") == {"medium": "HugePages-1Gi"})
    assert volume["name"] in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


def test_a_load_balancers_annotations_are_on_the_gateways_service() -> None:
    service = platform(gateway={"serviceAnnotations": {"lb": "internal"}})[SERVICE, "r1"]
    assert service["metadata"]["annotations"]["lb"] == "internal"


@pytest.mark.parametrize(
    ("ray", "group"),
    [
        pytest.param({"storage": "10Gi"}, 65532, id="the image's own user"),
        pytest.param({"storage": "10Gi", "pods": {"runAsUser": 1000}}, 1000, id="a given user"),
        pytest.param({}, None, id="no volume"),
    ],
)
def test_a_volume_is_made_writable_for_whoever_runs_the_head(ray: dict[str, Any], group: int | None) -> None:
    head = platform(ray=ray)[STATEFUL_SET, "r1-head"]["spec"]["template"]["spec"]
    assert head["securityContext"].get("fsGroup") == group


def test_the_volumes_group_is_that_of_the_images() -> None:
    files = [(ROOT / name / "Dockerfile").read_text() for name in ("platform", "operators")]
    users = {line for text in files for line in text.splitlines() if line.startswith("USER ")}
    assert users == {f"USER {IMAGE_USER}:{IMAGE_USER}"}
