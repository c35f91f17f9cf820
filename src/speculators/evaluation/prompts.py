"""Prompts to decode: the part of a conversation before its first answer, as the verifier's chat template renders it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from speculators.data_generation.conversations import CONVERSATION_COLUMNS, as_turns, parse_turn
from speculators.data_generation.datasets import load_raw_dataset


@dataclass(frozen=True)
class Prompts:
    token_ids: list[list[int]]
    num_skipped: int
    """Rows that are no prompt, or longer than the limit."""


def load_prompts(source: str, tokenizer: Any, *, limit: int | None = None, max_length: int | None = None) -> Prompts:
    """The first `limit` usable prompts of a data source, as token ids. `ValueError` when there is none."""
    prompts: list[list[int]] = []
    num_skipped = 0
    for row in load_raw_dataset(source):
        if limit is not None and len(prompts) == limit:
            break
        token_ids = prompt_of(row, tokenizer)
        if token_ids and (max_length is None or len(token_ids) <= max_length):
            prompts.append(token_ids)
        else:
            num_skipped += 1
    if not prompts:
        raise ValueError(
            f"no prompt in {source} ({num_skipped} rows were looked at): rows need {', '.join(CONVERSATION_COLUMNS)} "
            f"with a user turn, `prompt` text, or `input_ids` with a `loss_mask`; and at most {max_length} tokens"
        )
    return Prompts(prompts, num_skipped)


def prompt_of(row: Any, tokenizer: Any) -> list[int] | None:
    """Token ids of one row's prompt; None when the row has none."""
    if not isinstance(row, Mapping):
        return None
    if row.get("input_ids") is not None and row.get("loss_mask") is not None:
        pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
        return [int(token) for token, _ in takewhile(lambda pair: not pair[1], pairs)]
    if isinstance(row.get("prompt"), str):
        return render_prompt([{"role": "user", "content": row["prompt"]}], tokenizer)
    turns = next((row[column] for column in CONVERSATION_COLUMNS if row.get(column)), None)
    if turns is None:
        return None
    messages = [parse_turn(turn, Counter()) for turn in as_turns(turns)]
    messages = list(takewhile(lambda message: message["role"] != "assistant", messages))
    return render_prompt(messages, tokenizer) if messages else None


def render_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """Messages up to the point where the verifier answers. A tokenizer without a chat template gets the bare text."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer("\n".join(message["content"] for message in messages)).input_ids)
