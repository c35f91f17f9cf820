"""What stands in the conversation for the verifier's own earlier answers: what a server would put back, by family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import family_tokenizer, make_tokenizer

from speculators.data_generation import regenerate_responses
from speculators.data_generation.answering import tokens_of_message
from speculators.data_generation.rollout import Answer, Question
from speculators.data_generation.vllm_client import InvalidResponseError
from speculators.utils.chat_template import ChatRenderer, parse_answer

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def second_prompt(tokenizer: Any, answer: str, tmp_path: Path, **row: Any) -> str | None:
    """The prompt of the second turn, when the verifier answered the first so; None: the conversation ended."""
    prompts: list[str] = []

    def generate(asked: Sequence[Question]) -> list[Answer]:
        prompts.extend(tokenizer.decode(question.prompt) for question in asked)
        return [Answer(tokenizer(answer)["input_ids"]) for _ in asked]

    turns = [{"role": role, "content": text} for role, text in (("user", "1+1?"), ("assistant", "x"), ("user", "ok"))]
    regenerate_responses([{"messages": turns, **row}], tokenizer, generate, output=tmp_path / "out.jsonl")
    return prompts[1] if len(prompts) > 1 else None


@pytest.mark.parametrize(
    ("family", "answer", "expected"),
    [
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>It is 2.<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>",
            "<|start|>user<|message|>1+1?<|end|><|start|>assistant<|channel|>final<|message|>Two.<|end|>"
            "<|start|>user<|message|>ok<|end|><|start|>assistant",
        ),
        (
            "deepseek_r1",  # the prompt has opened the thought
            "It is 2.\n</think>\n\nTwo.<eos>",
            "<|User|>1+1?<|Assistant|>Two.<eos><|User|>ok<|Assistant|><think>\n",
        ),
        (
            "qwen3",
            "<think>\nIt is 2.\n</think>\n\nTwo.<|im_end|>",
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
            "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3",  # cut in the middle of the thought
            "<think>\nIt is",
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
            "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "glm45",
            "\n<think>It is 2.</think>\nTwo.<|user|>",
            "<|user|>\n1+1?<|assistant|>\n<think></think>\nTwo.<|user|>\nok<|assistant|>",
        ),
        (
            "qwen25",  # a template that knows no thoughts gets the text back as it was
            "<think>\nIt is 2.\n</think>\n\nTwo.<|im_end|>",
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\nIt is 2.\n</think>\n\nTwo.<|im_end|>\n"
            "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("mistral_v3", " Two.<eos>", "<bos>[INST] 1+1?[/INST] Two.<eos>[INST] ok[/INST]"),
    ],
)
def test_the_history_is_what_a_server_would_put_back(family, answer, expected, tmp_path):
    prompt = second_prompt(family_tokenizer(family), answer, tmp_path)
    assert prompt is not None
    assert prompt.endswith(expected)
    assert "It is 2." not in prompt or family == "qwen25"


@pytest.mark.parametrize(
    ("family", "answer"),
    [
        ("gpt_oss", ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>'),
        ("qwen25", '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'),
        (
            "qwen3",
            '<think>\nAdd.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        ),
        ("mistral_v3", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "abcdefghi"}]<eos>'),
        ("command_r", 'Action: ```json\n[{"tool_name": "add", "parameters": {"a": 2}}]\n```<|END_OF_TURN_TOKEN|>'),
        ("llama3", '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'),
        (
            "glm45",
            "\n<think>Add.</think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
            "<|observation|>",
        ),
    ],
)
def test_a_call_ends_the_conversation_and_is_parsed_so_that_its_template_renders_it_again(family, answer, tmp_path):
    tokenizer = family_tokenizer(family)
    assert second_prompt(tokenizer, answer, tmp_path, tools=[ADD]) is None
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["metadata"]["is_tool_call"]
    message = parse_answer(
        answer.removesuffix("<eos>")
        .removesuffix("<|im_end|>")
        .removesuffix("<|eot_id|>")
        .removesuffix("<|END_OF_TURN_TOKEN|>")
        .removesuffix("<|observation|>"),
        tokenizer.chat_template,
    )
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {"a": 2}}
    assert len(call["id"]) == 9
    assert message["content"] == ""
    assert message.get("reasoning_content", "Add.") == "Add."


@pytest.mark.parametrize(
    "text", ["<tool_call>\n{broken\n</tool_call>", '{"name": 5}', "[TOOL_CALLS] [", '[TOOL_CALLS] ["a"]', "Action: ["]
)
def test_what_is_no_call_stays_content(text):
    for family in ("qwen25", "llama3", "mistral_v3", "command_r"):
        assert parse_answer(text, family_tokenizer(family).chat_template) == {"role": "assistant", "content": text}


def test_a_message_that_a_server_parsed_is_rendered_as_the_verifier_wrote_it():
    tokenizer = family_tokenizer("qwen3")
    renderer = ChatRenderer(tokenizer)
    question = Question([], 0, messages=[{"role": "user", "content": "2+3?"}], tools=[ADD])
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    given = {"role": "assistant", "content": None, "reasoning": "Add.", "tool_calls": [call]}
    text = '<think>\nAdd.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    for is_cut, end in ((False, "<|im_end|>"), (True, "")):
        assert tokenizer.decode(tokens_of_message(given, question, renderer, is_cut=is_cut)) == text + end
    other = ChatRenderer(family_tokenizer("deepseek_r1"))
    with pytest.raises(InvalidResponseError, match="does not render its reasoning"):
        tokens_of_message({"content": "Two.", "reasoning": "It is 2."}, question, other, is_cut=False)


def test_a_template_without_thoughts_or_calls_gets_plain_text_without_markers(tmp_path):
    prompt = second_prompt(make_tokenizer(), "<think>hm</think>Two.<|im_end|>", tmp_path)
    assert prompt is not None
    assert "assistant\nhmTwo.<|im_end|>" in prompt


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
RECORDED = {"id": "recorded", "function": {"name": "add", "arguments": '{"a": 2}'}}


def prompts_of(answers: list[str], turns: list[dict[str, Any]], tmp_path: Path) -> list[str]:
    """What the verifier was asked when it gave these answers, one after the other."""
    tokenizer, prompts = family_tokenizer("qwen25"), list[str]()

    def generate(asked: Sequence[Question]) -> list[Answer]:
        (question,) = asked
        prompts.append(tokenizer.decode(question.prompt))
        return [Answer(tokenizer(answers[len(prompts) - 1])["input_ids"])]

    regenerate_responses([{"messages": turns, "tools": [ADD]}], tokenizer, generate, output=tmp_path / "out.jsonl")
    return prompts


def conversation(*calls: dict[str, Any], results: Sequence[str] = ("5",)) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": None, "tool_calls": list(calls)},
        *({"role": "tool", "content": result, "tool_call_id": "recorded"} for result in results),
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "ok"},
    ]


def test_the_call_that_was_recorded_goes_on_with_its_result(tmp_path):
    prompts = prompts_of([CALL, "Five.<|im_end|>", "Bye.<|im_end|>"], conversation(RECORDED), tmp_path)
    assert len(prompts) == 3
    assert prompts[1].count("<tool_call>\n{") == 1 and "<tool_response>\n5\n</tool_response>" in prompts[1]
    assert prompts[2].endswith("Five.<|im_end|>\n<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "turns",
    [
        conversation({"id": "recorded", "function": {"name": "add", "arguments": {"a": 3}}}),
        conversation({"id": "recorded", "function": {"name": "sub", "arguments": {"a": 2}}}),
        conversation(RECORDED, RECORDED, results=("5", "5")),
        conversation(RECORDED, results=()),
        [{"role": "user", "content": "2+3?"}],
    ],
)
def test_another_call_than_the_recorded_one_ends_the_conversation(turns, tmp_path):
    assert len(prompts_of([CALL], turns, tmp_path)) == 1


@pytest.mark.parametrize(
    ("family", "answer", "trained"),
    [
        ("qwen3", "<think>\nIt is 2.\n</think>\n\nTwo.<|im_end|>", "\n\nTwo.<|im_end|>"),
        ("deepseek_r1", "It is 2.\n</think>\n\nTwo.<eos>", "\n\nTwo.<eos>"),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>It is 2.<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>",
            "<|start|>assistant<|channel|>final<|message|>Two.<|return|>",
        ),
        ("qwen3", "Two.<|im_end|>", "Two.<|im_end|>"),
        ("qwen3", "<think>\nIt is", ""),
    ],
)
def test_thoughts_are_trained_on_or_stay_as_context(family, answer, trained, tmp_path):
    tokenizer = family_tokenizer(family)
    for drop_reasoning, expected in ((False, answer), (True, trained)):
        output = tmp_path / f"{drop_reasoning}.jsonl"
        regenerate_responses(
            [{"prompt": "1+1?"}],
            tokenizer,
            lambda asked: [Answer(tokenizer(answer)["input_ids"]) for _ in asked],
            output=output,
            drop_reasoning=drop_reasoning,
        )
        row = json.loads(output.read_text())
        supervised = [t for t, bit in zip(row["input_ids"], row["loss_mask"], strict=True) if bit]
        assert tokenizer.decode(supervised) == expected
        assert tokenizer.decode(row["input_ids"]).endswith(answer)
