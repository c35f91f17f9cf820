"""From what a caller gives (texts or token ids, sampling parameters) to requests, with every mistake named."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from speculators.decoding.request import RequestOutput
from speculators.decoding.rows import ActiveRequest
from speculators.decoding.sampling import SamplingParams
from speculators.decoding.text import IncrementalText

Prompts = Sequence[str | Sequence[int]]
Samplings = SamplingParams | Sequence[SamplingParams] | None


DEFAULT_MAX_LENGTH = 4096
"""Prompt plus output of one request when neither the caller nor the model says less; memory grows only when used."""


class Intake:
    """Checks prompts against the verifier and makes requests of them."""

    def __init__(
        self,
        tokenizer: Any,
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
                f"{len(prompts)} prompts but {len(sampling)} sampling parameters; give one or one a prompt"
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
            what = "a prompt is text" if isinstance(prompt, str) else "stop strings were given"
            raise ValueError(f"{what} but the engine has no tokenizer; pass Engine(..., tokenizer=...)")
        token_ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else [int(i) for i in prompt]
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


def end_of_sequence_ids(verifier: Any, tokenizer: Any) -> frozenset[int]:
    """The generation config's ids, or else the config's, and the tokenizer's own."""
    found: list[Any] = [getattr(tokenizer, "eos_token_id", None)]
    for config in (getattr(verifier, "generation_config", None), getattr(verifier, "config", None)):
        found.append(getattr(config, "eos_token_id", None))
        if found[-1] is not None:
            break
    flat = [i for entry in found for i in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return frozenset(i for i in flat if i is not None)


def refuse_below_one(**sizes: int) -> None:
    """A batch without rows or a chunk without tokens would never end."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def usable_length(verifier: Any, max_length: int | None) -> int:
    """Prompt plus output, at most: the caller's wish, within what the model's positions allow."""
    wish = max_length if max_length is not None else DEFAULT_MAX_LENGTH
    if not isinstance(verifier, torch.nn.Module):
        return wish
    config: Any = verifier.config
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(wish, most) if most is not None else wish
