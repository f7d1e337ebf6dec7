"""Prompts to token ids, as transformers makes them, without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gateway_model import ids_of, inner, model_folder, tokenizer

from tandem.gateway.api.tools import ToolFormat
from tandem.gateway.text.chat_template import ChatTemplate, TemplateRefusal, load_template
from tandem.gateway.text.model_card import ModelError, load_card
from tandem.gateway.text.tokenize import Tokenizer
from tandem.models.tokenizer import BOS, BOS_ID


def test_a_conversation_becomes_the_models_own_prompt() -> None:
    prompt = tokenizer().chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert prompt.ids == ids_of(f"{BOS}S<｜User｜>U<｜Assistant｜><think>\n")
    assert prompt.thinking


def test_a_plain_prompt_begins_with_one_begin_token() -> None:
    assert tokenizer().encode("hi") == [BOS_ID, *ids_of("hi")]


def test_the_begin_token_is_added_where_only_the_configuration_asks_for_it() -> None:
    bare = json.loads(inner().to_str()) | {"post_processor": None}
    made = Tokenizer(type(inner()).from_str(json.dumps(bare)), None, BOS)
    assert made.encode("hi") == [BOS_ID, *ids_of("hi")]


def test_a_folder_is_loaded_whole(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "some-model")
    assert Tokenizer.load(folder).chat([{"role": "user", "content": "U"}]).ids[0] == BOS_ID
    assert load_card(folder).name == "some-model"
    assert load_card(folder, "r1").name == "r1"


def test_a_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}x{{ messages | tojson }}", encoding="utf-8")
    template = load_template(folder)
    assert template is not None
    assert template.render([{"role": "user", "content": "<é>"}]) == f'{BOS}x[{{"role": "user", "content": "<é>"}}]'


def test_a_template_may_refuse_and_cannot_escape_its_sandbox() -> None:
    with pytest.raises(TemplateRefusal, match="no system"):
        ChatTemplate("{{ raise_exception('no system') }}", {}).render([])
    with pytest.raises(TemplateRefusal):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render([])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_card(tmp_path)


HELLO = [{"role": "user", "content": "U"}]
THINKING = f"{BOS}<｜User｜>U<｜Assistant｜><think>\n"


def test_thinking_that_is_not_wanted_is_closed_at_once() -> None:
    prompt = tokenizer().chat(HELLO, thinking=False)
    assert prompt.ids == ids_of(f"{BOS}<｜User｜>U<｜Assistant｜><think>\n\n</think>\n\n")
    assert not prompt.thinking


def test_a_template_that_can_do_both_is_told() -> None:
    template = ChatTemplate("{{ '<think>' if thinking is defined and thinking else '</think>' }}", {})
    made = Tokenizer(inner(), template)
    assert [made.chat(HELLO, thinking=mode).thinking for mode in (True, False, None)] == [True, False, False]
    assert made.chat(HELLO, thinking=False).ids == ids_of("</think>")


@pytest.mark.parametrize(
    ("begun", "text", "thinking"),
    [
        ({"content": "So"}, "\n</think>\n\nSo", False),
        ({"content": "So", "reasoning_content": "I think"}, "I think\n</think>\n\nSo", False),
        ({"content": "", "reasoning_content": "I think"}, "I think", True),
    ],
)
def test_an_answer_that_is_begun_goes_on(begun: dict[str, str], text: str, thinking: bool) -> None:
    prompt = tokenizer().chat([*HELLO, {"role": "assistant", **begun}], prefix=True)
    assert prompt == (ids_of(THINKING + text), thinking)


TOOL = {"type": "function", "function": {"name": "now"}}


def test_a_template_without_a_place_for_tools_has_them_in_a_system_message() -> None:
    bare = ChatTemplate("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}", {})
    found = inner().decode(Tokenizer(inner(), bare).chat(HELLO, [TOOL]).ids, skip_special_tokens=False)
    assert found.startswith("[system]## Tools")
    assert '{"name": "now"}' in found
    assert found.endswith("[user]U")


def test_a_template_with_one_lists_them_itself() -> None:
    found = inner().decode(tokenizer().chat(HELLO, [TOOL]).ids, skip_special_tokens=False)
    assert found.count("## Tools") == 1
    assert tokenizer().tool_format is ToolFormat.R1
