"""The shape of a model: counts that are published, and configurations that contradict themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.shape import ModelShape, ShapeError
from tandem.models.catalog import load_shape
from tandem.models.tiny import tiny_config

R1 = load_shape("r1")
TINY = load_shape("tiny")


def tiny_with(**values: object) -> ModelShape:
    config = tiny_config() | values
    return ModelShape.from_config({key: value for key, value in config.items() if value != "absent"})


def test_r1_has_671_billion_parameters() -> None:
    assert R1.parameters == 671_026_419_200


def test_about_37_billion_of_them_work_on_a_token() -> None:
    assert R1.active_parameters == pytest.approx(37e9, rel=0.02)


def test_r1_caches_70272_bytes_per_token_in_bf16() -> None:
    assert R1.kv_bytes_per_token(2) == 70_272


def test_plain_multi_head_attention_would_cache_71_times_as_much() -> None:
    assert R1.mha_kv_bytes_per_token(2) == 4_997_120
    assert round(R1.mla_saving) == 71


@pytest.mark.parametrize("shape", [R1, TINY], ids=lambda shape: shape.name)
def test_the_tensors_add_up_to_the_parameters(shape: ModelShape) -> None:
    assert sum(weight.size for weight in shape.weights()) == shape.parameters == shape.parameters_by_part.total


@given(
    dense=st.integers(0, 4),
    shared=st.integers(0, 2),
    q_lora=st.none() | st.integers(1, 64),
    tied=st.booleans(),
    per_token=st.integers(1, 8),
)
def test_every_variant_counts_what_it_lists(
    dense: int, shared: int, q_lora: int | None, tied: bool, per_token: int
) -> None:
    shape = tiny_with(
        first_k_dense_replace=dense,
        n_shared_experts=shared,
        q_lora_rank=q_lora,
        tie_word_embeddings=tied,
        num_experts_per_tok=per_token,
    )
    assert sum(weight.size for weight in shape.weights()) == shape.parameters
    assert 0 < shape.active_parameters <= shape.parameters


def test_a_token_that_uses_every_expert_leaves_only_embedding_rows_unread() -> None:
    shape = tiny_with(n_group=1, topk_group=1, num_experts_per_tok=16)
    assert shape.parameters - shape.active_parameters == (shape.vocab_size - 1) * shape.hidden_size


def test_kimi_k2_is_of_this_architecture() -> None:
    # Published figures of Kimi K2: 1 T parameters, 32 B active.
    k2 = ModelShape.from_config(
        tiny_config()
        | {
            "model_type": "kimi_k2",
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 1,
            "num_attention_heads": 64,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 384,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "intermediate_size": 18432,
            "vocab_size": 163840,
        }
    )
    assert k2.parameters == pytest.approx(1.03e12, rel=0.01)
    assert k2.active_parameters == pytest.approx(32e9, rel=0.03)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "Tandem serves DeepseekV3ForCausalLM"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": "256"}, "hidden_size is '256'; it must be a whole number of 1 or more"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; of this architecture only 'noaux_tc' is supported"),
        ({"n_group": 3}, "n_routed_experts 16 is not divisible by n_group 3"),
        ({"n_group": 16}, "leaves 1 expert in a group"),
        ({"topk_group": 5}, "topk_group 5 is more than n_group 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace 5 is more than the 4 layers"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim 15 is odd"),
    ],
)
def test_an_impossible_config_is_refused_in_one_sentence(values: dict[str, object], said: str) -> None:
    with pytest.raises(ShapeError) as refused:
        tiny_with(**values)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
