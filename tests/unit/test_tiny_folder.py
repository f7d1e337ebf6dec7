"""The folder of the tiny model: the same bytes everywhere, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tandem.cli.model import app
from tandem.core.shape import ModelShape
from tandem.models.catalog import load_shape
from tandem.models.tiny import MARK, TinyError, ensure_tiny

SMALL: dict[str, Any] = {"layers": 2, "experts": 8, "hidden_size": 128}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def contents_of(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_with_r1s_mla_a_token_takes_as_much_kv_per_layer_as_in_r1(tmp_path: Path) -> None:
    ensure_tiny(tmp_path / "wide", mla="r1", **SMALL)
    wide = ModelShape.from_config(json.loads((tmp_path / "wide" / "config.json").read_text()))
    r1 = load_shape("r1")
    assert (wide.kv_lora_rank, wide.qk_rope_head_dim) == (r1.kv_lora_rank, r1.qk_rope_head_dim)


def test_the_default_model_is_the_same_on_every_machine(tmp_path: Path) -> None:
    ensure_tiny(tmp_path / "tiny")
    assert digests(tmp_path / "tiny") == {
        "config.json": "c2ee7f586d3ce7e0a50c543d7ba35bcdf04c80f5cc2dc71617ec2c9279a9d6c3",
        "generation_config.json": "a0611b790e87859a12ece618b49c0a2647910f1bfb6c6caeb874104c08015a64",
        "model.safetensors": "4def9a4d6d05a778bac539d92cba6a191d90050dea13a4b4d3a0ea838053481f",
        "tandem.json": "a83f848cda05719ff9792bb9f65de4590dbee90a704636fccc603619e3fd9162",
        "tokenizer.json": "c18e84652c5f1fecaebcf7ef213eaa93472fd87464dd53fee504d924b3115ba4",
        "tokenizer_config.json": "34d24026a1f37b484cd332302badab309267868d371cc6a3e6b1cab13adcff70",
    }


def test_a_bfloat16_model_is_the_same_on_every_machine(tmp_path: Path) -> None:
    ensure_tiny(tmp_path / "tiny", dtype="bfloat16", **SMALL)
    assert (
        digests(tmp_path / "tiny")["model.safetensors"]
        == "7cadfcddf23536b27cd806b4ba452c0c70b218f987d86e4750210d5952ef0f22"
    )


def test_other_seeds_give_other_weights_and_the_same_tokenizer(tmp_path: Path) -> None:
    for seed in (0, 1):
        ensure_tiny(tmp_path / str(seed), seed=seed, **SMALL)
    first, second = digests(tmp_path / "0"), digests(tmp_path / "1")
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors", MARK}


def test_more_layers_leave_the_first_ones_as_they_were(tmp_path: Path) -> None:
    ensure_tiny(tmp_path / "2", layers=2)
    ensure_tiny(tmp_path / "3", layers=3)
    tensor = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert raw_tensor(tmp_path / "2", tensor) == raw_tensor(tmp_path / "3", tensor)


def raw_tensor(folder: Path, name: str) -> bytes:
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    return data[start + begin : start + end]


def test_a_complete_model_is_left_alone(tmp_path: Path) -> None:
    assert ensure_tiny(tmp_path / "tiny", **SMALL)
    before = (tmp_path / "tiny").stat().st_ino
    assert not ensure_tiny(tmp_path / "tiny", **SMALL)
    assert (tmp_path / "tiny").stat().st_ino == before


def test_other_options_make_it_anew(tmp_path: Path) -> None:
    ensure_tiny(tmp_path / "tiny", **SMALL)
    assert ensure_tiny(tmp_path / "tiny", **SMALL | {"experts": 12})
    assert load_shape(tmp_path / "tiny").routed_experts == 12
    assert contents_of(tmp_path) == ["tiny"]


@pytest.mark.parametrize("harm", ["model.safetensors", "config.json", MARK])
def test_a_damaged_model_is_made_anew(tmp_path: Path, harm: str) -> None:
    ensure_tiny(tmp_path / "tiny", **SMALL)
    whole = digests(tmp_path / "tiny")
    (tmp_path / "tiny" / harm).write_text("{}")
    assert ensure_tiny(tmp_path / "tiny", **SMALL)
    assert digests(tmp_path / "tiny") == whole


def test_what_a_killed_maker_left_behind_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".tiny.making" / "new").mkdir(parents=True)
    (tmp_path / ".tiny.making" / "new" / "config.json").write_text("half")
    ensure_tiny(tmp_path / "tiny", **SMALL)
    assert contents_of(tmp_path) == ["tiny"]


def test_several_makers_at_once_make_it_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: ensure_tiny(tmp_path / "tiny", **SMALL), range(4)))
    assert sorted(made) == [False, False, False, True]


def test_somebody_elses_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TinyError, match="holds files that Tandem did not make"):
        ensure_tiny(tmp_path, **SMALL)
    assert contents_of(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": 15}, "n_routed_experts 15 is not divisible by n_group 4"),
        ({"experts_per_token": 9}, "more than the 8 experts"),
        ({"layers": 1}, "of 1 layers at least one must have experts"),
        ({"layers": 0}, "layers is 0; it must be 1 or more"),
        ({"hidden_size": 100}, "must be a multiple of 64"),
        ({"context": 1024}, "must be a multiple of 1024, and 2048 or more"),
        ({"dtype": "int8"}, "must be float32 or bfloat16"),
        ({"mla": "v2"}, "must be tiny or r1"),
        ({"seed": -1}, "it must be 0 or more"),
        ({"expert": 8}, "unknown field `expert`"),
    ],
)
def test_options_that_make_no_model_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(TinyError) as refused:
        ensure_tiny(tmp_path / "tiny", **options)
    assert said in str(refused.value)
    assert contents_of(tmp_path) == []


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_make_says_whether_it_made_anything(tmp_path: Path) -> None:
    folder = str(tmp_path / "tiny")
    assert run("make", folder, "--layers", "2") == (0, f"{folder}: made\n")
    assert run("make", folder, "--layers", "2") == (0, f"{folder}: already there\n")


def test_make_answers_a_wrong_option_with_a_sentence(tmp_path: Path) -> None:
    code, output = run("make", str(tmp_path / "tiny"), "--experts", "15")
    assert code == 1
    assert output.startswith("error: n_routed_experts 15 is not divisible")


def test_describe_prints_r1s_published_figures() -> None:
    code, output = run("describe", "r1")
    assert code == 0
    for figure in ("671.0 B", "36.6 B", "70,272 bytes", "71 times"):
        assert figure in output


def test_describe_as_json_counts_a_folders_model(tmp_path: Path) -> None:
    ensure_tiny(tmp_path / "mine", **SMALL)
    code, output = run("describe", str(tmp_path / "mine"), "--json")
    facts = json.loads(output)
    assert code == 0
    assert facts["name"] == "mine"
    assert facts["parameters"] == load_shape(tmp_path / "mine").parameters


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "config.json is missing"),
        ("{", "config.json is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "Tandem serves DeepseekV3ForCausalLM"),
    ],
)
def test_describe_says_what_is_wrong_with_a_folder(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, output = run("describe", str(tmp_path))
    assert code == 1
    assert said in output
