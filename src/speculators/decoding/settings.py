"""Defines what a user sets of decoding: how a request is sampled, dtype and device. Every default is here, once.

Imports nothing heavy: the help of the commands reads it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Integral, Real

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_DTYPE = "float32"
"""Greedy answers are exactly the verifier's own in float32 only: lower precisions have ties."""
DEFAULT_DEVICE = "auto"
"""The first CUDA device, else the CPU."""


GREEDY_BELOW = 1e-5
"""Temperatures below this decode greedily: scores divided by less would leave the range of floats."""


@dataclass(frozen=True)
class SamplingParams:
    """Says how one request is sampled and when it ends."""

    max_tokens: int = 128
    temperature: float = 0.0
    """0 = greedy, and so is whatever is below 1e-5 (as in vLLM)."""
    top_k: int = 0
    """0 or -1 = all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one are dropped."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in the prompt or the output."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output: presence once, frequency once per occurrence."""
    seed: int | None = None
    """Same seed, same output, whatever else is in the batch (with drafts drawn at random: for the same batch)."""
    stop: tuple[str, ...] = ()
    """Strings that end the request; not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the most likely tokens to report at each position; None = no log-probabilities."""

    def __post_init__(self) -> None:
        for name, one in (("stop", str), ("stop_token_ids", int)):  # a single one may be given without a list
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, one) else tuple(value or ()))
        for name, is_valid, rule in (
            ("max_tokens", is_count(self.max_tokens, 1), "an integer, at least 1"),
            ("temperature", is_in(self.temperature, 0, sys.float_info.max), "0 (greedy) or more"),
            ("top_k", is_count(self.top_k, -1), "a positive number, or 0 for all tokens"),
            ("top_p", is_in(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("min_p", is_in(self.min_p, 0, 1), "in [0, 1]"),
            (
                "repetition_penalty",
                is_in(self.repetition_penalty, 0, sys.float_info.max) and self.repetition_penalty > 0,
                "more than 0 (1 = none)",
            ),
            ("presence_penalty", is_in(self.presence_penalty, -2, 2), "in [-2, 2]"),
            ("frequency_penalty", is_in(self.frequency_penalty, -2, 2), "in [-2, 2]"),
            ("logprobs", self.logprobs is None or is_count(self.logprobs, 0), "an integer, 0 or more, or None"),
            ("seed", self.seed is None or is_int64(self.seed), "an integer of 64 bits, or None"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "made of non-empty strings"),
            ("stop_token_ids", all(is_count(i, 0) for i in self.stop_token_ids), "made of token ids"),
        ):
            if not is_valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def is_count(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def is_in(value: object, least: float, most: float) -> bool:
    return isinstance(value, Real) and least <= float(value) <= most


def is_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63
