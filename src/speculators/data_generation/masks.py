"""Loss masks from a tokenizer's own chat template: which tokens of a conversation the verifier wrote.

The boundary of an assistant turn j is found by rendering, never by searching for marker strings:

    P = tokens(messages[:j]     with the generation prompt)     ... <user> hi <assistant>
    F = tokens(messages[:j + 1] without it)                     ... <user> hi <assistant> hello <end>
    loss mask                                                       0    0    0           1     1

One row per assistant turn, because that is what the verifier saw: templates drop earlier reasoning, so the rows of
one conversation need not be prefixes of each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from speculators.data_generation.conversations import Conversation, Message, TokenRow, UnusableRow

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING_KEYS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class MaskSpan:
    """A run of tokens that are all supervised, or all context."""

    start: int
    stop: int
    supervised: bool
    text: str


@dataclass
class TurnRows:
    """The rows of one conversation, and why turns of it gave none."""

    rows: list[TokenRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


class ChatRenderer:
    """Messages -> token ids, as the verifier's serving engine would render them."""

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template_of(tokenizer)
        self.template_kwargs = dict(template_kwargs or {})

    @property
    def marks_generations(self) -> bool:
        """Does the template itself say, with {% generation %} blocks, which text is the assistant's?"""
        return GENERATION_BLOCK.search(self.template) is not None

    def token_ids(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool
    ) -> list[int]:
        rendered = self.render(messages, tools, add_generation_prompt=add_generation_prompt, tokenize=False)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def generation_mask(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The mask of the template's own {% generation %} blocks, over the tokens of the whole conversation."""
        encoded = self.render(
            messages,
            tools,
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["assistant_masks"])

    def render(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> Any:
        renamed = [rename_reasoning(message, self.template) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(renamed, tools=tools, **options, **self.template_kwargs)
        except (jinja2.TemplateError, TypeError) as error:
            raise UnusableRow(f"chat template refuses it: {str(error)[:100]}") from error


def chat_template_of(tokenizer: Any) -> str:
    """The template's text. `ValueError` for a tokenizer that has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        name = getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer of {name!r} has no chat template, so conversations cannot be rendered; use the chat "
            "(instruct) version of the model, put a chat_template.jinja into its directory, or give pre-tokenised "
            "rows (input_ids and loss_mask)"
        )
    return str(template)


def rename_reasoning(message: Message, template: str) -> Message:
    """Data sets say `thinking` or `reasoning_content`; a template reads one of them and would ignore the other."""
    for given, other in (REASONING_KEYS, REASONING_KEYS[::-1]):
        if given in message and other not in message and given not in template and other in template:
            renamed = {key: value for key, value in message.items() if key != given}
            return {**renamed, other: message[given]}
    return message


def turn_rows(conversation: Conversation, renderer: ChatRenderer, max_length: int) -> TurnRows:
    """One row per assistant turn that follows something. Raises `UnusableRow` when a boundary cannot be found."""
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
        start = generation_start(
            prompt, full, lambda j=j: renderer.token_ids(messages[:j], tools, add_generation_prompt=False)
        )
        found.rows.append(TokenRow(full, [0] * start + [1] * (len(full) - start)))
    return found


def generation_start(prompt: Sequence[int], full: Sequence[int], context: Any) -> int:
    """Index of the first token the verifier wrote. `context()` gives the earlier messages without generation prompt.

    The full text need not start with the prompt: a generation prompt may open a reasoning block that the rendered
    answer lacks, or a merge of the tokenizer may span the boundary. Then what they share is the boundary, as long as
    all earlier messages are inside it.
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
    """Join each row into the next one of the conversation where it is a prefix of it: same states, fewer tokens."""
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
    """Does our boundary sit where the template's own {% generation %} block of the last turn starts?

    Only the start is compared: blocks differ in whether they include the end-of-turn marker.
    """
    start = row.loss_mask.index(1)
    mask = list(generation_mask[: len(row.input_ids)])
    return mask[start] == 1 and (start == 0 or mask[start - 1] == 0)


def mask_spans(tokenizer: Any, input_ids: Sequence[int], loss_mask: Sequence[int]) -> list[MaskSpan]:
    """The row as runs of supervised and context text, for printing in two colours."""
    spans: list[MaskSpan] = []
    ids, mask = [int(token) for token in input_ids], [bool(bit) for bit in loss_mask]
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or mask[stop] != mask[start]:
            text = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
            spans.append(MaskSpan(start, stop, mask[start], text))
            start = stop
    return spans
