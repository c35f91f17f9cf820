"""Numbers of draft tokens that depend on the batch, and synthetic acceptance rates: validated lists."""

from __future__ import annotations

import itertools

BatchSizeRange = tuple[int, int, int]
"""(first batch size, last batch size, K), both inclusive."""


def check_batch_size_ranges(ranges: list[BatchSizeRange]) -> None:
    name = "num_speculative_tokens_per_batch_size"
    if not ranges:
        raise ValueError(f"{name} must not be empty; leave it out for a fixed number of tokens")
    ordered = sorted(ranges)
    for first, last, num_tokens in ordered:
        if first < 1 or last < first:
            raise ValueError(f"{name} range ({first}, {last}) must satisfy 1 <= start <= end")
        if num_tokens < 0:
            raise ValueError(f"{name} range ({first}, {last}) has K={num_tokens}; K must be >= 0")
    if ordered[0][0] != 1:
        raise ValueError(f"{name} must start at batch size 1, not {ordered[0][0]}")
    for before, after in itertools.pairwise(ordered):
        if after[0] <= before[1]:
            raise ValueError(f"{name} ranges {before[:2]} and {after[:2]} overlap")


def scheduled_num_tokens(ranges: list[BatchSizeRange], batch_size: int, most: int) -> int:
    """K of the last range that starts at or before the batch size (gaps carry the previous K), at most `most`."""
    started = [num_tokens for first, _, num_tokens in sorted(ranges) if first <= batch_size]
    return min(started[-1], most) if started else most


def synthetic_rates(num_tokens: int, rates: list[float] | None, length: float | None) -> list[float]:
    """Unconditional rates per position, from rates or a mean acceptance length."""
    if (rates is None) == (length is None):
        raise ValueError(
            "rejection_sample_method='synthetic' requires exactly one of synthetic_acceptance_rates or "
            "synthetic_acceptance_length."
        )
    if rates is None:
        assert length is not None
        if not 1 <= length <= num_tokens + 1:
            raise ValueError(f"synthetic_acceptance_length must be in [1, {num_tokens + 1}], got {length}.")
        return rates_of_length(length, num_tokens)
    if len(rates) != num_tokens:
        raise ValueError(f"synthetic_acceptance_rates must have length {num_tokens}, got {rates}.")
    if not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"synthetic_acceptance_rates entries must be in [0, 1], got {rates}.")
    if any(after > before for before, after in itertools.pairwise(rates)):
        raise ValueError(f"synthetic_acceptance_rates must be non-increasing, got {rates}.")
    return list(rates)


def rates_of_length(length: float, num_tokens: int) -> list[float]:
    """Least variance: whole positions always, one in part, the rest never. 1 + sum(rates) == length."""
    num_drafts = length - 1
    return [min(1.0, max(0.0, num_drafts - position)) for position in range(num_tokens)]
