"""Golden masks of ten template families and two of our own: what each renders for one small chat, by hand.

In `golden_masks.json` the supervised text stands between ⟦ ⟧; a text instead of a list is why the row is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, FAMILIES, family_tokenizer, make_tokenizer

from speculators.data_generation.conversations import Conversation, TokenRow, UnusableRow, parse_row
from speculators.data_generation.masks import TurnRows, mask_spans, turn_rows
from speculators.utils.chat_template import ChatRenderer

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden_masks.json").read_text())
PLAIN = (
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


CALL = [{"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]
RESULT = {"role": "tool", "content": "5", "tool_call_id": "abcdefghi"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "system": [SYSTEM, user("hi"), assistant("hello")],
    "truncated": [SYSTEM, user("hi"), assistant("hello")],
    "empty": [user("hi"), assistant("")],
    "reasoning": [
        user("1+1?"),
        assistant("Two.", reasoning="It is 2."),
        user("ok"),
        assistant("Yes.", reasoning="Sure."),
    ],
    "tools": [SYSTEM, user("2+3?"), assistant(None, tool_calls=CALL), RESULT, assistant("Five.")],
}


def renderer_of(family: str) -> ChatRenderer:
    if family in ("chatml", "plain"):
        return ChatRenderer(make_tokenizer(CHATML if family == "chatml" else PLAIN))
    name, _, mode = family.partition(" ")
    kwargs = {"template_date": "2026-01-31", **({"enable_thinking": False} if mode == "off" else {})}
    return ChatRenderer(family_tokenizer(name), kwargs)


def rows_of(renderer: ChatRenderer, messages: list[dict[str, Any]], max_length: int = 10_000, **row: Any) -> TurnRows:
    conversation = parse_row({"messages": messages, **row}, Counter())
    assert isinstance(conversation, Conversation)
    return turn_rows(conversation, renderer, max_length)


def marked(renderer: ChatRenderer, row: TokenRow) -> str:
    spans = mask_spans(renderer.tokenizer, row.input_ids, row.loss_mask)
    return "".join(f"⟦{span.text}⟧" if span.supervised else span.text for span in spans)


def result(family: str, name: str) -> list[str] | str:
    renderer, messages = renderer_of(family), CHATS[name]
    tools = {"tools": [ADD]} if name == "tools" else {}
    try:
        found = rows_of(renderer, messages, **tools)
        if name == "truncated":
            found = rows_of(renderer, messages, max_length=found.rows[0].loss_mask.index(1) + 3)
    except UnusableRow as reason:
        return str(reason)
    lost = [f"{found.num_without_reasoning} without reasoning"] if found.num_without_reasoning else []
    return [marked(renderer, row) for row in found.rows] + lost


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", GOLDEN)
def test_the_mask_is_the_golden_one(family, name):
    assert result(family, name) == GOLDEN[family][name]


def test_every_template_has_its_golden_masks():
    families = {path.stem for path in FAMILIES.glob("*.jinja")} | {"qwen3 off", "chatml", "plain"}
    assert set(GOLDEN) == families
    assert all(set(golden) == set(CHATS) for golden in GOLDEN.values())


def test_arguments_as_json_text_and_as_an_object_are_one_call():
    as_text, as_object = ({"function": {"name": "add", "arguments": form}} for form in ('{"a": 2}', {"a": 2}))
    renderer = renderer_of("qwen25")
    (row,) = rows_of(renderer, [user("a?"), assistant(None, tool_calls=[as_text])]).rows
    assert '"arguments": {"a": 2}}' in marked(renderer, row)
    for calls in ([as_object], json.dumps([as_text])):
        assert rows_of(renderer, [user("a?"), assistant("", tool_calls=calls)]).rows == [row]
    old_format = assistant(None, function_call={"name": "add", "arguments": '{"a": 2}'})
    assert rows_of(renderer, [user("a?"), old_format]).rows == [row]


@pytest.mark.parametrize("calls", [[], None, "", "[]"])
def test_an_answer_with_no_calls_is_an_ordinary_answer(calls):
    renderer = renderer_of("gpt_oss")
    (row,) = rows_of(renderer, [user("hi"), assistant("hello", tool_calls=calls)]).rows
    assert marked(renderer, row).endswith("⟦<|channel|>final<|message|>hello<|return|>⟧")


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([{"function": {"name": "add", "arguments": '{"a": '}}], "arguments is not valid JSON"),
        ([{"function": {"arguments": "{}"}}], "no function name"),
        ("[{", "tool_calls is not valid JSON"),
    ],
)
def test_broken_calls_are_refused(calls, reason):
    with pytest.raises(UnusableRow, match=reason):
        rows_of(renderer_of("qwen25"), [user("a?"), assistant(None, tool_calls=calls)])


def test_a_result_that_the_template_leaves_out_refuses_the_row():
    messages = [user("2+3?"), assistant("Let me see."), RESULT, assistant("Five.")]
    with pytest.raises(UnusableRow, match="does not render tool results: '5' is missing"):
        rows_of(renderer_of("deepseek_r1"), messages)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("family", ["qwen3", "glm45", "gpt_oss"])
def test_reasoning_reaches_the_template_under_any_name_and_from_the_content(family, key):
    renderer = renderer_of(family)
    (row,) = rows_of(renderer, [user("1+1?"), assistant("Two.", **{key: "It is 2."})]).rows
    assert marked(renderer, row) == GOLDEN[family]["reasoning"][0]
    in_content = [user("1+1?"), assistant("<think>\nIt is 2.\n</think>\n\nTwo.")]
    assert rows_of(renderer, in_content).rows == [row]


@pytest.mark.parametrize("key", [{"weight": 0}, {"prefix": True}])
def test_a_turn_that_is_not_the_verifiers_is_context_only(key):
    renderer = renderer_of("chatml")
    found = rows_of(renderer, [user("a"), assistant("b", **key), user("c"), assistant("d", weight=1)])
    assert [marked(renderer, row).count("⟦") for row in found.rows] == [1]
    assert marked(renderer, found.rows[0]).endswith("assistant\n⟦d<|im_end|>⟧\n")
    assert (found.num_turns, found.filtered.total()) == (2, 1)
    with pytest.raises(UnusableRow, match=r"weight is neither 0 nor 1: 0\.5"):
        rows_of(renderer, [user("a"), assistant("b", weight=0.5)])


DROPS_EARLIER_THOUGHTS = (
    "{% set ns = namespace(final=false) %}{% for m in messages %}"
    "{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = true %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and not ns.final %}<|im_start|>assistant thinks\n{{ m.thinking }}<|im_end|>\n{% endif %}"
    "<|im_start|>assistant\n{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    "{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def test_a_thought_that_goes_once_the_answer_follows_stays_in_the_prompt_the_verifier_read():
    """As gpt-oss: reasoning before a tool call is rendered until a final answer stands behind it."""
    renderer = ChatRenderer(make_tokenizer(DROPS_EARLIER_THOUGHTS))
    messages = [user("2+3?"), assistant(None, tool_calls=CALL, thinking="Add."), RESULT, assistant("Five.")]
    first, second = rows_of(renderer, messages).rows
    assert marked(renderer, first) == (
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant⟦ thinks\nAdd.<|im_end|>\n"
        "<|im_start|>assistant\nadd<|im_end|>⟧\n"
    )
    assert marked(renderer, second) == (
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant thinks\nAdd.<|im_end|>\n"
        "<|im_start|>assistant\nadd<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant⟦\nFive.<|im_end|>⟧\n"
    )


def test_the_date_of_a_template_is_fixed_for_a_renderer_and_can_be_given():
    renderer = renderer_of("gpt_oss")
    assert "Current date: 2026-01-31" in renderer.text([user("hi")], add_generation_prompt=True)
    assert renderer_of("llama3").date is None  # asks for none
    with pytest.raises(ValueError, match="template_date='today' is not a date"):
        ChatRenderer(family_tokenizer("gpt_oss"), {"template_date": "today"})
