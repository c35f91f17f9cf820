"""Makes loss masks with a tokenizer's own chat template: which tokens of a conversation the verifier wrote.

The boundary of an assistant turn j is found by rendering, never by searching for marker strings:

    P = tokens(messages[:j]     with the generation prompt)     ... <user> hi <assistant>
    F = tokens(messages[:j + 1] without it)                     ... <user> hi <assistant> hello <end>
    loss mask                                                       0    0    0           1     1

One row per assistant turn, because that is what the verifier saw: templates drop earlier reasoning, so the rows of
one conversation need not be prefixes of each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import Conversation, TokenRow, UnusableRow
from speculators.utils.chat_template import ChatRenderer


@dataclass(frozen=True)
class MaskSpan:
    """A run of tokens that are all supervised, or all context."""

    start: int
    stop: int
    supervised: bool
    text: str


@dataclass
class TurnRows:
    """The rows of one conversation, and why some of its turns gave no row."""

    rows: list[TokenRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def turn_rows(conversation: Conversation, renderer: ChatRenderer, max_length: int) -> TurnRows:
    """Makes one row per assistant turn that follows another turn, clipped to `max_length` tokens.

    Raises `UnusableRow` when a boundary cannot be found.
    """
    found = TurnRows()
    messages, tools = conversation.messages, conversation.tools
    for j, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if j == 0:
            found.dropped["opening assistant turn (context only)"] += 1
            continue
        prompt = renderer.token_ids(messages[:j], tools, add_generation_prompt=True)
        if len(prompt) >= max_length:
            found.dropped["turn's prompt fills the whole window (seq_length)"] += 1
            continue
        full = renderer.token_ids(messages[: j + 1], tools, add_generation_prompt=False)[:max_length]
        context = partial(renderer.token_ids, messages[:j], tools, add_generation_prompt=False)
        start = generation_start(prompt, full, context)
        found.rows.append(TokenRow(full, [0] * start + [1] * (len(full) - start)))
    return found


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


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
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
            merged[-1] = TokenRow(row.input_ids, mask)
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
