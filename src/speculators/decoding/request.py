"""What goes into a decode run and what comes out of it, one record a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from speculators.decoding.stats import DecodeStats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one emitted position, before temperature and penalties."""

    logprob: float
    """Of the emitted token."""
    top: dict[int, float]
    """Of the most likely tokens, as many as were asked for."""


@dataclass(frozen=True)
class StreamEvent:
    """Tokens a request gained in one round."""

    request_index: int
    """Position of the request among the prompts."""
    token_ids: list[int]
    text: str
    """What became readable; tokens that end inside a character, and text that may begin a stop string, show up later.
    The texts of a request's events make up its output's. Empty without a tokenizer."""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None


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
