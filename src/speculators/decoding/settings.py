"""Defines what a user sets of decoding: how a request is sampled, dtype and device. Every default is here, once.

Imports nothing heavy: the help of the commands reads it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from speculators.utils.names import refusing_unknown

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_DTYPE = "float32"
"""Greedy answers are exactly the verifier's own in float32 only: lower precisions have ties."""
DEFAULT_DEVICE = "auto"
"""The first CUDA device, else the CPU."""


GREEDY_BELOW = 1e-5
"""Temperatures below this decode greedily: scores divided by less would leave the range of floats."""
YES_OR_NO = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
SERVED_BIAS = 100
"""vLLM's server, as OpenAI's, takes no stronger ones."""


@refusing_unknown
@dataclass(frozen=True)
class SamplingParams:
    """Says how one request is sampled and when it ends. Names and meanings are vLLM's."""

    max_tokens: int = 128
    min_tokens: int = 0
    """Tokens before the end of sequence, a stop token or a stop string may end the request; end-of-sequence tokens
    cannot be drawn before, `ignore_eos` or not."""
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
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id -> what is added to its logit, before penalties."""
    bad_words: tuple[str, ...] = ()
    """Words that are not generated: the last token of a word is not drawn where the output ends with those before it.
    A word is tokenised as it is, and after a space where that gives as many tokens."""
    seed: int | None = None
    """Same seed, same output, whatever else is in the batch (with drafts drawn at random: for the same batch)."""
    n: int = 1
    """Samples of the prompt, each from a seed of its own: sample i has seed + i."""
    stop: tuple[str, ...] = ()
    """Strings that end the request; not part of the text unless `include_stop_str_in_output`."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request; part of `token_ids`, and of the text as stop strings are."""
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    """The text keeps the stop string, or the text of the token, that ended it."""
    skip_special_tokens: bool = True
    """Special tokens have no text. False: stop strings may be found in them."""
    logprobs: int | None = None
    """How many of the most likely tokens to report at each position, -1 = all; None = no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    num_speculative_tokens: int | None = None
    """Most tokens drafted for it per round, up to the engine's own number; 0 = plain decoding, None = as the engine
    drafts; of a draft tree, its depth. The text is the same for any number (with drafts drawn at random: its law)."""
    method: str | None = None
    """Which of the engine's methods drafts for it; "none" = plain decoding, None = the engine's first."""

    def __post_init__(self) -> None:
        for name, one in (
            ("stop", str),
            ("bad_words", str),
            ("stop_token_ids", int),
        ):  # one may be given without a list
            value: Any = getattr(self, name)
            if value is not None and not hasattr(value, "__iter__") and not isinstance(value, one):
                raise ValueError(f"{name}={value!r} must be a list")
            object.__setattr__(self, name, (value,) if isinstance(value, one) else tuple(value or ()))
        object.__setattr__(self, "logit_bias", biases_of(self.logit_bias))
        for name, is_valid, rule in (
            ("n", is_count(self.n, 1), "an integer, at least 1"),
            ("max_tokens", is_count(self.max_tokens, 1), "an integer, at least 1"),
            ("min_tokens", is_count(self.min_tokens, 0), "an integer, 0 or more"),
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
            ("logprobs", *_rule_of_logprobs(self.logprobs)),
            ("prompt_logprobs", *_rule_of_logprobs(self.prompt_logprobs)),
            ("seed", self.seed is None or is_int64(self.seed), "an integer of 64 bits, or None"),
            (
                "num_speculative_tokens",
                self.num_speculative_tokens is None or is_count(self.num_speculative_tokens, 0),
                "an integer, 0 (plain decoding) or more, or None for the engine's own",
            ),
            ("method", self.method is None or isinstance(self.method, str), "the name of a method, or None"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "made of non-empty strings"),
            ("bad_words", all(isinstance(s, str) and s.strip() for s in self.bad_words), "made of words"),
            ("stop_token_ids", all(is_count(i, 0) for i in self.stop_token_ids), "made of token ids"),
            *((name, isinstance(getattr(self, name), bool), "True or False") for name in YES_OR_NO),
        ):
            if not is_valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n={self.n} at temperature {self.temperature:g} gives equal samples; set a temperature, or n=1"
            )
        if self.seed is not None and not is_int64(self.seed + self.n - 1):
            raise ValueError(f"seed={self.seed} with n={self.n}: sample i has seed + i, an integer of 64 bits")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def biases_of(given: object) -> dict[int, float] | None:
    """The logit biases with integer ids: JSON has strings for keys. Raises ValueError for what is no bias."""
    if given is None:
        return None
    rule = f"logit_bias={given!r} must map token ids to numbers"
    if not isinstance(given, Mapping):
        raise ValueError(rule)
    try:
        biases = {int(token_id): float(bias) for token_id, bias in given.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(rule) from error
    if not all(token_id >= 0 and math.isfinite(bias) for token_id, bias in biases.items()):
        raise ValueError(f"{rule} that are finite (-100 bans a token in practice); ids are 0 or more")
    return biases


def refuse_biases_of_servers(params: SamplingParams) -> None:
    """Raises ValueError for biases that a server would move into its range without a word."""
    outside = {i: bias for i, bias in (params.logit_bias or {}).items() if abs(bias) > SERVED_BIAS}
    if outside:
        raise ValueError(f"logit_bias={outside}: a server moves biases into [-{SERVED_BIAS}, {SERVED_BIAS}]")


def _rule_of_logprobs(value: object) -> tuple[bool, str]:
    return value is None or is_count(value, -1), "an integer, 0 or more, -1 for all tokens, or None"


def refuse_fewer(config: object, **least: int) -> None:
    """Raises ValueError for the first field of `config` that is neither None nor an integer of at least so many."""
    for name, number in least.items():
        value = getattr(config, name)
        if value is not None and not is_count(value, number):
            raise ValueError(f"{name}={value!r} must be an integer, at least {number}")


def refuse_unknown_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; use {', '.join(DTYPES)}")


def is_count(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def is_in(value: object, least: float, most: float) -> bool:
    return isinstance(value, Real) and least <= float(value) <= most


def is_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63
