"""Checks prompts and sampling parameters against the verifier and makes requests of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.adjustments import adjustments_of
from speculators.decoding.drafters import Drafters
from speculators.decoding.request import ActiveRequest, Prompts, RequestOutput, Samplings
from speculators.decoding.settings import SamplingParams
from speculators.decoding.text import IncrementalText
from speculators.interfaces import Verifier
from speculators.verifier.config import text_config

DEFAULT_MAX_LENGTH = 4096
"""Prompt plus output of one request when neither the caller nor the model says less; memory grows only when used."""


class RequestBuilder:
    """Makes requests for one engine."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        eos_ids: frozenset[int],
        vocab_size: int,
        max_length: int,
        seed: int,
        drafters: Drafters,
    ):
        self.tokenizer = tokenizer
        self.drafters = drafters
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
        samples = [self.samples(i, p, params) for i, (p, params) in enumerate(zip(prompts, sampling, strict=True))]
        return [request for requests in samples for request in requests]

    def samples(self, index: int, prompt: str | Sequence[int], params: SamplingParams) -> list[ActiveRequest]:
        """`n` requests; the output of the first holds the others'. Sample i has the seed `seed + i`."""
        first = self.request(index, prompt, params)
        others = [
            self.request(
                index,
                first.prompt,
                replace(params, n=1, seed=params.seed + i if params.seed is not None else None, prompt_logprobs=None),
                sample_index=i,
            )
            for i in range(1, params.n)
        ]
        first.output.other_samples = [other.output for other in others]
        return [first, *others]

    def request(
        self, index: int, prompt: str | Sequence[int], params: SamplingParams, sample_index: int = 0
    ) -> ActiveRequest:
        token_ids = self._token_ids(index, prompt, params)
        if self.drafters.rule.reads_logits and params.temperature > 0:
            raise ValueError(
                f"temperature={params.temperature} but the acceptance rule decodes greedily, whatever the temperature; "
                "use temperature=0, or leave out verifier_accept_k and accept_tolerance (or the rule)"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                value = getattr(params, name)
                raise ValueError(f"{name}={value} exceeds the verifier's vocabulary of {self.vocab_size}")
        drafter = self.drafters.index_of(params)
        stop_ids = frozenset(params.stop_token_ids)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        return ActiveRequest(
            index,
            params,
            seed,
            stop_ids if params.ignore_eos else stop_ids | self.eos_ids,
            self.max_length,
            RequestOutput(token_ids, logprobs=[] if params.logprobs is not None else None),
            IncrementalText(self.tokenizer, params) if self.tokenizer is not None else None,
            sample_index=sample_index,
            adjustments=adjustments_of(params, stop_ids | self.eos_ids, self.tokenizer, self.vocab_size),
            drafter=drafter,
        )

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
