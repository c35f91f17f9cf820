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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

logger = logging.getLogger(__name__)

Generate = Callable[[list[list[int]], list[int]], Sequence[list[int] | Exception]]
"""Takes prompts (token ids) and one sampling seed each; returns the generated tokens in the same order, without the
prompt and with the end token."""

TOOL_CALL = re.compile(r"<\|?tool_call|\[TOOL_CALLS\]|<function=")


@dataclass(frozen=True)
class Provenance:
    """Who answered and how; every row records it."""

    endpoint: str
    sampling_params: Mapping[str, Any]
    stop_token_ids: Collection[int]

    def seed_of(self, rollout: Rollout) -> int:
        """Returns the seed of a conversation's next answer: other conversations, samples and turns draw other numbers,
        and the same one draws the same numbers whatever is answered beside it."""
        key = [self.sampling_params.get("seed"), rollout.primary_id, rollout.sample, len(rollout.answers)]
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
    position: int = 0
    """Number of turns of the original that were handled."""
    messages: list[Message] = field(default_factory=list)
    """The new conversation so far."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Rows to write."""

    def example(self) -> str:
        """Says which shape was recognised, with the beginning of the first question."""
        question = next((turn["content"] for turn in self.turns if turn["role"] == "user"), self.prompt_ids)
        return f"prompts are in {self.shape}; the first: {question!r:.80}"

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
        while self.position < len(self.turns):
            turn = self.turns[self.position]
            if self.answers and self.messages[-1].get("tool_calls"):
                return False  # nobody has the result of the call that the verifier made
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
        renderer: ChatRenderer | None,
    ) -> None:
        """Adds the verifier's answer to the conversation and to the rows. Raises `ValueError` when it is empty."""
        ids = [int(token) for token in token_ids]
        if not ids:
            raise ValueError("the verifier's answer has no token")
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
        message = {} if renderer is None else renderer.answer_message(ids)
        self.messages.append(message)
        self.answers.append(
            {
                "id": f"{self.primary_id}{f'_sample{self.sample}' if self.sample else ''}_gen{len(self.answers)}",
                "primary_id": self.primary_id,
                "input_ids": [*prompt, *ids],
                "loss_mask": [0] * len(prompt) + [1] * len(ids),
                "text": text,
                "metadata": {
                    "idx": self.index,
                    "content_sha256": self.content_sha256,
                    "sample": self.sample,
                    "turn": len(self.answers),
                    "is_last_turn": False,
                    "finish_reason": "stop" if ids[-1] in provenance.stop_token_ids else "length",
                    "is_tool_call": "tool_calls" in message or TOOL_CALL.search(text) is not None,
                    "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
                    "endpoint": provenance.endpoint,
                    "sampling_params": dict(provenance.sampling_params),
                },
            }
        )


@dataclass
class RolloutBatches:
    """Answers batches of rollouts turn by turn until each conversation is over."""

    tokenizer: PreTrainedTokenizerBase
    generate: Generate
    provenance: Provenance
    max_prompt_tokens: int | None
    max_consecutive_errors: int
    renderer: ChatRenderer | None
    num_consecutive_errors: int = 0

    def answer(self, batch: Sequence[Rollout]) -> Iterator[tuple[Rollout, Exception | None]]:
        """Yields each rollout as soon as it is over, with the error that ended it or None."""
        waiting = list(batch)
        while waiting:
            asked: list[tuple[Rollout, list[int]]] = []
            for rollout in waiting:
                try:
                    prompt = self.prompt_of(rollout)
                except (UnusableRow, ChatTemplateError) as error:
                    yield rollout, error
                    continue
                if prompt is None:
                    rollout.finish()
                    yield rollout, None
                else:
                    asked.append((rollout, prompt))
            waiting = []
            prompts, seeds = [prompt for _, prompt in asked], [self.provenance.seed_of(rollout) for rollout, _ in asked]
            for (rollout, prompt), answer in zip(asked, self.ask(prompts, seeds), strict=True):
                try:
                    if isinstance(answer, Exception):
                        raise answer
                    rollout.accept(prompt, answer, self.tokenizer, self.provenance, self.renderer)
                except Exception as error:  # whatever the caller's generate raised for this prompt
                    yield rollout, error
                else:
                    waiting.append(rollout)

    def prompt_of(self, rollout: Rollout) -> list[int] | None:
        """Returns the next prompt; None when the conversation is over. Raises `UnusableRow` when it has no answer."""
        if self.renderer is None and rollout.prompt_ids is None:
            self.renderer = ChatRenderer(self.tokenizer)  # raises: the tokenizer has no template
        prompt = rollout.next_prompt(self.renderer)
        if prompt is None and not rollout.answers:
            raise UnusableRow("no turn of this conversation needs an answer")
        if prompt is None or self.max_prompt_tokens is None or len(prompt) <= self.max_prompt_tokens:
            return prompt
        if rollout.answers:
            return None  # the conversation outgrew the window: its answers so far are kept
        raise UnusableRow(f"prompt of {len(prompt)} tokens is longer than max_prompt_tokens={self.max_prompt_tokens}")

    def ask(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int] | Exception]:
        """Generates answers; if the whole batch fails, tries each prompt alone, so one bad prompt costs one row."""
        if not prompts:
            return []
        try:
            answers: list[list[int] | Exception] = list(self.generate(prompts, seeds))
        except Exception as error:
            if len(prompts) == 1:
                return [self.failed(error)]
            logger.warning("a batch of %d prompts failed (%s); trying each prompt alone", len(prompts), error)
            return [self.ask([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
        if len(answers) != len(prompts):
            raise ValueError(f"generate returned {len(answers)} answers for {len(prompts)} prompts; one each is needed")
        for index, answer in enumerate(answers):
            if isinstance(answer, Exception):
                answers[index] = self.failed(answer)
            else:
                self.num_consecutive_errors = 0
        return answers

    def failed(self, error: Exception) -> Exception:
        """Returns the error as an answer; raises it after so many in sequence that the verifier must be gone."""
        self.num_consecutive_errors += 1
        if self.num_consecutive_errors >= self.max_consecutive_errors:
            raise error
        return error


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
