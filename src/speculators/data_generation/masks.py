"""Makes loss masks with a tokenizer's own chat template: which tokens of a conversation the verifier wrote.

The boundary of an assistant turn j is found by rendering, never by searching for marker strings:

    P = tokens(messages[:j]     with the generation prompt)     ... <user> hi <assistant>
    F = tokens(messages[:j + 1] without it)                     ... <user> hi <assistant> hello <end>
    loss mask                                                       0    0    0           1     1

Where the template renders earlier turns differently once the answer follows, the prompt is P and only the answer's part
of F follows it: what the verifier reads and writes when it serves. A line break after the end marker is the template's.

One row per assistant turn, because that is what the verifier saw: templates drop earlier reasoning, so the rows of
one conversation need not be prefixes of each other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import Conversation, Message, TokenRow, UnusableRow
from speculators.utils.chat_template import REASONING_KEYS, THOUGHT, ChatRenderer, Tool

OTHER_ANSWER = "\ue000"
"""An answer that no real one begins like: a character for private use."""


@dataclass(frozen=True)
class MaskSpan:
    """A run of tokens that are all supervised, or all context."""

    start: int
    stop: int
    supervised: bool
    text: str


@dataclass
class TurnRows:
    """The rows of one conversation, and why some of its answers gave no row."""

    rows: list[TokenRow] = field(default_factory=list)
    num_turns: int = 0
    """Answers of the conversation."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Reason -> answers that are left out."""
    num_without_reasoning: int = 0
    """Rows whose answer had reasoning that the template does not render."""


def turn_rows(conversation: Conversation, renderer: ChatRenderer, max_length: int) -> TurnRows:
    """Makes one row per assistant turn that follows another turn, clipped to `max_length` tokens.

    Raises `UnusableRow` when a boundary cannot be found, or the template leaves out tool calls or their results.
    """
    found = TurnRows()
    messages, tools = conversation.messages, conversation.tools
    for j, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        found.num_turns += 1
        reason = reason_for_context_only(j, message)
        if reason is not None:
            found.filtered[reason] += 1
            continue
        turn = RenderedTurn(renderer, messages[: j + 1], tools)
        if len(turn.prompt) >= max_length:
            found.filtered["turn's prompt fills the whole window (seq_length)"] += 1
            continue
        turn.refuse_lost_tools()
        found.num_without_reasoning += turn.loses_reasoning
        found.rows.append(turn.row().clipped(max_length))
    return found


def reason_for_context_only(index: int, message: Message) -> str | None:
    """Says why the verifier did not write this assistant turn, or why it is not to be trained on."""
    if index == 0:
        return "opening assistant turn (context only)"
    if message.get("weight") == 0:
        return "turn has weight 0 (context only)"
    if message.get("prefix"):
        return "turn is a prefix that was written for the verifier (context only)"
    return None


class RenderedTurn:
    """A conversation that ends in an answer, rendered up to it and whole."""

    def __init__(self, renderer: ChatRenderer, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
        self.renderer = renderer
        self.earlier, self.message, self.tools = list(messages[:-1]), messages[-1], tools
        self.prompt_text = renderer.text(self.earlier, tools, add_generation_prompt=True)
        self.prompt = renderer.encode(self.prompt_text)
        self.full_text = renderer.text(messages, tools, add_generation_prompt=False)
        self.answer_text = self.full_text[common_prefix_length(self.prompt_text, self.full_text) :]

    def row(self) -> TokenRow:
        """Returns prompt and answer with their mask: supervised up to the token with which the verifier ends."""
        ids = self.renderer.encode(self.full_text)
        try:
            start = generation_start(self.prompt, ids, lambda: self.renderer.encode(self.context_text()))
        except UnusableRow:
            ids, start = self.prompt + self.answer_apart(), len(self.prompt)
        stop = num_written(self.renderer, ids, start)
        if stop is None:  # the next turn's first token ends this one, as in GLM
            role = "tool" if self.message.get("tool_calls") else "user"
            token = self.renderer.token_after_answer(role)
            ids = ids if token is None else [*ids, token]
            stop = len(ids)
        return TokenRow(ids, [0] * start + [1] * (stop - start) + [0] * (len(ids) - stop))

    def context_text(self) -> str:
        return self.renderer.text(self.earlier, self.tools, add_generation_prompt=False)

    def answer_apart(self) -> list[int]:
        """Returns the tokens of the answer alone, for templates that render earlier turns differently once it follows.

        The answer begins where the end of the prompt stands in the whole text, before any answer could differ. Raises
        `UnusableRow` when it does not stand there.
        """
        other = [*self.earlier, {"role": "assistant", "content": OTHER_ANSWER}]
        other_text = self.renderer.text(other, self.tools, add_generation_prompt=False)
        latest = common_prefix_length(self.full_text, other_text)
        context = self.context_text()
        num_opening = len(self.prompt_text) - len(context) if self.prompt_text.startswith(context) else 0
        for num_shared in (256, 64, 16, 4):
            end_of_prompt = self.prompt_text[-(num_opening + num_shared) :]
            place = self.full_text.rfind(end_of_prompt, 0, latest)
            if place >= 0:
                return self.renderer.encode_from(self.full_text, place + len(end_of_prompt))
        raise UnusableRow("the template renders earlier turns differently once the answer follows (no boundary)")

    def refuse_lost_tools(self) -> None:
        """Raises `UnusableRow` when the row would teach an immediate end of turn, or an answer from nowhere."""
        for call in self.message.get("tool_calls") or ():
            name = call["function"]["name"]
            if name not in self.answer_text:
                raise UnusableRow("the template does not render tool calls", f"a call of {name!r} is missing")
        for message in self.earlier[last_assistant(self.earlier) + 1 :]:
            content = message["content"].strip()
            if message["role"] == "tool" and not is_in(content, self.prompt_text):
                raise UnusableRow("the template does not render tool results", f"{content[:40]!r} is missing")

    @property
    def loses_reasoning(self) -> bool:
        reasoning = reasoning_of(self.message)
        return not is_in("".join(reasoning.split()), "".join(self.answer_text.split()))


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Returns a message's reasoning, under any of its names or as a <think> block of its content; "" without any."""
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            return str(message[key])
    thought = THOUGHT.search(message.get("content") or "")
    return thought[1] if thought else ""


def last_assistant(messages: Sequence[Message]) -> int:
    """Returns the index of the last assistant turn; -1 when there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)


def is_in(text: str, rendered: str) -> bool:
    """Says whether the template rendered the text, as it is or as JSON."""
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def num_written(renderer: ChatRenderer, ids: Sequence[int], start: int) -> int | None:
    """Counts the tokens up to the end marker, behind which templates put a line break; None: the row has no marker."""
    stop = len(ids)
    while stop > start and ids[stop - 1] not in renderer.end_token_ids:
        if renderer.decode([ids[stop - 1]]).strip():
            return None
        stop -= 1
    return stop if stop > start else None


def generation_start(prompt: Sequence[int], full: Sequence[int], context: Callable[[], list[int]]) -> int:
    """Finds the index of the first token that the verifier wrote.

    `context()` returns the tokens of the earlier messages without generation prompt. The full text need not start with
    the prompt: a generation prompt may open a reasoning block that the rendered answer lacks, or a merge of the
    tokenizer may span the boundary. Then the end of their common prefix is the boundary, provided that it contains all
    earlier messages. Raises `UnusableRow` otherwise.
    """
    if list(full[: len(prompt)]) == list(prompt):
        return len(prompt)
    shared = common_prefix_length(prompt, full)
    context_ids = context()
    if len(context_ids) <= shared and list(full[: len(context_ids)]) == list(context_ids):
        return shared
    raise UnusableRow("the template renders earlier turns differently once the answer follows (no boundary)")


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def merge_prefix_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Joins a row into the next one of the conversation where it is a prefix of it: same states, fewer tokens."""
    merged: list[TokenRow] = []
    for row in rows:
        previous = merged[-1] if merged else None
        if previous is not None and row.input_ids[: len(previous.input_ids)] == previous.input_ids:
            mask = previous.loss_mask + row.loss_mask[len(previous.loss_mask) :]
            merged[-1] = TokenRow(
                row.input_ids, mask, previous.num_turns + row.num_turns, previous.num_cut + row.num_cut
            )
        else:
            merged.append(row)
    return merged


def agrees_with_template(row: TokenRow, generation_mask: Sequence[int]) -> bool:
    """Says whether our boundary is where the template's own {% generation %} block of the last turn starts.

    Compares only the start: blocks differ in whether they include the end-of-turn marker.
    """
    start = row.loss_mask.index(1)
    mask = list(generation_mask[: len(row.input_ids)])
    return mask[start] == 1 and (start == 0 or mask[start - 1] == 0)


def mask_spans(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]
) -> list[MaskSpan]:
    """Splits the row into runs of supervised and context text, for printing in two colours."""
    spans: list[MaskSpan] = []
    ids, mask = [int(token) for token in input_ids], [bool(bit) for bit in loss_mask]
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or mask[stop] != mask[start]:
            text = str(tokenizer.decode(ids[start:stop], skip_special_tokens=False))
            spans.append(MaskSpan(start, stop, mask[start], text))
            start = stop
    return spans


# -- where supervised spans begin


def opening_of(renderer: ChatRenderer) -> list[int]:
    """Returns the tokens with which the template opens an answer; empty where it has none."""
    messages = [{"role": "user", "content": "x"}]
    asked = renderer.token_ids(messages, add_generation_prompt=True)
    plain = renderer.token_ids(messages, add_generation_prompt=False)
    return asked[len(plain) :] if asked[: len(plain)] == plain else []


def places_after(opening: Sequence[int], ids: Sequence[int]) -> set[int]:
    """Returns where an answer may begin: behind each occurrence of `opening`."""
    ids, size = list(ids), len(opening)
    return {at + size for at in range(len(ids) - size + 1) if ids[at : at + size] == list(opening)}


def supervised_spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    padded = [False, *map(bool, mask), False]
    edges = [at for at, (before, here) in enumerate(pairwise(padded)) if before != here]
    return list(zip(edges[::2], edges[1::2], strict=True))


def offset_of(start: int, starts: Collection[int]) -> str:
    """Returns "0", "+1" (a token late), "-2", ...; "none" where no answer begins near."""
    nearest = min((start - place for place in starts), key=abs, default=None)
    return "none" if nearest is None or abs(nearest) > 9 else f"{nearest:+d}" if nearest else "0"
