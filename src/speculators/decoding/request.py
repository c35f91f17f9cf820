"""Requests: what callers give, the checks it must pass, the state of a running request, and what comes out of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.settings import SamplingParams
from speculators.decoding.stats import DecodeStats
from speculators.decoding.text import IncrementalText
from speculators.interfaces import Verifier
from speculators.utils.report import WorkFailedError
from speculators.verifier.config import text_config

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""error: the verifier's scores were not finite; `error` says where. Whatever came before is the verifier's own text."""
Prompts = Sequence[str | Sequence[int]]
"""Texts or token ids."""
Samplings = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, or one per prompt; None: `SamplingParams()`."""
DEFAULT_MAX_LENGTH = 4096
"""Prompt plus output of one request when neither the caller nor the model says less; memory grows only when used."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one emitted position, before temperature and penalties."""

    logprob: float
    """Of the emitted token."""
    top: dict[int, float]
    """Of the most likely tokens, as many as were asked for."""


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


@dataclass
class RequestOutput:
    """A finished request."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, the end-of-sequence token included."""
    text: str = ""
    """Without special tokens, cut before a stop string."""
    finish_reason: FinishReason | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    """Why it ended with the reason "error"."""


class NonFiniteScoresError(WorkFailedError):
    """The verifier's scores were NaN or infinite: it has no text to give, and nothing can be measured with it."""


def raise_for_failed(outputs: Sequence[RequestOutput], what: str = "prompt") -> None:
    """Raises `NonFiniteScoresError` with the first error, and how many requests ended so."""
    failed = [number for number, output in enumerate(outputs) if output.error is not None]
    if failed:
        more = f" ({len(failed)} of {len(outputs)} requests ended so)" if len(failed) > 1 else ""
        raise NonFiniteScoresError(f"{what} {failed[0]}: {outputs[failed[0]].error}{more}")


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

    def copy_prefix(self, donor: ActiveRequest, num_tokens: int) -> None:
        """The first tokens of the prompt are the donor's: so are their states, where a proposer reads them."""
        self.num_prefilled = num_tokens
        if donor.prompt_states:
            self.prompt_states = [torch.cat(donor.prompt_states)[:num_tokens]]

    def append(
        self, token_ids: list[int], logprobs: list[TokenLogprobs] | None, error: str | None = None
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
        kept_logprobs = logprobs[:num_appended] if logprobs is not None else None
        return StreamEvent(self.index, token_ids[:num_appended], text, finish_reason, kept_logprobs, self.output.error)

    def _ends_with(self, token_id: int) -> FinishReason | None:
        # the string first: a token may complete it and be the last one allowed
        if self.text is not None and self.text.add(token_id):
            return "stop"
        if token_id in self.end_ids:
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
        return StreamEvent(self.index, [], self.text.take(is_final=True) if self.text is not None else "", "cancelled")


class RequestBuilder:
    """Checks prompts and sampling parameters against the verifier and makes requests of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        eos_ids: frozenset[int],
        vocab_size: int,
        max_length: int,
        seed: int,
        *,
        greedy_only: bool = False,
    ):
        self.tokenizer = tokenizer
        self.greedy_only = greedy_only
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._random = random.Random(seed)  # seeds of requests that bring none

    def requests(self, prompts: Prompts, sampling: Samplings) -> list[ActiveRequest]:
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; give a list of prompts")
        if any(is_chat(prompt) for prompt in prompts):
            raise ValueError("a prompt is a chat message; engine.chat(messages) applies the chat template to messages")
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts but {len(sampling)} sampling parameters; give one for all, or one per prompt"
            )
        return [self.request(i, p, params) for i, (p, params) in enumerate(zip(prompts, sampling, strict=True))]

    def request(self, index: int, prompt: str | Sequence[int], params: SamplingParams) -> ActiveRequest:
        token_ids = self._token_ids(index, prompt, params)
        if self.greedy_only and params.temperature > 0:
            raise ValueError(
                f"temperature={params.temperature} but the acceptance rule decodes greedily, whatever the temperature; "
                "use temperature=0, or leave out verifier_accept_k and accept_tolerance (or the rule)"
            )
        if (params.logprobs or 0) > self.vocab_size:
            raise ValueError(f"logprobs={params.logprobs} exceeds the verifier's vocabulary of {self.vocab_size}")
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        output = RequestOutput(token_ids, logprobs=[] if params.logprobs is not None else None)
        text = IncrementalText(self.tokenizer, params.stop) if self.tokenizer is not None else None
        return ActiveRequest(index, params, seed, end_ids, self.max_length, output, text)

    def _token_ids(self, index: int, prompt: str | Sequence[int], params: SamplingParams) -> list[int]:
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            given = "a prompt is text" if isinstance(prompt, str) else "stop strings were given"
            raise ValueError(f"{given} but the engine has no tokenizer; pass Engine(..., tokenizer=...)")
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            token_ids: list[int] = self.tokenizer(prompt).input_ids
        else:
            token_ids = [int(i) for i in prompt]
        if not 1 <= len(token_ids) < self.max_length:
            raise ValueError(
                f"prompt {index} has {len(token_ids)} tokens; between 1 and max_length - 1 = {self.max_length - 1} fit "
                "(max_length is set on the engine, up to the verifier's max_position_embeddings)"
            )
        outside = next((i for i in token_ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise ValueError(
                f"prompt {index} has token id {outside}, outside the verifier's vocabulary of {self.vocab_size}; is it "
                "another model's tokenizer?"
            )
        return token_ids


def is_chat(prompt: object) -> bool:
    """A message, or a list of messages."""
    return isinstance(prompt, Mapping) or (isinstance(prompt, list) and any(isinstance(m, Mapping) for m in prompt))


def end_of_sequence_ids(
    verifier: PreTrainedModel | Verifier, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Ids of the generation config (or else of the config), and the tokenizer's own."""
    found: list[Any] = [getattr(tokenizer, "eos_token_id", None)]
    for config in (getattr(verifier, "generation_config", None), getattr(verifier, "config", None)):
        found.append(getattr(config, "eos_token_id", None))
        if found[-1] is not None:
            break
    flat = [i for entry in found for i in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return frozenset(i for i in flat if i is not None)


def refuse_below_one(**sizes: int) -> None:
    """Raise ValueError for a size below 1: a batch without rows or a chunk without tokens would never end."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def usable_length(verifier: PreTrainedModel | Verifier, max_length: int | None) -> int:
    """The longest prompt plus output in tokens: what the caller wants, within the model's positions."""
    wanted = max_length if max_length is not None else DEFAULT_MAX_LENGTH
    if not isinstance(verifier, torch.nn.Module):
        return wanted
    config: Any = verifier.config
    most = getattr(text_config(config), "max_position_embeddings", None)
    return min(wanted, most) if most is not None else wanted
