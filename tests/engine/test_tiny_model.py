"""The tiny model in transformers' own `DeepseekV3ForCausalLM`: it loads whole, counts alike and says many things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, DeepseekV3ForCausalLM
from transformers.utils import logging

from tandem.models.catalog import load_shape
from tandem.models.tiny import ensure_tiny
from tandem.models.tokenizer import BOS, EOS

torch.set_num_threads(1)
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ensure_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    loaded: Any = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def greedy(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Tokens, and how far each was ahead of the next likely one."""
    said: list[int] = []
    gaps: list[float] = []
    cache, new = None, prompt
    with torch.no_grad():
        for _ in range(tokens):
            out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            best = out.logits[0, -1].float().topk(2)
            cache, new = out.past_key_values, [int(best.indices[0])]
            said += new
            gaps.append(float(best.values[0] - best.values[1]))
    return said, gaps


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"layers": 2, "experts": 8, "heads": 4, "seed": 3}])
def test_it_loads_with_no_tensor_missing_or_left_over(tmp_path: Path, options: dict[str, Any]) -> None:
    ensure_tiny(tmp_path / "tiny", **options)
    loaded: Any = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "tiny", dtype="auto", output_loading_info=True)
    _, report = loaded
    assert not any(report.values()), report


@pytest.mark.parametrize("model_name", ["tiny", "r1"])
def test_the_parameter_count_is_that_of_the_real_model(tmp_path: Path, model_name: str) -> None:
    shape = load_shape(model_name)
    if model_name == "tiny":
        ensure_tiny(tmp_path / "tiny")
        config = AutoConfig.from_pretrained(tmp_path / "tiny")
    else:
        source = Path(load_shape.__code__.co_filename).parent / "shapes" / "deepseek-r1.json"
        config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        real = DeepseekV3ForCausalLM(config)  # type: ignore[no-untyped-call]
    assert sum(tensor.numel() for tensor in real.state_dict().values()) == shape.parameters


def test_the_context_reaches_4096_tokens_by_yarn(model: Any) -> None:
    assert model.config.max_position_embeddings >= 4096
    assert model.config.rope_parameters["rope_type"] == "yarn"


def test_greedy_streams_neither_loop_nor_hang_by_a_hair(model: Any, tokenizer: Any) -> None:
    for prompt in ("Hello, how are you?", "def f(x):", "你好"):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said, gaps = greedy(model, ids, 48)
        assert len(set(said)) > 24
        assert min(gaps) > 1e-4  # far above what the order of float32 additions changes


def test_a_chat_answers_reasoning_ends(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    said, _ = greedy(model, list(prompt["input_ids"]), 96)
    assert tokenizer.convert_tokens_to_ids("</think>") in said
    assert tokenizer.bos_token_id not in said


def test_autotokenizer_reads_special_tokens_and_conversation_format(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert text == f"{BOS}<｜User｜>hello<｜Assistant｜><think>\n"


def test_transformers_renders_tool_calls_as_plain_jinja_does(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "<b>"}}}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        tokenize=False,
    )
    assert '<｜tool▁sep｜>f\n```json\n{"a": "<b>"}\n```<｜tool▁call▁end｜>' in text
    assert '{"name": "f", "parameters": {}}\n' in text
