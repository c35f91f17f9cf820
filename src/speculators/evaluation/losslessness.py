"""Is the output still the verifier's? Greedy: token for token.

Greedy equality is a claim about fp32: in bf16 two tokens may tie, and scoring K + 1 positions at once rounds
differently from scoring one.
"""

from __future__ import annotations

from collections.abc import Sequence

from speculators.evaluation.records import MethodRow


def count_identical(plain: Sequence[Sequence[int]], speculative: Sequence[Sequence[int]]) -> int:
    return sum(first_difference(a, b) is None for a, b in zip(plain, speculative, strict=True))


def first_difference(plain: Sequence[int], speculative: Sequence[int]) -> int | None:
    """Position of the first token that differs (a missing token differs); None when the sequences are equal."""
    for position, (a, b) in enumerate(zip(plain, speculative, strict=False)):
        if a != b:
            return position
    return None if len(plain) == len(speculative) else min(len(plain), len(speculative))


class NotLosslessError(RuntimeError):
    """Greedy answers differ from plain decoding's."""

    def __init__(self, rows: Sequence[MethodRow], dtype: str) -> None:
        wrong = [row for row in rows if row.num_identical is not None and row.num_identical < row.num_prompts]
        counts = ", ".join(f"{row.method} {row.num_identical}/{row.num_prompts}" for row in wrong)
        reason = "" if dtype == "float32" else f"; {dtype} has ties that rounding decides, --dtype float32 has none"
        super().__init__(f"not lossless, identical answers: {counts}{reason}")
