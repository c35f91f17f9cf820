"""Paired timing of plain decoding and every method on the same prompts, in one process, and the rows made of it.

A machine's speed drifts within seconds, so a method is never timed in a block of its own: for each group of prompts all
methods run one after another, in an order that rotates from group to group. Only neighbours in time are compared.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.request import RequestOutput
from speculators.decoding.request_builder import usable_length
from speculators.decoding.stats import DecodeStats
from speculators.evaluation.records import GroupFigures, MethodRow, speedup_warnings
from speculators.evaluation.statistics import Estimate, bootstrap, count_identical
from speculators.model import SpeculatorModel

Generate = Callable[[Sequence[Sequence[int]]], Sequence[RequestOutput]]
"""Decodes a group of prompts (token ids) to the end."""


class MeasuringStoppedError(KeyboardInterrupt):
    """Ctrl-C after some groups of prompts: their measurements are kept."""

    def __init__(self, measurements: dict[str, list[Measurement]]) -> None:
        super().__init__("stopped")
        self.measurements = measurements


@dataclass(frozen=True)
class Group:
    """Prompts (token ids) that are decoded together."""

    prompts: Sequence[Sequence[int]]
    task: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One method on one group of prompts (a single prompt unless batches are asked for)."""

    token_ids: tuple[tuple[int, ...], ...]
    """Generated tokens, one tuple per prompt."""
    time_s: float
    stats: DecodeStats

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)


def decode_greedily(
    model: SpeculatorModel,
    verifier: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_drafts: int,
    max_tokens: int,
    batch_size: int = 8,
) -> DecodeStats:
    """Decodes prompts with a drafter as it is now and adds up the rounds. Prompts that leave no room for `max_tokens`
    in the verifier's positions lose their beginning."""
    if not prompts:
        return DecodeStats()
    max_length = usable_length(verifier, max(map(len, prompts)) + max_tokens)
    cut_prompts = [list(prompt)[-max(max_length - max_tokens, 1) :] for prompt in prompts]
    sizes = {"max_batch_size": min(batch_size, len(prompts)), "max_length": max_length}
    proposer = model.make_proposer(verifier, **sizes)
    engine = Engine(verifier, proposer, num_speculative_tokens=num_drafts, **sizes)
    outputs = engine.generate(cut_prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
    return reduce(add, (output.stats for output in outputs))


def groups_of(prompts: Sequence[Sequence[int]], size: int, task: str | None = None) -> list[Group]:
    """Prompts of one task that are decoded together, in their order."""
    return [Group(prompts[start : start + size], task) for start in range(0, len(prompts), size)]


def measure_interleaved(
    methods: Mapping[str, Generate], prompts: Sequence[Sequence[int]], *, group_size: int = 1, **options: Any
) -> dict[str, list[Measurement]]:
    """`measure_groups` of `group_size` prompts each; `options` are its own."""
    return measure_groups(methods, groups_of(prompts, group_size), **options)


def measure_groups(
    methods: Mapping[str, Generate],
    groups: Sequence[Group],
    *,
    num_warmup: int = 1,
    num_repeats: int = 1,
    on_group: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Measurement]]:
    """Measurements of each method, one per group of prompts, in the order of the groups.

    num_warmup: groups decoded by every method before the clock counts. num_repeats: each group is timed so many times
    and its fastest time is kept, because noise only ever adds. on_group: called with the number of prompts done.
    Raises `MeasuringStoppedError` on Ctrl-C after the first group.
    """
    if not groups:
        raise ValueError("no prompts to measure on; the data set is empty or everything in it was filtered out")
    for group in groups[:num_warmup]:
        for generate in methods.values():
            generate(group.prompts)
    measurements: dict[str, list[Measurement]] = {name: [] for name in methods}
    for index, group in enumerate(groups):
        try:
            fastest = measure_group(methods, group.prompts, index, num_repeats, clock)
        except KeyboardInterrupt:
            if index == 0:
                raise
            raise MeasuringStoppedError(measurements) from None
        for name, measurement in fastest.items():
            measurements[name].append(measurement)
        if on_group is not None:
            on_group(len(group.prompts))
    return measurements


def measure_group(
    methods: Mapping[str, Generate],
    group: Sequence[Sequence[int]],
    index: int,
    num_repeats: int,
    clock: Callable[[], float],
) -> dict[str, Measurement]:
    """The fastest of `num_repeats` measurements of each method."""
    fastest: dict[str, Measurement] = {}
    for repeat in range(num_repeats):
        for name in rotated(list(methods), index + repeat):
            timed = measure(methods[name], group, clock)
            if name not in fastest or timed.time_s < fastest[name].time_s:
                fastest[name] = timed
    return fastest


def measure(generate: Generate, group: Sequence[Sequence[int]], clock: Callable[[], float]) -> Measurement:
    start_s = clock()
    outputs = generate(group)
    time_s = clock() - start_s
    stats = outputs[0].stats
    for output in outputs[1:]:
        stats = stats + output.stats
    return Measurement(tuple(tuple(output.token_ids) for output in outputs), time_s, stats)


def seeded_by_prompt(sampling: SamplingParams, prompt: Sequence[int]) -> SamplingParams:
    """Prompts of one seed would draw alike, and the bootstrap takes them for independent."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=sampling.seed + zlib.crc32(" ".join(map(str, prompt)).encode()))


def rotated(names: list[str], steps: int) -> list[str]:
    steps %= len(names)
    return names[steps:] + names[:steps]


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
    draft_cost, verify_cost = costs(reduce(add, (m.stats for m in plain)), stats)
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
        draft_cost=draft_cost,
        verify_cost=verify_cost,
        sampling_p_value=sampling_p_value,
        warnings=speedup_warnings(speedup, length, max(len(m.token_ids) for m in speculative)),
        time_shares=time_shares(stats, time_s),
    )


def time_shares(stats: DecodeStats, time_s: float) -> dict[str, float]:
    """Where the time went; what is missing to 1 passed outside of the engine."""
    spent = {"prefill": stats.prefill_s, "draft": stats.draft_s, "verify": stats.verify_s, "overhead": stats.overhead_s}
    return {name: seconds / time_s for name, seconds in spent.items()}


def figures_of(
    groups: Sequence[Group], measurements: Sequence[Measurement], names: Mapping[tuple[int, ...], str]
) -> tuple[GroupFigures, ...]:
    """What results keep of each group. `names`: prompt -> its hash."""
    return tuple(
        GroupFigures(
            prompts=tuple(names[tuple(prompt)] for prompt in group.prompts),
            task=group.task,
            num_tokens=measured.num_tokens,
            num_rounds=measured.stats.num_rounds,
            num_accepted=measured.stats.num_accepted,
            time_s=measured.time_s,
        )
        for group, measured in zip(groups, measurements, strict=False)
    )


def costs(plain: DecodeStats, speculative: DecodeStats) -> tuple[float | None, float | None]:
    """Time of drafting and of the rest of a round, in plain decoding steps. Prefill counts for neither."""
    plain_s = plain.draft_s + plain.verify_s + plain.overhead_s
    if not plain_s:  # every answer was one token
        return None, None
    units = plain_s / plain.num_rounds * max(speculative.num_rounds, 1)
    return speculative.draft_s / units, (speculative.verify_s + speculative.overhead_s) / units


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
