"""Prompts to text and token ids: chat template, system prompt, beginning-of-sequence, and what is too long."""

from __future__ import annotations

import json
from typing import Any

import pytest

from maestro_pl.data.rendering import PromptRenderer
from maestro_pl.data.rows import Row
from maestro_pl.errors import UserError
from tests.support import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Without a chat template, and with Llama's habit of beginning every text with BOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("plain")
    make_tokenizer(path)
    loaded = AutoTokenizer.from_pretrained(path)
    loaded.chat_template = None
    bos = (loaded.bos_token, loaded.bos_token_id)
    loaded.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return loaded


def row(prompt: Any, number: int = 1) -> Row:
    return Row({"prompt": prompt, "reference": None, "task": "t"}, "a.jsonl", number, 0)


def test_a_string_becomes_a_user_message_and_ids_match_the_text(tokenizer: Any) -> None:
    rendered = PromptRenderer(tokenizer).render([row("hi"), row([{"role": "user", "content": "ho"}])], "train")
    assert rendered[0].text == "<s>user\nhi</s>\n<s>assistant\n"
    assert rendered[1].text == "<s>user\nho</s>\n<s>assistant\n"
    messages = [{"role": "user", "content": "hi"}]
    direct = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert rendered[0].ids.tolist() == direct
    # one BOS a turn, as the template writes them; none in front
    assert direct.count(tokenizer.bos_token_id) == 2
    assert tokenizer.decode(rendered[0].ids.tolist()) == rendered[0].text


def test_system_prompt_goes_in_front_unless_there_is_one(tokenizer: Any) -> None:
    renderer = PromptRenderer(tokenizer, system_prompt="be kind")
    assert renderer.text("hi").startswith("<s>system\nbe kind</s>\n<s>user\nhi</s>\n")
    own = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert renderer.text(own) == "<s>system\nbe brief</s>\n<s>user\nhi</s>\n<s>assistant\n"


def test_chat_template_kwargs_reach_the_template(tokenizer: Any) -> None:
    from copy import deepcopy

    own = deepcopy(tokenizer)
    own.chat_template = "{{ mood }}:{{ messages[0]['content'] }}"
    assert PromptRenderer(own, chat_template_kwargs={"mood": "calm"}).text("hi") == "calm:hi"


def test_without_a_template_the_text_is_plain_after_bos(plain: Any) -> None:
    renderer = PromptRenderer(plain, system_prompt="be kind")
    rendered = renderer.render([row("hi")], "train")[0]
    assert rendered.text == "<s>be kind\n\nhi"
    assert rendered.ids.tolist() == plain("be kind\n\nhi")["input_ids"]
    assert rendered.ids.tolist().count(plain.bos_token_id) == 1


def test_a_template_that_refuses_messages_names_the_row(tokenizer: Any) -> None:
    from copy import deepcopy

    own = deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    rows = [row("hi"), row([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], number=9)]
    with pytest.raises(UserError, match=r"(?s)1 of 2 rows of train cannot be rendered.*a\.jsonl:9: .*no system role"):
        PromptRenderer(own).render(rows, "train")
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert [r.text for r in PromptRenderer(own).render(rows, "train", "drop")] == ["hi"]


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def templated(tokenizer: Any, template: str) -> Any:
    from copy import deepcopy

    own = deepcopy(tokenizer)
    own.chat_template = template
    return own


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_template_without_a_system_role_and_our_system_prompt(tokenizer: Any, policy: Any) -> None:
    own = templated(tokenizer, NO_SYSTEM)
    with pytest.raises(
        UserError, match=r"refuses a system message, and data\.system_prompt is set: set data\.system_role: user"
    ):
        PromptRenderer(own, "be kind").render([row("hi")], "train", policy)
    own_system = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    renderer = PromptRenderer(own, "be kind", system_role="user")
    assert [r.text for r in renderer.render([row("hi"), row(own_system)], "train")] == ["be kind\n\nhi", "x\n\ny"]


def test_rows_that_are_all_refused_are_never_dropped(tokenizer: Any) -> None:
    own = templated(tokenizer, "{{ raise_exception('never') }}")
    with pytest.raises(UserError, match=r"1 of 1 rows of train cannot be rendered"):
        PromptRenderer(own).render([row("hi")], "train", "drop")


def test_a_template_that_leaves_out_the_system_message_or_the_tools(tokenizer: Any) -> None:
    own = templated(
        tokenizer, "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.warns(UserWarning, match=r"leaves the system message out of the prompt: set data\.system_role: user"):
        assert PromptRenderer(own, "be kind").render([row("hi")], "train")[0].text == "hi"
    called = row("hi")
    called.values["tools"] = [{"type": "function"}]
    with pytest.warns(UserWarning, match=r"column tools, which the chat template leaves out \(a\.jsonl\)"):
        PromptRenderer(own).render([called], "train")


def test_tools_reach_the_template(tokenizer: Any) -> None:
    own = templated(tokenizer, "{{ tools[0]['function']['name'] if tools else '-' }}:{{ messages[0]['content'] }}")
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    rows = [row("a"), row("b"), row("c"), row("d")]
    rows[1].values["tools"], rows[2].values["tools"], rows[3].values["tools"] = [tool], json.dumps([tool]), None
    assert [r.text for r in PromptRenderer(own).render(rows, "train")] == ["-:a", "f:b", "f:c", "-:d"]
    rows[3].values["tools"] = "{"
    with pytest.raises(UserError, match=r"a\.jsonl:1: tools is a text that is not JSON"):
        PromptRenderer(own).render(rows, "train")


def test_prompts_that_are_rendered_already(tokenizer: Any) -> None:
    text = "<|end|>user\nhi</s>"
    own = templated(tokenizer, tokenizer.chat_template)
    own.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    with pytest.warns(
        UserWarning, match=r"1 of 2 train prompts hold special tokens .* at a\.jsonl:1: if they are rendered"
    ):
        PromptRenderer(own).render([row(text), row("hi")], "train")
    given = row(text)
    given.rendered = True
    assert PromptRenderer(own, "be kind").render([given], "train")[0].text == text


def test_an_open_turn_of_the_assistant_is_gone_on_with(tokenizer: Any) -> None:
    own = templated(
        tokenizer,
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    given = row([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}])
    given.continues = True
    assert PromptRenderer(own).render([given], "train")[0].text == "<user>hi</s><assistant>Well,"


# "<s>user\n" is 1 + 5 tokens, "</s>\n<s>assistant\n" is 1 + 1 + 1 + 10: the frame of a message is 19 tokens
FRAME = 19


def test_overlong_error_and_drop(tokenizer: Any) -> None:
    rows = [row("x" * 10, 1), row("x" * 11, 2)]
    with pytest.raises(
        UserError, match=r"(?s)1 of 2 rows of test have prompts of more than max_prompt_tokens=29.*jsonl:2: 30"
    ):
        PromptRenderer(tokenizer, max_prompt_tokens=FRAME + 10).render(rows, "test")
    with pytest.warns(UserWarning, match="1 of 2 rows of test .* left out"):
        kept = PromptRenderer(tokenizer, max_prompt_tokens=FRAME + 10, overlong="drop").render(rows, "test")
    assert [r.row.number for r in kept] == [1]


def test_truncate_left_keeps_the_end_of_the_last_user_message_and_the_template(tokenizer: Any) -> None:
    renderer = PromptRenderer(tokenizer, max_prompt_tokens=FRAME + 4, overlong="truncate_left")
    with pytest.warns(UserWarning, match="1 of 2 train prompts were cut on the left to 23 tokens"):
        long, short = renderer.render([row("0123456789"), row("abc")], "train")
    assert long.text == "<s>user\n6789</s>\n<s>assistant\n"
    assert len(long.ids) == FRAME + 4
    assert long.row.prompt == "0123456789"
    assert short.text == "<s>user\nabc</s>\n<s>assistant\n"


def test_truncate_left_cuts_only_the_last_user_message(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "0123456789"},
    ]
    whole = PromptRenderer(tokenizer, system_prompt="s").text(messages)
    renderer = PromptRenderer(tokenizer, "s", max_prompt_tokens=len(tokenizer(whole)["input_ids"]) - 7)
    shorter = renderer.truncate(row(messages), renderer.max_prompt_tokens or 0)
    assert shorter is not None
    assert shorter.text == whole.replace("0123456789", "789")


def test_truncate_left_never_splits_a_character(tokenizer: Any) -> None:
    # "é" is two byte tokens: of "éé12" (6 tokens) at most 3 may stay, and half an "é" is not one of them
    renderer = PromptRenderer(tokenizer, max_prompt_tokens=FRAME + 3)
    shorter = renderer.truncate(row("éé12"), FRAME + 3)
    assert shorter is not None
    assert shorter.text == "<s>user\n12</s>\n<s>assistant\n"


def test_truncate_left_that_cannot_help_is_refused(tokenizer: Any) -> None:
    renderer = PromptRenderer(tokenizer, max_prompt_tokens=5, overlong="truncate_left")
    with pytest.raises(UserError, match=r"a\.jsonl:1: 21 tokens; nothing is left to take from its last user message"):
        renderer.render([row("hi")], "train")
    tool = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x" * 50}]
    with (
        pytest.warns(UserWarning, match="1 of 1 rows of train have prompts of more than"),
    ):
        assert renderer.render([row(tool)], "train", "drop") == []
