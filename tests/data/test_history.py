"""What stands in the conversation for the verifier's own earlier answers: what a server would put back, by family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import family_tokenizer, make_tokenizer

from speculators.data_generation import regenerate_responses
from speculators.data_generation.rollout import Answer, Question
from speculators.utils.chat_template import parse_answer

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
        ("llama3", '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'),
    ],
)
def test_a_call_ends_the_conversation_and_is_parsed_so_that_its_template_renders_it_again(family, answer, tmp_path):
    tokenizer = family_tokenizer(family)
    assert second_prompt(tokenizer, answer, tmp_path, tools=[ADD]) is None
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["metadata"]["is_tool_call"]
    message = parse_answer(
        answer.removesuffix("<eos>").removesuffix("<|im_end|>").removesuffix("<|eot_id|>"), tokenizer.chat_template
    )
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {"a": 2}}
    assert len(call["id"]) == 9
    assert message["content"] == ""
    assert message.get("reasoning_content", "Add.") == "Add."


@pytest.mark.parametrize(
    "text", ["<tool_call>\n{broken\n</tool_call>", '{"name": 5}', "[TOOL_CALLS] [", '[TOOL_CALLS] ["a"]']
)
def test_what_is_no_call_stays_content(text):
    for family in ("qwen25", "llama3", "mistral_v3"):
        assert parse_answer(text, family_tokenizer(family).chat_template) == {"role": "assistant", "content": text}


def test_a_template_without_thoughts_or_calls_gets_plain_text_without_markers(tmp_path):
    prompt = second_prompt(make_tokenizer(), "<think>hm</think>Two.<|im_end|>", tmp_path)
    assert prompt is not None
    assert "assistant\nhmTwo.<|im_end|>" in prompt
