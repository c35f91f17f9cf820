"""Answers conversations anew: whose turn it is, what to ask the verifier, which rows to write. No model.

original    system  user  assistant  user  assistant          (an answer is asked for at the end, too, if it is missing)
rollout     system  user  GENERATE   user  GENERATE           each answer is context for the next question

The prompts of an evaluation are what is asked for the first answer of each conversation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import (
    Message,
    TokenRow,
    UnusableRow,
    parse_prompt,
    parse_token_row,
    refuse_no_object,
)
from speculators.data_generation.datasets import load_raw_dataset
from speculators.utils.chat_template import ChatRenderer, ChatTemplateError
from speculators.utils.names import excerpt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What the verifier is asked: the tokens to continue, and how to draw."""

    prompt: list[int]
    seed: int
    temperature: float = 0.0
    messages: list[Message] | None = None
    """What `prompt` renders; None: it was given as tokens."""
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Answer:
    """Generated tokens, without the prompt and with the end token."""

    token_ids: list[int]
    is_from_text: bool = False
    """The server gave text, which was tokenised here: the verifier may have written other tokens of the same text."""
    finish_reason: str | None = None
    """None: "stop" if the last one is a stop token, else "length"."""
    stop: str = ""
    """The stop string that ended them: part of the tokens, not of the conversation."""


Generate = Callable[[Sequence[Question]], Sequence[Answer | Exception]]
"""Answers questions, in the same order."""
TOOL_CALL = re.compile(r"<\|?tool_call|\[TOOL_CALLS\]|<function=")


@dataclass(frozen=True)
class Provenance:
    """Who answered and how; every row records it."""

    endpoint: str
    sampling_params: Mapping[str, Any]
    stop_token_ids: Collection[int]
    drop_reasoning: bool = False
    """Thoughts stay in a row as context, and are not trained on."""

    def settings_of(self, rollout: Rollout) -> dict[str, Any]:
        """Returns the sampling settings of a conversation."""
        drawn = {} if rollout.temperature is None else {"temperature": rollout.temperature}
        return {**self.sampling_params, **drawn}

    def question(self, rollout: Rollout, prompt: list[int]) -> Question:
        messages = list(rollout.messages) if rollout.prompt_ids is None else None
        temperature = self.settings_of(rollout).get("temperature", 0.0)
        return Question(prompt, self.seed_of(rollout), temperature, messages, rollout.tools)

    def seed_of(self, rollout: Rollout) -> int:
        """Returns the seed of a conversation's next answer: other conversations, samples and turns draw other numbers,
        and the same one draws the same numbers whatever is answered beside it."""
        return number_of([self.sampling_params.get("seed"), rollout.primary_id, rollout.sample, len(rollout.answers)])


def number_of(key: Sequence[Any]) -> int:
    """Hashes a key to a number of 62 bits."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big") >> 2


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
    shape: str = ""
    """The columns in which the row held it."""
    sample: int = 0
    """Which of several answers to the same prompt."""
    temperature: float | None = None
    """Drawn for this conversation; None: the run's."""
    position: int = 0
    """Number of turns of the original that were handled."""
    messages: list[Message] = field(default_factory=list)
    """The new conversation so far."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Rows to write."""

    def example(self) -> str:
        """Says which shape was recognised, with the beginning of the first question."""
        question = next((turn["content"] for turn in self.turns if turn["role"] == "user"), self.prompt_ids)
        return f"prompts are in {self.shape}; the first: {excerpt(question)}"

    @property
    def index_and_sample(self) -> tuple[int, int]:
        return self.index, self.sample

    @property
    def content_sha256(self) -> str:
        """Hashes what is asked: all turns except the answers that are replaced."""
        first_question = next((i for i, turn in enumerate(self.turns) if turn["role"] == "user"), 0)
        asked = [turn for i, turn in enumerate(self.turns) if i < first_question or turn["role"] != "assistant"]
        content = json.dumps([asked, self.tools, self.prompt_ids], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def finish(self) -> None:
        """Marks the last answer: a file that lacks it holds half of the conversation."""
        if self.answers:
            self.answers[-1]["metadata"]["is_last_turn"] = True

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
        if self.answers and self.messages[-1].get("tool_calls") and not self.take_recorded_results():
            return False  # nobody has the result of the call that the verifier made
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

    def take_recorded_results(self) -> bool:
        """Copies the results of the verifier's calls, if the original made the same calls in its answer's place."""
        replaced, calls = self.turns[self.position - 1], self.messages[-1]["tool_calls"]
        results = list(takewhile(lambda turn: turn["role"] == "tool", self.turns[self.position :]))
        recorded = replaced.get("tool_calls") or []
        if replaced["role"] != "assistant" or list(map(called, calls)) != list(map(called, recorded)):
            return False
        if len(results) != len(calls):
            return False
        place_of = {call.get("id"): place for place, call in enumerate(recorded)}
        for number, result in enumerate(results):
            place = place_of.get(result.get("tool_call_id"), number)
            self.messages.append({**result, "tool_call_id": calls[place]["id"]})
        self.position += len(results)
        return True

    def is_waiting(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] in ("user", "tool")

    def accept(
        self,
        prompt: Sequence[int],
        answer: Answer,
        tokenizer: PreTrainedTokenizerBase,
        provenance: Provenance,
        renderer: ChatRenderer | None,
    ) -> None:
        """Adds the verifier's answer to the conversation and to the rows. Raises `ValueError` when it is empty."""
        ids = [int(token) for token in answer.token_ids]
        if not ids:
            raise ValueError("the verifier's answer has no token")
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
        message = {} if renderer is None else renderer.answer_message(ids, answer.stop)
        self.messages.append(message)
        num_context = len(prompt)
        if provenance.drop_reasoning and renderer is not None and message.get("reasoning_content"):
            num_context += num_reasoning_tokens(ids, renderer)
        self.answers.append(
            {
                "id": f"{self.primary_id}{f'_sample{self.sample}' if self.sample else ''}_gen{len(self.answers)}",
                "primary_id": self.primary_id,
                "input_ids": [*prompt, *ids],
                "loss_mask": [0] * num_context + [1] * (len(prompt) + len(ids) - num_context),
                "text": text,
                "metadata": {
                    "idx": self.index,
                    "content_sha256": self.content_sha256,
                    "sample": self.sample,
                    "turn": len(self.answers),
                    "is_last_turn": False,
                    "finish_reason": answer.finish_reason
                    or ("stop" if ids[-1] in provenance.stop_token_ids else "length"),
                    "is_tool_call": "tool_calls" in message or TOOL_CALL.search(text) is not None,
                    "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
                    "endpoint": provenance.endpoint,
                    "sampling_params": provenance.settings_of(self),
                    **({"tokenised_from_text": True} if answer.is_from_text else {}),
                },
            }
        )


def called(call: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns what decides a call's result."""
    return call["function"]["name"], call["function"].get("arguments")


def num_reasoning_tokens(token_ids: Sequence[int], renderer: ChatRenderer) -> int:
    """Counts the tokens of an answer up to the end of its thought, all of them when the thought was cut off."""
    text = renderer.decode(token_ids)
    if "</think>" in text:
        num_letters = text.index("</think>") + len("</think>")
    else:  # gpt-oss: the channel of the thoughts ends where another one begins
        num_letters = text.rfind("<|start|>assistant")
    if num_letters < 0:
        return len(token_ids)
    return bisect_left(range(len(token_ids)), num_letters, key=lambda n: len(renderer.decode(token_ids[:n])))


def make_rollout(
    index: int, row: Any, primary_id: str, prompt_field: str | None = None, preset_field: str | None = None
) -> Rollout:
    """Starts a rollout from a raw row: turns, a bare prompt, or tokens, whose prompt ends at the first supervised one.

    Raises `UnusableRow` when the row has nothing to answer.
    """
    refuse_no_object(row)
    if prompt_field is None and row.get("input_ids") is not None and row.get("loss_mask") is not None:
        prompt = prompt_of(parse_token_row(row["input_ids"], row["loss_mask"]))
        return Rollout(index, primary_id, [], prompt_ids=prompt, shape="input_ids + loss_mask")
    shape, conversation = parse_prompt(row, prompt_field, preset_field)
    return Rollout(index, primary_id, conversation.messages, conversation.tools, shape=shape)


def prompt_of(row: TokenRow) -> list[int]:
    prompt = [token for token, _ in takewhile(lambda pair: not pair[1], zip(row.input_ids, row.loss_mask, strict=True))]
    if not prompt:
        raise UnusableRow("pre-tokenised row without a prompt: nothing to answer")
    return prompt


def load_prompts(
    source: str | os.PathLike[str] | Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> list[list[int]]:
    """The first `limit` prompts of a data source, or of rows, as token ids. Raises `ValueError` when it has none."""
    renderer = ChatRenderer(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    prompts, reasons = list[list[int]](), list[str]()
    raw_rows = load_raw_dataset(source)
    for index, row in enumerate(raw_rows):
        if len(prompts) == limit:
            break
        try:
            rollout = make_rollout(index, row, str(index))
            if renderer is None and rollout.prompt_ids is None:
                renderer = ChatRenderer(tokenizer)  # raises for a tokenizer without a template
            prompts.append(rollout.next_prompt(renderer) or [])
            if len(prompts) == 1:
                logger.info("%s: %s", raw_rows.name, rollout.example())
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
