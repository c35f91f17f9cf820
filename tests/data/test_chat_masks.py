"""Loss masks, hand-worked: the supervised text of every row is written out, so anyone can check it by reading."""

from __future__ import annotations

from collections import Counter

import pytest
from chats import CHATML_WITH_GENERATION_BLOCKS, THINKING, chat, make_tokenizer

from speculators.data_generation.conversations import Conversation, TokenRow, UnusableRow, parse_row
from speculators.data_generation.masks import (
    agrees_with_template,
    generation_start,
    mask_spans,
    merge_prefix_rows,
    turn_rows,
)
from speculators.utils.chat_template import ChatRenderer, ChatTemplateError


def parsed(row: dict[str, object]) -> Conversation:
    conversation = parse_row(row, Counter())
    assert isinstance(conversation, Conversation)
    return conversation


def rows_of(tokenizer, row, max_length=1000, **template_kwargs):
    return turn_rows(parsed(row), ChatRenderer(tokenizer, template_kwargs), max_length)


def spans(tokenizer, row: TokenRow) -> list[tuple[bool, str]]:
    return [(span.supervised, span.text) for span in mask_spans(tokenizer, row.input_ids, row.loss_mask)]


def answer(tokenizer, row: TokenRow) -> str:
    """The last supervised text."""
    return [text for supervised, text in spans(tokenizer, row) if supervised][-1]


def test_a_single_turn_supervises_the_answer_and_its_end_marker(tokenizer):
    (row,) = rows_of(tokenizer, chat("hi", "hello")).rows
    assert spans(tokenizer, row) == [
        (False, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (True, "hello<|im_end|>"),
        (False, "\n"),
    ]


def test_each_assistant_turn_is_a_row_of_its_own_with_the_earlier_ones_as_context(tokenizer):
    rows = rows_of(tokenizer, chat("a", "b", "c", "d")).rows
    assert [answer(tokenizer, row) for row in rows] == ["b<|im_end|>", "d<|im_end|>"]
    assert spans(tokenizer, rows[1])[0] == (
        False,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    )


def test_merged_turns_are_one_row_that_supervises_both_answers(tokenizer):
    (row,) = merge_prefix_rows(rows_of(tokenizer, chat("a", "b", "c", "d")).rows)
    supervised = [text for is_supervised, text in spans(tokenizer, row) if is_supervised]
    assert supervised == ["b<|im_end|>", "d<|im_end|>"]


def test_rows_that_are_no_prefix_of_the_next_one_stay_apart():
    rows = [TokenRow([1, 2, 3], [0, 0, 1]), TokenRow([1, 9, 3, 4], [0, 0, 0, 1])]
    assert merge_prefix_rows(rows) == rows


def test_system_and_tool_turns_are_context(tokenizer):
    turns = [("system", "be kind"), ("user", "sum"), ("assistant", "call"), ("tool", "4"), ("assistant", "four")]
    rows = rows_of(tokenizer, {"conversations": [{"from": role, "value": text} for role, text in turns]}).rows
    assert [answer(tokenizer, row) for row in rows] == ["call<|im_end|>", "four<|im_end|>"]
    assert "<|im_start|>tool\n4<|im_end|>" in spans(tokenizer, rows[1])[0][1]


def test_a_long_answer_is_cut_at_the_window_and_stays_supervised_up_to_it(tokenizer):
    (whole,) = rows_of(tokenizer, chat("hi", "hello")).rows
    (cut,) = rows_of(tokenizer, chat("hi", "hello"), max_length=len(whole.input_ids) - 4).rows
    assert cut.input_ids == whole.input_ids[:-4]
    assert cut.loss_mask == whole.loss_mask[:-4]
    assert spans(tokenizer, cut)[-1] == (True, "hel")


def test_only_the_turn_whose_prompt_fills_the_window_is_left_out(tokenizer):
    first, second = rows_of(tokenizer, chat("a", "b", "c", "d")).rows
    num_prompt_tokens = second.loss_mask.index(1)
    found = rows_of(tokenizer, chat("a", "b", "c", "d"), max_length=num_prompt_tokens)
    assert found.rows == [first]
    assert sum(found.filtered.values()) == 1
    assert "fills the whole window" in next(iter(found.filtered))


def test_an_opening_assistant_turn_is_context_only(tokenizer):
    turns = [("assistant", "welcome"), ("user", "hi"), ("assistant", "hello")]
    found = rows_of(tokenizer, {"conversations": [{"role": role, "content": text} for role, text in turns]})
    (row,) = found.rows
    assert answer(tokenizer, row) == "hello<|im_end|>"
    assert found.filtered == {"opening assistant turn (context only)": 1}


def thinking_chat() -> dict[str, object]:
    return {
        "conversations": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "why b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "reasoning_content": "why d"},
        ]
    }


def test_thoughts_are_supervised_in_their_own_turn_and_absent_from_later_context():
    tokenizer = make_tokenizer(THINKING)
    rows = rows_of(tokenizer, thinking_chat()).rows
    assert [answer(tokenizer, row) for row in rows] == [
        "<think>why b</think>b<|im_end|>",
        "<think>why d</think>d<|im_end|>",
    ]
    assert "why b" not in spans(tokenizer, rows[1])[0][1]
    assert len(merge_prefix_rows(rows)) == 2  # the first row is not a prefix of the second: its thought is gone


def test_a_generation_prompt_that_opens_a_thought_is_context():
    tokenizer = make_tokenizer(THINKING)
    rows = rows_of(tokenizer, thinking_chat(), open_thought=True).rows
    assert [answer(tokenizer, row) for row in rows] == ["why b</think>b<|im_end|>", "why d</think>d<|im_end|>"]


def test_an_answer_without_the_thought_its_prompt_opens_starts_where_both_renderings_part():
    tokenizer = make_tokenizer(THINKING)
    (row,) = rows_of(tokenizer, chat("a", "b"), open_thought=True).rows
    assert spans(tokenizer, row) == [
        (False, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
        (True, "b<|im_end|>"),
        (False, "\n"),
    ]


def test_a_data_set_that_says_thinking_reaches_a_template_that_says_reasoning_content():
    tokenizer = make_tokenizer(THINKING)
    row = {"conversations": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b", "thinking": "why"}]}
    (turn,) = rows_of(tokenizer, row).rows
    assert answer(tokenizer, turn) == "<think>why</think>b<|im_end|>"


def test_the_boundary_rule_on_numbers():
    # starts with the prompt | shares [1, 2], which holds the context [1] | the context [1, 2, 9] is not shared
    assert generation_start([1, 2], [1, 2, 3], list) == 2
    assert generation_start([1, 2, 7], [1, 2, 3], lambda: [1]) == 2
    with pytest.raises(UnusableRow, match="no boundary"):
        generation_start([1, 2, 9, 7], [1, 2, 3], lambda: [1, 2, 9])


def test_the_templates_own_generation_blocks_agree():
    tokenizer = make_tokenizer(CHATML_WITH_GENERATION_BLOCKS)
    renderer = ChatRenderer(tokenizer)
    conversation = parsed(chat("a", "b", "c", "d"))
    row = turn_rows(conversation, renderer, 1000).rows[-1]
    assert renderer.marks_generations
    mask = renderer.generation_mask(conversation.messages)
    assert agrees_with_template(row, mask)
    assert not agrees_with_template(row, [0, *mask[:-1]])
    assert not ChatRenderer(make_tokenizer()).marks_generations


def test_a_template_that_refuses_a_conversation_is_a_reason_not_a_crash():
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        rows_of(tokenizer, chat("a", "b"))


def test_a_tokenizer_without_chat_template_names_the_way_out():
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        ChatRenderer(make_tokenizer(None))
