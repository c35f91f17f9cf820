"""Requests: what callers give, the state of a running request, and what comes out of it. The checks that a request must
pass are in `request_builder`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speculators.decoding.adjustments import Adjustment
from speculators.decoding.settings import SamplingParams
from speculators.decoding.stats import UNDRAFTED, DecodeStats, authors_of
from speculators.decoding.text import IncrementalText
from speculators.utils.report import WorkFailedError

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""error: the verifier's scores were not finite; `error` says where. Whatever came before is the verifier's own text."""
Prompts = Sequence[str | Sequence[int]]
"""Texts or token ids."""
Samplings = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, or one per prompt; None: `SamplingParams()`."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the verifier's raw scores: before biases, penalties and temperature."""

    logprob: float
    """Of the token that stands there."""
    top: dict[int, float]
    """Of the most likely tokens, as many as were asked for."""


PromptLogprobs = list[TokenLogprobs | None] | None
"""One entry per token of the prompt; the first is None: nothing precedes it. None: not asked for."""


class Drafted(NamedTuple):
    """What a round drafted for one request."""

    num_accepted: int = 0
    """How many of the round's tokens, from the first, are accepted drafts. The one after them is the verifier's own."""
    depth: int = 0
    """Most drafts that the round could accept. All accepted: the verifier's token is a bonus; fewer: recovered."""
    token_ids: Sequence[int] = ()
    """Of a chain: the drafts; the one after those accepted is the rejected one. Empty for trees."""
    own_probs: Sequence[float | None] | None = None
    """The drafter's own probability of each, before temperature, where the request asks for log-probabilities. None:
    n-gram and suffix drafts have none."""


NOTHING_DRAFTED = Drafted()


@dataclass(frozen=True)
class StreamEvent:
    """Tokens that a request gained in one round."""

    request_index: int
    """Position of the request among the prompts."""
    token_ids: list[int]
    text: str
    """What became readable; tokens that end inside a character, and text that may begin a stop string, show up later.
    The texts of a request's events make up its output's. Empty without a tokenizer."""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    sample_index: int = 0
    """Which of the prompt's `n` samples."""
    prompt_logprobs: PromptLogprobs = None
    """Of the first event of a prompt, where they were asked for."""
    drafted: Drafted = NOTHING_DRAFTED

    @property
    def num_accepted(self) -> int:
        return min(self.drafted.num_accepted, len(self.token_ids))

    @property
    def draft_depth(self) -> int:
        return self.drafted.depth

    @property
    def authors(self) -> list[str]:
        """Who wrote each token."""
        return authors_of(len(self.token_ids), self.num_accepted, self.draft_depth)


class AuthoredText:
    """The texts of one request's events in pieces, each with who wrote it. A character made of several tokens is of the
    last one's author."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams):
        self._read = IncrementalText(tokenizer, params)
        self._author_of_char: list[str] = []
        """Of the characters that no event gave out yet."""
        self._last = UNDRAFTED

    def pieces(self, event: StreamEvent) -> list[tuple[str, str]]:
        """Pieces of `event.text`: (text, author)."""
        for token_id, author in zip(event.token_ids, event.authors, strict=True):
            num_before = len(self._read.text)
            self._read.add(token_id)
            self._author_of_char += [author] * (len(self._read.text) - num_before)
            self._last = author
        authors = self._author_of_char[: len(event.text)]
        authors += [self._last] * (len(event.text) - len(authors))
        del self._author_of_char[: len(event.text)]
        written = groupby(zip(event.text, authors, strict=True), key=itemgetter(1))
        return [("".join(char for char, _ in run), author) for author, run in written]


@dataclass
class RequestOutput:
    """A finished request: the first sample of a prompt, and those beside it."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, the end-of-sequence token included."""
    text: str = ""
    """Cut before a stop string, without special tokens and stop tokens (unless the request asks for them)."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None: the end of sequence, or no stop."""
    stats: DecodeStats = field(default_factory=DecodeStats)
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    """Why it ended with the reason "error"."""
    prompt_logprobs: PromptLogprobs = None
    other_samples: list[RequestOutput] = field(default_factory=list)
    """With `n` above 1: samples 1 .. n - 1 of the same prompt."""

    @property
    def outputs(self) -> list[RequestOutput]:
        """All samples of the prompt, this one first."""
        return [self, *self.other_samples]


class NonFiniteScoresError(WorkFailedError):
    """The verifier's scores were NaN or infinite: it has no text to give, and nothing can be measured with it."""


def raise_for_failed(outputs: Sequence[RequestOutput], what: str = "prompt") -> None:
    """Raises `NonFiniteScoresError` with the first error, and how many requests ended so."""
    samples = [(number, sample) for number, output in enumerate(outputs) for sample in output.outputs]
    failed = [(number, sample.error) for number, sample in samples if sample.error is not None]
    if failed:
        more = f" ({len(failed)} of {len(samples)} requests ended so)" if len(failed) > 1 else ""
        raise NonFiniteScoresError(f"{what} {failed[0][0]}: {failed[0][1]}{more}")


@dataclass
class ActiveRequest:
    """A request from its arrival to its end."""

    index: int
    params: SamplingParams
    seed: int
    end_ids: frozenset[int]
    """Tokens that end it: end-of-sequence unless ignored, and its own stop ids."""
    max_length: int
    output: RequestOutput
    text: IncrementalText | None
    num_prefilled: int = 0
    prompt_states: list[Tensor] = field(default_factory=list)
    """Captured states of the prefilled part of the prompt, [T, D] each; empty when no proposer reads states."""
    sample_index: int = 0
    adjustments: tuple[Adjustment, ...] = ()
    """What it adds to scores."""
    drafter: int | None = 0
    """Which of the engine's methods drafts for it; None: none does."""

    @property
    def prompt(self) -> list[int]:
        return self.output.prompt_token_ids

    @property
    def length(self) -> int:
        return len(self.output.prompt_token_ids) + len(self.output.token_ids)

    @property
    def last_token_id(self) -> int:
        return self.output.token_ids[-1]

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == len(self.prompt)

    def states_of_prompt(self) -> Tensor:
        """[prompt + 1, D] aligned like `interfaces.Committed`: column 0 has no state, column i has that of i - 1."""
        states_TD = torch.cat(self.prompt_states)
        self.prompt_states = [states_TD]  # kept until the row is free: other prompts may begin alike
        return torch.cat([torch.zeros_like(states_TD[:1]), states_TD])

    def add_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        """Of the tokens after those prefilled so far; called chunk by chunk."""
        if self.output.prompt_logprobs is None:
            self.output.prompt_logprobs = [None]
        self.output.prompt_logprobs += logprobs

    def copy_prefix(self, donor: ActiveRequest, num_tokens: int) -> None:
        """The first tokens of the prompt are the donor's: so are their states, where a proposer reads them."""
        self.num_prefilled = num_tokens
        if donor.prompt_states:
            self.prompt_states = [torch.cat(donor.prompt_states)[:num_tokens]]

    def append(
        self,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        error: str | None = None,
        drafted: Drafted = NOTHING_DRAFTED,
    ) -> StreamEvent:
        """Append an accepted run, cut after the first token that ends the request; an error ends it after the run."""
        num_appended = 0
        finish_reason: FinishReason | None = None
        for token_id in token_ids:
            self.output.token_ids.append(token_id)
            num_appended += 1
            finish_reason = self._ends_with(token_id)
            if finish_reason is not None:
                break
        self.output.stats.num_tokens += num_appended
        if finish_reason is None and error is not None:
            finish_reason, self.output.error = "error", error
            self.output.stats.num_non_finite += 1
        if logprobs is not None and self.output.logprobs is not None:
            self.output.logprobs += logprobs[:num_appended]
        if finish_reason is not None:
            self.finish(finish_reason)
        text = self.text.take(is_final=finish_reason is not None) if self.text is not None else ""
        return StreamEvent(
            self.index,
            token_ids[:num_appended],
            text,
            finish_reason,
            logprobs[:num_appended] if logprobs is not None else None,
            self.output.error,
            self.sample_index,
            self.output.prompt_logprobs if len(self.output.token_ids) == num_appended else None,
            drafted,
        )

    def _ends_with(self, token_id: int) -> FinishReason | None:
        is_end = token_id in self.end_ids and len(self.output.token_ids) > self.params.min_tokens
        has_text = not is_end or self.params.include_stop_str_in_output
        # the string first: a token may complete it and be the last one allowed
        if self.text is not None and has_text and self.text.add(token_id):
            self.output.stop_reason = self.text.found_stop
            return "stop"
        if is_end:
            self.output.stop_reason = token_id if token_id in self.params.stop_token_ids else None
            return "stop"
        if len(self.output.token_ids) >= self.params.max_tokens or self.length >= self.max_length:
            return "length"
        return None

    def finish(self, reason: FinishReason) -> None:
        if self.text is not None:
            self.text.finish()
            self.output.text = self.text.text
        self.output.finish_reason = reason

    def cancel(self) -> StreamEvent:
        """End the request here, with the text that was held back as a possible stop string."""
        self.finish("cancelled")
        text = self.text.take(is_final=True) if self.text is not None else ""
        return StreamEvent(self.index, [], text, "cancelled", sample_index=self.sample_index)

    def is_one_of(self, cancelled: Collection[tuple[int, int | None]]) -> bool:
        """Whether it is among (prompt, sample) pairs; no sample: all of the prompt's."""
        return (self.index, None) in cancelled or (self.index, self.sample_index) in cancelled
