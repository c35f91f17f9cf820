"""What a user may write for prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.data_generation.rollout import load_prompts


class LetterTokenizer:
    """Token id = code point."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool, tools=None) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"<{message['role'][0]}>{message['content']}" for message in messages) + "<a>"


def prompts_of(tmp_path: Path, *rows: dict, **options) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["".join(map(chr, ids)) for ids in load_prompts(str(path), LetterTokenizer(), **options)]


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_a_prompt_ends_before_the_first_answer(tmp_path: Path):
    chat = turns(("system", "be"), ("user", "hi"), ("assistant", "no"), ("user", "so"), ("assistant", "ok"))
    assert prompts_of(tmp_path, {"conversations": chat}) == ["<s>be<u>hi<a>"]


def test_prompts_come_from_text_and_from_tokens_too(tmp_path: Path):
    rows = [{"prompt": "hi"}, {"input_ids": [65, 66, 67, 68], "loss_mask": [0, 0, 1, 1]}]
    assert prompts_of(tmp_path, *rows) == ["<u>hi<a>", "AB"]


def test_the_limit_counts_usable_prompts_and_the_others_are_named(tmp_path: Path, caplog):
    rows = [{"note": "no prompt"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert prompts_of(tmp_path, *rows, limit=2) == ["<u>a<a>", "<u>b<a>"]
    assert "1 rows without a prompt" in caplog.text


def test_no_prompt_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no prompt in"):
        prompts_of(tmp_path, {"note": "nothing here"})
