"""Parses one raw row into a conversation or a pre-tokenised row. Pure: no tokenizer, no files.

A row that cannot be used raises `UnusableRow` with a short reason; callers count the reasons.
A pre-tokenised row whose lengths differ shows a broken generator, not a bad sample: that raises `ValueError`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

CONVERSATION_COLUMNS = ("conversations", "messages", "conversation")
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    # Spellings of the same four roles that would otherwise be supervised as if the verifier had written them.
    "developer": "system",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
KEPT_KEYS = ("tool_calls", "tool_call_id", "thinking", "reasoning_content", "name")
IMAGE_COLUMNS = ("image", "images")


class UnusableRow(ValueError):
    """This row cannot become a training row. The message is the reason under which rows are counted."""


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TokenRow:
    """A training row. `loss_mask[i] == 1`: the verifier wrote token i, or it is treated so."""

    input_ids: list[int]
    loss_mask: list[int]


def parse_row(row: Mapping[str, Any], unknown_roles: Counter[str]) -> Conversation | TokenRow:
    """Parses a row; counts unknown roles in `unknown_roles` and treats them as the assistant's.

    Raises `UnusableRow` for a row to leave out, `ValueError` for a broken pre-tokenised row.
    """
    if row is None:
        raise UnusableRow("left out by the preset's filter")
    if not isinstance(row, Mapping):
        raise UnusableRow("row is not a JSON object")
    if row.get("input_ids") is not None and row.get("loss_mask") is not None:
        return parse_token_row(row["input_ids"], row["loss_mask"])
    conversation = parse_conversation(row, unknown_roles)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise UnusableRow("no assistant turn")
    return conversation


def parse_conversation(row: Mapping[str, Any], unknown_roles: Counter[str]) -> Conversation:
    """Reads the turns and tools of a row, whether they are answered or not. Raises `UnusableRow`."""
    if any(row.get(column) for column in IMAGE_COLUMNS):
        raise UnusableRow("row has images (only text is supported)")
    turns = next((row[column] for column in CONVERSATION_COLUMNS if row.get(column) is not None), None)
    if turns is None:
        raise UnusableRow(f"no {CONVERSATION_COLUMNS[0]!r} (or input_ids + loss_mask)")
    messages = [parse_turn(turn, unknown_roles) for turn in as_turns(turns)]
    if not messages:
        raise UnusableRow("empty conversation")
    return Conversation(messages, parse_tools(row.get("tools")))


def parse_token_row(input_ids: Sequence[int], loss_mask: Sequence[int]) -> TokenRow:
    """Checks a pre-tokenised row. Raises `ValueError` unless every token has a mask entry of 0 or 1."""
    if len(input_ids) != len(loss_mask):
        raise ValueError(
            f"a pre-tokenised row has {len(input_ids)} input_ids but {len(loss_mask)} loss_mask entries; "
            "every token needs one: 1 = written by the verifier, 0 = context"
        )
    mask = [int(bit) for bit in loss_mask]
    if not set(mask) <= {0, 1}:
        raise ValueError(f"loss_mask holds {sorted(set(mask) - {0, 1})[:3]}; only 0 and 1 are valid")
    return TokenRow([int(token) for token in input_ids], mask)


def as_turns(turns: Any) -> Sequence[Any]:
    """Returns a list of turns, also from JSON text and from a struct of lists ({"role": [...], "content": [...]})."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError:
            raise UnusableRow("conversation is text, not a list of turns") from None
    if isinstance(turns, Mapping):
        columns = [(key, values) for key, values in turns.items() if values is not None]
        num_turns = max((len(values) for _, values in columns), default=0)
        return [{key: values[i] for key, values in columns if i < len(values)} for i in range(num_turns)]
    if not isinstance(turns, Sequence):
        raise UnusableRow("conversation is not a list of turns")
    return turns


def parse_turn(turn: Any, unknown_roles: Counter[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableRow("a turn is not an object")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if not isinstance(role, str):
        raise UnusableRow("a turn has no role")
    if role.lower() not in ROLES:
        unknown_roles[role] += 1
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    message: Message = {"role": ROLES.get(role.lower(), "assistant"), "content": text_of(content)}
    message.update({key: turn[key] for key in KEPT_KEYS if turn.get(key) is not None})
    if content is None and "tool_calls" not in message:
        raise UnusableRow("a turn has no content")
    return message


def text_of(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        if any(part.get("text") is None for part in content):
            raise UnusableRow("a turn has parts that are not text (only text is supported)")
        return "".join(part["text"] for part in content)
    raise UnusableRow("a turn's content is not text")


def parse_tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise UnusableRow("tools is not valid JSON") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, Sequence):
        raise UnusableRow("tools is not a list")
    return list(tools)
