"""From measurements to the rows of the house table: acceptance, speed and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np

from speculators.decoding.stats import DecodeStats
from speculators.evaluation.losslessness import count_identical
from speculators.evaluation.records import Measurement, MethodRow
from speculators.evaluation.statistics import Estimate, bootstrap


def summarise(
    method: str,
    plain: Sequence[Measurement],
    speculative: Sequence[Measurement],
    *,
    num_speculative_tokens: int | None,
    temperature: float,
    sampling_p_value: float | None = None,
) -> MethodRow:
    """The row of one method, beside plain decoding of the same groups of prompts. K not given: the longest draft."""
    stats = reduce(add, (m.stats for m in speculative))
    time_s = sum(m.time_s for m in speculative)
    num_tokens = sum(m.num_tokens for m in speculative)
    length = acceptance_length(speculative)
    speedup = measured_speedup(plain, speculative)
    plain_ids = [ids for m in plain for ids in m.token_ids]
    ids = [ids for m in speculative for ids in m.token_ids]
    if num_speculative_tokens is None:
        num_speculative_tokens = len(stats.drafted_per_position)
    return MethodRow(
        method=method,
        num_speculative_tokens=num_speculative_tokens,
        temperature=temperature,
        num_prompts=len(ids),
        num_tokens=num_tokens,
        acceptance_length=length,
        acceptance_rate=stats.acceptance_rate,
        conditional_acceptance=tuple(stats.conditional_rates),
        tokens_per_s=num_tokens / time_s,
        plain_tokens_per_s=sum(m.num_tokens for m in plain) / sum(m.time_s for m in plain),
        speedup=speedup,
        speedup_per_token=speedup.value / length.value,
        num_identical=count_identical(plain_ids, ids) if temperature == 0 else None,
        draft_share=stats.draft_s / time_s,
        **costs(reduce(add, (m.stats for m in plain)), stats),
        sampling_p_value=sampling_p_value,
        warnings=doubts(speedup, length),
    )


def costs(plain: DecodeStats, speculative: DecodeStats) -> dict[str, float | None]:
    """Drafting, and the rest of a round, in units of a plain step. Prefill is in neither."""
    plain_s = plain.draft_s + plain.verify_s + plain.overhead_s
    if not plain_s:  # every answer was one token
        return {"draft_cost": None, "verify_cost": None}
    units = plain_s / plain.num_rounds * max(speculative.num_rounds, 1)
    return {
        "draft_cost": speculative.draft_s / units,
        "verify_cost": (speculative.verify_s + speculative.overhead_s) / units,
    }


def acceptance_length(measurements: Sequence[Measurement]) -> Estimate:
    """1 + accepted / rounds, over all rounds of all prompts."""
    return bootstrap(
        {
            "accepted": [m.stats.num_accepted for m in measurements],
            "rounds": [m.stats.num_rounds for m in measurements],
        },
        lambda sums: 1 + sums["accepted"] / np.maximum(sums["rounds"], 1),
    )


def measured_speedup(plain: Sequence[Measurement], speculative: Sequence[Measurement]) -> Estimate:
    """Ratio of tokens per second, prefill included: what someone waiting for the answer sees."""
    return bootstrap(
        {
            "plain_s": [m.time_s for m in plain],
            "plain_tokens": [m.num_tokens for m in plain],
            "s": [m.time_s for m in speculative],
            "tokens": [m.num_tokens for m in speculative],
        },
        lambda sums: (sums["tokens"] / sums["s"]) / (sums["plain_tokens"] / sums["plain_s"]),
    )


def doubts(speedup: Estimate, length: Estimate) -> tuple[str, ...]:
    """A round costs at least one verifier step, so no method can gain more than the tokens it emits a round."""
    if speedup.low > length.high:
        return (
            f"speedup {speedup.value:.2f} exceeds the acceptance length {length.value:.2f}: this cannot be true, "
            "the plain baseline was slowed down by something else; measure again on an idle machine",
        )
    return ()
