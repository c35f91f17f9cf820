"""Gets the answers of conversations: in batches from a function, or each in a thread of its own, from servers.

Conversations are handed on in the order of the source, so that a file is the same however often a run was resumed.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import Message, UnusableRow, parse_turn
from speculators.data_generation.masks import RenderedTurn
from speculators.data_generation.rollout import Answer, Generate, Provenance, Question, Rollout, number_of
from speculators.data_generation.vllm_client import InvalidResponseError
from speculators.utils.chat_template import ChatRenderer, ChatTemplateError
from speculators.utils.names import excerpt

logger = logging.getLogger(__name__)

Ended: TypeAlias = tuple[Rollout, Exception | None]
"""A conversation that is over, with the error that ended it."""
WINDOW = 4
"""Conversations that may wait for an earlier one to be written, as a multiple of those that are answered at once."""


@dataclass(frozen=True)
class Mix:
    """Settings of which each conversation draws one, by seed, id and sample. Empty: as the run."""

    temperatures: tuple[float, ...] = ()
    system_prompts: tuple[str, ...] = ()
    """For conversations that have no system turn of their own. An empty text stands for none."""
    seed: int | None = None

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            if not 0 <= temperature < math.inf:
                raise ValueError(f"temperatures={list(self.temperatures)}: each is 0 (greedy) or more")
        for text in self.system_prompts:
            if not isinstance(text, str):
                shown = excerpt(text)
                raise ValueError(f"system_prompts holds {shown}; each is a text, an empty one for no system turn")

    def start(self, rollout: Rollout, primary_id: str, sample: int) -> Rollout:
        """Returns a copy of the rollout that is about to be answered."""
        messages: list[Message] = []
        if self.system_prompts and rollout.turns and all(turn["role"] != "system" for turn in rollout.turns):
            system_prompt = self.system_prompts[self.draw("system", primary_id, sample) % len(self.system_prompts)]
            messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        temperature = None
        if self.temperatures:
            temperature = self.temperatures[self.draw("temperature", primary_id, sample) % len(self.temperatures)]
        return replace(
            rollout, primary_id=primary_id, sample=sample, temperature=temperature, messages=messages, answers=[]
        )

    def draw(self, what: str, primary_id: str, sample: int) -> int:
        return number_of([what, self.seed, primary_id, sample])


def refuse_equal_samples(num_samples: int, mix: Mix, sampling_params: Mapping[str, Any]) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; each prompt needs an answer: 1 or more")
    if num_samples > 1 and 0 in (mix.temperatures or (sampling_params.get("temperature"),)):
        raise ValueError(
            f"num_samples={num_samples} at temperature 0 gives equal answers; sample (temperature above 0), or take one"
        )


def read_system_prompts(path: Path) -> list[str]:
    """Reads system prompts: a JSON list of texts, or lines of plain text, where an empty line stands for none.

    Raises `ValueError` when the file cannot be read or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        prompts = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"system prompts {str(path)!r} cannot be read: {error}") from error
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"system prompts {str(path)!r} hold no list of texts: write one per line, or a JSON list")
    return prompts


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

    def answer(self, batch: Sequence[Rollout]) -> Iterator[Ended]:
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
            questions = [self.provenance.question(rollout, prompt) for rollout, prompt in asked]
            for (rollout, prompt), answer in zip(asked, self.ask(questions), strict=True):
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

    def ask(self, questions: list[Question]) -> list[Answer | Exception]:
        """Generates answers; if the whole batch fails, tries each question alone, so one bad prompt costs one row."""
        if not questions:
            return []
        try:
            answers = list(self.generate(questions))
        except Exception as error:
            if len(questions) == 1:
                return [self.failed(error)]
            logger.warning("a batch of %d prompts failed (%s); trying each prompt alone", len(questions), error)
            return [self.ask([question])[0] for question in questions]
        if len(answers) != len(questions):
            raise ValueError(
                f"generate returned {len(answers)} answers for {len(questions)} questions; one each is needed"
            )
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

    def in_batches(self, rollouts: Iterable[Rollout], size: int) -> Iterator[Ended]:
        """Answers `size` conversations together, turn by turn."""
        for batch in batches(rollouts, size):
            yield from in_source_order(batch, self.answer(batch))

    def at_once(self, rollouts: Iterable[Rollout], num_threads: int) -> Iterator[Ended]:
        """Answers conversations in `num_threads` threads, from which `generate` is called with one question each.

        Closed early, it lets the threads end by themselves: a server may need minutes for the answers they wait for.
        """
        tasks: SimpleQueue[tuple[Rollout, Future[Ended]] | None] = SimpleQueue()
        for _ in range(num_threads):
            threading.Thread(target=work, args=(tasks, self.answer_one), daemon=True).start()
        asked: deque[Future[Ended]] = deque()
        try:
            for rollout in rollouts:
                asked.append(Future())
                tasks.put((rollout, asked[-1]))
                while len(asked) == WINDOW * num_threads or (asked and asked[0].done()):
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()
        finally:
            for future in asked:
                future.cancel()
            for _ in range(num_threads):
                tasks.put(None)

    def answer_one(self, rollout: Rollout) -> Ended:
        (ended,) = self.answer([rollout])
        return ended


def work(tasks: SimpleQueue[tuple[Rollout, Future[Ended]] | None], answer: Callable[[Rollout], Ended]) -> None:
    """Answers conversations of a queue until it holds None."""
    while (task := tasks.get()) is not None:
        rollout, future = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(answer(rollout))
        except BaseException as error:  # raised again in the thread that writes
            future.set_exception(error)


def in_source_order(batch: Sequence[Rollout], ended: Iterable[Ended]) -> Iterator[Ended]:
    """Yields the conversations of a batch in its order."""
    waiting = [rollout.index_and_sample for rollout in batch]
    early: dict[tuple[int, int], Ended] = {}
    for rollout, error in ended:
        early[rollout.index_and_sample] = (rollout, error)
        while waiting and waiting[0] in early:
            yield early.pop(waiting.pop(0))


def batches(rollouts: Iterable[Rollout], size: int) -> Iterator[list[Rollout]]:
    batch: list[Rollout] = []
    for rollout in rollouts:
        batch.append(rollout)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# -- questions and answers as OpenAI's interface has them --------------------------------------------------------------

COMPLETIONS, CHAT = "completions", "chat/completions"
MOST_SEED = 2**31
"""Seeds that every server takes are below."""


def as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a message as OpenAI's interface has it: arguments of calls as JSON text, no marks of the training data."""
    sent = {key: value for key, value in message.items() if key not in ("weight", "prefix", "tool_calls")}
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**sent, "tool_calls": calls} if calls else sent


def requests_of(
    question: Question, request: Mapping[str, Any], template_kwargs: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Completes a request by what is asked: by path, the prompt's tokens, and the messages that it renders."""
    request = {**request, "temperature": question.temperature, "seed": question.seed % MOST_SEED}
    requests = {COMPLETIONS: {**request, "prompt": question.prompt}}
    if question.messages is not None:
        optional = {"tools": question.tools, "chat_template_kwargs": dict(template_kwargs or {})}
        messages = [as_openai(message) for message in question.messages]
        given = {key: value for key, value in optional.items() if value}
        requests[CHAT] = {**request, "messages": messages, **given}
    return requests


def tokens_of_message(
    given: Mapping[str, Any], question: Question, renderer: ChatRenderer, *, is_cut: bool
) -> list[int]:
    """Returns the tokens of a message whose reasoning or calls a server has parsed: those that the verifier's template
    renders behind the question, with the token that ends the answer unless it was cut.

    Raises `InvalidResponseError` where the template does not render all of it.
    """
    content = given.get("content")
    try:
        message = parse_turn({**given, "role": "assistant", "content": "" if content is None else content}, Counter())
        turn = RenderedTurn(renderer, [*(question.messages or ()), message], question.tools)
        turn.refuse_lost_tools()
        if turn.loses_reasoning:
            raise UnusableRow("the template does not render its reasoning")
        row = turn.row()
    except (UnusableRow, ChatTemplateError) as error:
        raise InvalidResponseError(
            f"the server's answer cannot be rendered as the verifier wrote it: {error}"
        ) from error
    token_ids = [token for token, is_answer in zip(row.input_ids, row.loss_mask, strict=True) if is_answer]
    while is_cut and token_ids and token_ids[-1] in renderer.end_token_ids:
        token_ids.pop()
    return token_ids
