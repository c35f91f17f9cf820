"""Parses one raw row into a conversation or a pre-tokenised row. Pure: no tokenizer, no files.

A row that cannot be used raises `UnusableRow` with a short reason; callers count the reasons and keep a list of the
rows, so that someone can repair them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from speculators.utils.chat_template import REASONING_KEYS
from speculators.utils.names import excerpt

Message = dict[str, Any]

CONVERSATION_COLUMNS = ("conversations", "messages", "conversation")
PROMPT_COLUMNS = ("prompt", "question", "instruction", "turns", "text")
"""Columns of bare prompts, as data sets call them; the first that a row has counts."""
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
KEPT_KEYS = ("tool_call_id", *REASONING_KEYS, "name", "prefix", "weight")
RENDERED_TEXT = (
    "rendered text does not say where the verifier's answer begins. Tokenise it and give input_ids with a loss_mask (0 "
    "over the prompt; over the first token alone to train on the whole text), or take it as a prompt: "
    "regenerate-responses --prompt-field text"
)
IMAGE_COLUMNS = ("image", "images")


class UnusableRow(ValueError):
    """This row cannot become a training row. Rows are counted by their reason; `detail` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class FilteredRow(UnusableRow):
    """Nothing is wrong with this row, but a setting leaves it out."""


class BrokenTokenRow(UnusableRow):
    """A pre-tokenised row that whoever made it broke."""


@dataclass(frozen=True)
class BrokenLine:
    """A line of a file that is not JSON."""

    error: str


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TokenRow:
    """A training row. `loss_mask[i] == 1`: the verifier wrote token i, or it is treated so."""

    input_ids: list[int]
    loss_mask: list[int]
    num_turns: int = 1
    """Answers that are supervised in it."""
    num_cut: int = 0
    """Supervised tokens that were cut off its end."""

    def clipped(self, max_length: int) -> TokenRow:
        """The first `max_length` tokens."""
        ids, mask = self.input_ids[:max_length], self.loss_mask[:max_length]
        return TokenRow(ids, mask, self.num_turns, self.num_cut + sum(self.loss_mask[max_length:]))


def parse_row(row: Mapping[str, Any], unknown_roles: Counter[str]) -> Conversation | TokenRow:
    """Parses a row; counts unknown roles in `unknown_roles` and treats them as the assistant's.

    Raises `UnusableRow` for a row to leave out.
    """
    refuse_no_object(row)
    if row.get("input_ids") is not None and row.get("loss_mask") is not None:
        return parse_token_row(row["input_ids"], row["loss_mask"])
    conversation = parse_conversation(row, unknown_roles)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise UnusableRow("no assistant turn")
    return conversation


def refuse_no_object(row: Any) -> None:
    if row is None:
        raise FilteredRow("left out by the preset's filter")
    if isinstance(row, BrokenLine):
        raise UnusableRow("line is not valid JSON (cut off in writing?)", row.error)
    if not isinstance(row, Mapping):
        raise UnusableRow("row is not a JSON object")


def parse_conversation(row: Mapping[str, Any], unknown_roles: Counter[str]) -> Conversation:
    """Reads the turns and tools of a row, whether they are answered or not. Raises `UnusableRow`."""
    if any(row.get(column) for column in IMAGE_COLUMNS):
        raise UnusableRow("row has images (only text is supported)")
    turns = next((row[column] for column in CONVERSATION_COLUMNS if row.get(column) is not None), None)
    if turns is None:
        is_text = isinstance(row.get("text"), str)
        raise UnusableRow(
            f"no {CONVERSATION_COLUMNS[0]!r} (or input_ids + loss_mask)", RENDERED_TEXT if is_text else ""
        )
    messages = [parse_turn(turn, unknown_roles) for turn in as_turns(turns)]
    if not messages:
        raise UnusableRow("empty conversation")
    return Conversation(messages, parse_tools(row.get("tools")))


def parse_prompt(
    row: Mapping[str, Any], prompt_field: str | None = None, preset_field: str | None = None
) -> tuple[str, Conversation]:
    """Returns the shape in which a row holds its prompt, and the conversation to answer.

    `prompt_field`: the column to read, whatever else the row holds; `preset_field`: in place of the usual names. Raises
    `UnusableRow` for a row without a prompt.
    """
    if prompt_field is not None:
        return prompt_field, conversation_of(row.get(prompt_field), row, prompt_field)
    for column in CONVERSATION_COLUMNS:
        if row.get(column) is not None:
            conversation = parse_conversation(row, Counter())
            if not any(message["role"] == "user" for message in conversation.messages):
                raise UnusableRow("no user turn to answer")
            return column, conversation
    for column in PROMPT_COLUMNS if preset_field is None else (preset_field, *PROMPT_COLUMNS):
        if row.get(column) is not None:
            prompt, shape = row[column], column
            if column == "instruction" and isinstance(prompt, str) and row.get("input"):
                prompt, shape = f"{prompt}\n\n{text_of(row['input'])}", "instruction + input"
            return shape, conversation_of(prompt, row, column)
    raise UnusableRow(
        "no prompt: name its column with prompt_field (--prompt-field)", f"the columns are {', '.join(map(str, row))}"
    )


def conversation_of(prompt: Any, row: Mapping[str, Any], column: str) -> Conversation:
    """Returns the conversation that one column holds: a text, the texts of several user turns, or messages."""
    if isinstance(prompt, str) and prompt.strip():
        prompt = [prompt]
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
        raise UnusableRow(f"column {column!r} holds no prompt", excerpt(prompt))
    if not all(isinstance(turn, str) for turn in prompt):
        return parse_prompt({**row, CONVERSATION_COLUMNS[0]: prompt})[1]
    messages: list[Message] = []
    for text in prompt:  # between two questions stands an answer
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    return Conversation(messages[:-1], parse_tools(row.get("tools")))


def parse_token_row(input_ids: Sequence[int], loss_mask: Sequence[int]) -> TokenRow:
    """Checks a pre-tokenised row. Raises `BrokenTokenRow` unless each token is a whole number with a mask of 0 or 1,
    and some but not all are supervised."""
    if any(isinstance(v, str | Mapping) or not hasattr(v, "__len__") for v in (input_ids, loss_mask)):
        raise BrokenTokenRow("input_ids or loss_mask is not a list", f"{str((input_ids, loss_mask))[:100]}")
    if len(input_ids) != len(loss_mask):
        raise BrokenTokenRow(
            "input_ids and loss_mask differ in length",
            f"{len(input_ids)} input_ids but {len(loss_mask)} loss_mask entries; every token needs one: 1 = written by "
            "the verifier, 0 = context",
        )
    if wrong := [token for token in input_ids if not is_whole(token)]:
        raise BrokenTokenRow("input_ids holds what is no token id", f"{wrong[0]!r}")
    if wrong := [bit for bit in loss_mask if not is_whole(bit) or bit not in (0, 1)]:
        raise BrokenTokenRow("loss_mask holds other values than 0 and 1", f"{wrong[0]!r}; only 0 and 1 are valid")
    row = TokenRow([int(token) for token in input_ids], [int(bit) for bit in loss_mask])
    if not any(row.loss_mask):
        raise UnusableRow("no supervised token")
    if all(row.loss_mask):
        raise UnusableRow(
            "all tokens are supervised, so the drafter would learn prompts as the verifier's own text",
            f"all {len(row.loss_mask)}; set loss_mask to 0 over the prompt (to train on a whole document, over its "
            "first token)",
        )
    return row


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())


def as_turns(turns: Any) -> Sequence[Any]:
    """Returns a list of turns, also from JSON text and from a struct of lists ({"role": [...], "content": [...]})."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError:
            raise UnusableRow("conversation is text, not a list of turns") from None
    if isinstance(turns, Mapping):
        columns = [(key, values) for key, values in turns.items() if values is not None]
        if not all(isinstance(values, Sequence) for _, values in columns):
            raise UnusableRow("conversation is not a list of turns")
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
    if calls := parse_tool_calls(turn):
        message["tool_calls"] = calls
    if message.get("weight", 1) not in (0, 1):
        raise UnusableRow("a turn's weight is neither 0 nor 1", repr(message["weight"]))
    if content is None and "tool_calls" not in message:
        raise UnusableRow("a turn has no content")
    return message


def parse_tool_calls(turn: Mapping[str, Any]) -> list[Any]:
    """Returns a turn's calls with their arguments as objects, which templates write as JSON themselves.

    OpenAI's format has them as JSON text, and its older one a single `function_call`. Raises `UnusableRow`.
    """
    calls = from_json(turn.get("tool_calls"), "tool_calls")
    if not calls and turn.get("function_call"):
        calls = [{"type": "function", "function": from_json(turn["function_call"], "function_call")}]
    if not isinstance(calls or [], Sequence):
        raise UnusableRow("tool_calls is not a list")
    parsed = []
    for call in calls or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None  # some leave the envelope out
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UnusableRow("a tool call has no function name")
        arguments = from_json(function.get("arguments"), "a tool call's arguments")
        envelope = {"type": "function", **(call if function is not call else {})}
        parsed.append({**envelope, "function": {**function, "arguments": {} if arguments is None else arguments}})
    return parsed


def from_json(value: Any, name: str) -> Any:
    """Parses JSON text; returns anything else as it is, and None for an empty text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise UnusableRow(f"{name} is not valid JSON", str(error)) from None


def text_of(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        if not all(isinstance(part.get("text"), str) for part in content):
            raise UnusableRow("a turn has parts that are not text (only text is supported)")
        return "".join(part["text"] for part in content)
    raise UnusableRow("a turn's content is not text")


def parse_tools(tools: Any) -> list[Any] | None:
    tools = from_json(tools, "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, Sequence):
        raise UnusableRow("tools is not a list")
    if wrong := [tool for tool in tools if not isinstance(tool, Mapping)]:
        raise UnusableRow("tools holds what is no object", excerpt(wrong[0]))
    return list(tools)
