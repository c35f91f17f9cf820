"""Answers one conversation anew: whose turn it is, what to ask the verifier, which rows to write. No model.

original    system  user  assistant  user  assistant          (an answer is asked for at the end, too, if it is missing)
rollout     system  user  GENERATE   user  GENERATE           each answer is context for the next question

The prompts of an evaluation are what is asked for the first answer of each conversation.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import (
    CONVERSATION_COLUMNS,
    Message,
    TokenRow,
    UnusableRow,
    parse_conversation,
    parse_token_row,
)
from speculators.data_generation.datasets import load_raw_dataset
from speculators.utils.chat_template import ChatRenderer, ChatTemplateError

TOOL_CALL = re.compile(r"<\|?tool_call|\[TOOL_CALLS\]|<function=")


@dataclass(frozen=True)
class Provenance:
    """Who answered and how; every row records it."""

    endpoint: str
    sampling_params: Mapping[str, Any]
    stop_token_ids: Collection[int]


@dataclass
class Rollout:
    """A conversation while it is being answered."""

    index: int
    """Row of the source."""
    primary_id: str
    turns: list[Message]
    tools: list[Any] | None = None
    prompt_ids: list[int] | None = None
    """A prompt given as tokens instead of turns."""
    position: int = 0
    """Number of turns of the original that were handled."""
    messages: list[Message] = field(default_factory=list)
    """The new conversation so far."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Rows to write."""

    def next_prompt(self, renderer: ChatRenderer | None) -> list[int] | None:
        """Returns the tokens that the verifier should continue; None when the conversation is over."""
        if self.prompt_ids is not None:
            return self.prompt_ids if not self.answers else None
        assert renderer is not None
        if not self.advance_to_question():
            return None
        return renderer.token_ids(self.messages, self.tools, add_generation_prompt=True)

    def advance_to_question(self) -> bool:
        """Copies turns up to the next answer and skips the original's answer. False: nothing is left to answer."""
        while self.position < len(self.turns):
            turn = self.turns[self.position]
            if turn["role"] == "tool" and self.answers and self.messages[-1]["role"] == "assistant":
                return False  # the result of a tool call that the new conversation did not make
            self.position += 1
            if turn["role"] != "assistant":
                self.messages.append(turn)
            elif self.is_waiting():
                return True
            elif not self.answers:
                self.messages.append(turn)  # an opening assistant turn is context
        return self.is_waiting()

    def is_waiting(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] in ("user", "tool")

    def accept(
        self,
        prompt: Sequence[int],
        token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        provenance: Provenance,
    ) -> None:
        """Adds the verifier's answer to the conversation and to the rows. Raises `ValueError` when it is empty."""
        ids = [int(token) for token in token_ids]
        if not ids:
            raise ValueError("the verifier's answer has no token")
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
        self.messages.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)})
        self.answers.append(
            {
                "id": f"{self.primary_id}_gen{len(self.answers)}",
                "primary_id": self.primary_id,
                "input_ids": [*prompt, *ids],
                "loss_mask": [0] * len(prompt) + [1] * len(ids),
                "text": text,
                "metadata": {
                    "idx": self.index,
                    "finish_reason": "stop" if ids[-1] in provenance.stop_token_ids else "length",
                    "is_tool_call": TOOL_CALL.search(text) is not None,
                    "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
                    "endpoint": provenance.endpoint,
                    "sampling_params": dict(provenance.sampling_params),
                },
            }
        )


def make_rollout(index: int, row: Any, primary_id: str, prompt_field: str | None = None) -> Rollout:
    """Starts a rollout from a raw row: turns, a bare prompt, or tokens, whose prompt ends at the first supervised one.

    Raises `UnusableRow` when the row has nothing to answer.
    """
    if not isinstance(row, Mapping):
        raise UnusableRow("row is not a JSON object")
    if row.get("input_ids") is not None and row.get("loss_mask") is not None:
        return Rollout(index, primary_id, [], prompt_ids=prompt_of(parse_token_row(row["input_ids"], row["loss_mask"])))
    prompt = row.get(prompt_field or "prompt")
    if isinstance(prompt, str) and not any(row.get(column) for column in CONVERSATION_COLUMNS):
        return Rollout(index, primary_id, [{"role": "user", "content": prompt}])
    conversation = parse_conversation(row, Counter())
    if not any(message["role"] == "user" for message in conversation.messages):
        raise UnusableRow("no user turn to answer")
    return Rollout(index, primary_id, conversation.messages, conversation.tools)


def prompt_of(row: TokenRow) -> list[int]:
    prompt = [token for token, _ in takewhile(lambda pair: not pair[1], zip(row.input_ids, row.loss_mask, strict=True))]
    if not prompt:
        raise UnusableRow("pre-tokenised row without a prompt: nothing to answer")
    return prompt


logger = logging.getLogger(__name__)


def load_prompts(
    source: str | os.PathLike[str] | Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> list[list[int]]:
    """The first `limit` prompts of a data source, or of rows, as token ids. Raises `ValueError` when it has none."""
    renderer = ChatRenderer(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    prompts: list[list[int]] = []
    reasons: list[str] = []
    raw_rows = load_raw_dataset(source)
    for index, row in enumerate(raw_rows):
        if len(prompts) == limit:
            break
        try:
            rollout = make_rollout(index, row, str(index))
            if renderer is None and rollout.prompt_ids is None:
                renderer = ChatRenderer(tokenizer)  # raises for a tokenizer without a template
            prompts.append(rollout.next_prompt(renderer) or [])
        except (UnusableRow, ChatTemplateError) as reason:
            reasons.append(str(reason))
    if not prompts:
        raise ValueError(
            f"no prompt in {raw_rows.name}: {len(reasons)} rows, {'; '.join(sorted(set(reasons))[:5]) or 'empty'}"
        )
    if reasons:
        logger.warning(
            "%s: %d rows without a prompt are left out; the first: %s", raw_rows.name, len(reasons), reasons[0]
        )
    return prompts
