"""Which templates make another revision, and which make another KV format."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_operator.api.pool import EngineTemplate
from tandem_operator.revision import kv_format_of, revision_of, weights_in, weights_of


def template(**changes: Any) -> EngineTemplate:
    return EngineTemplate.model_validate({"image": {"name": "engine:1"}, **changes})


def revision(**changes: Any) -> str:
    return revision_of(template(**changes), nodes=2, gpus_per_node=8)


def kv_format(*args: str, **changes: Any) -> str:
    return kv_format_of(template(args=list(args), **changes))


def test_a_revision_is_ten_hex_digits_and_stays_the_same_over_releases() -> None:
    """Another number here would roll every fleet when its operator is upgraded."""
    assert revision() == "32bb65fa60"


def test_equal_templates_have_the_same_revision_however_they_are_written() -> None:
    written = {"env": {"B": "2", "A": "1"}, "modelPath": "/r1"}
    assert revision(**written) == revision(model_path="/r1", env={"A": "1", "B": "2"})


def test_a_default_that_is_written_out_changes_nothing() -> None:
    pods = {"shared_memory": "16Gi", "gang": {"scheduler": "none"}, "resources": {"requests": {}}}
    assert revision(device="cuda", args=[], redundant_experts=0, pods=pods) == revision()


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"name": "engine:2"}},
        {"args": ["--page-size", "32"]},
        {"env": {"A": "1"}},
        {"max_total_tokens": 4096},
        {"kv_format": "r1-fp8"},
        {"pods": {"annotations": {"tandem.dev/restarted": "1"}}},
        {"model_volume": {"claim": "models"}},
        {"model_path": "/models/r1"},
        {"model_version": "0528"},
    ],
)
def test_whatever_changes_a_pod_makes_another_revision(change: dict[str, Any]) -> None:
    assert revision(**change) != revision()


def test_the_order_of_flags_counts() -> None:
    assert revision(args=["--a", "--b"]) != revision(args=["--b", "--a"])


@pytest.mark.parametrize("shape", [(3, 8), (2, 4), (8, 2)])
def test_another_shape_is_another_revision(shape: tuple[int, int]) -> None:
    assert revision_of(template(), *shape) != revision()


def test_a_kv_format_that_somebody_said_is_taken_as_it_is() -> None:
    assert kv_format(kv_format="r1-fp8", image={"name": "engine:2"}) == "r1-fp8"


def test_another_image_counts_as_another_kv_format() -> None:
    assert kv_format(image={"name": "engine:2"}) != kv_format()


@pytest.mark.parametrize("flag", [("--kv-cache-dtype", "fp8_e4m3"), ("--page-size=32",), ("--dtype", "float32")])
def test_a_flag_that_changes_kv_pages_makes_another_kv_format(flag: tuple[str, ...]) -> None:
    assert kv_format(*flag) != kv_format()


def test_other_flags_and_environment_leave_the_kv_format_alone() -> None:
    changed = kv_format("--max-running-requests", "64", env={"A": "1"}, pods={"shared_memory": "32Gi"})
    assert changed == kv_format()


def test_of_two_like_flags_the_last_one_counts() -> None:
    assert kv_format("--page-size", "16", "--page-size=32") == kv_format("--page-size", "32")


def test_prefill_and_decode_of_one_image_pair_although_their_other_flags_differ() -> None:
    decode = kv_format("--enable-two-batch-overlap", max_total_tokens=8192, redundant_experts=32)
    assert decode == kv_format("--chunked-prefill-size", "8192")


def test_weights_have_the_version_that_somebody_gave_them() -> None:
    assert weights_of(template(model_path="/models/r1", model_version="0528")) == ("/models/r1", "0528")


def test_weights_without_a_version_get_one_that_no_other_path_has() -> None:
    path, version = weights_of(template(model_path="/models/r1"))
    assert (path, version) == ("/models/r1", "r1-9cb54911")
    assert weights_of(template(model_path="/others/r1")).version != version
    assert weights_of(template()) == ("", "1")


@pytest.mark.parametrize("change", [{}, {"model_path": "/r1"}, {"model_path": "/r1", "model_version": "2"}])
def test_a_template_on_the_server_declares_what_it_did_here(change: dict[str, str]) -> None:
    made = template(**change)
    assert weights_in(made.model_dump(mode="json", by_alias=True, exclude_none=True)) == weights_of(made)
    assert weights_in(made.model_dump(mode="json", by_alias=True)) == weights_of(made)
