"""Paired timing: plain decoding and every method on the same prompts, in one process, interleaved.

A machine's speed drifts within seconds, so a method is never timed in a block of its own: for each group of prompts all
methods run one after another, in an order that rotates from group to group. What is compared is always a neighbour.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from speculators.decoding.request import RequestOutput
from speculators.evaluation.records import Measurement

Generate = Callable[[Sequence[Sequence[int]]], Sequence[RequestOutput]]
"""Decodes a group of prompts (token ids) to the end."""


def measure_interleaved(
    methods: Mapping[str, Generate],
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    num_warmup: int = 1,
    num_repeats: int = 1,
    on_group: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Measurement]]:
    """Measurements of each method, one a group of `group_size` prompts, in the order of the prompts.

    num_warmup: groups decoded by every method before the clock counts. num_repeats: each group is timed so many times
    and its fastest time is kept, because noise only ever adds. on_group: called with the number of prompts done.
    """
    groups = [list(prompts[i : i + group_size]) for i in range(0, len(prompts), group_size)]
    if not groups:
        raise ValueError("no prompts to measure on; the data set is empty or everything in it was filtered out")
    for group in groups[:num_warmup]:
        for generate in methods.values():
            generate(group)
    measurements: dict[str, list[Measurement]] = {name: [] for name in methods}
    for index, group in enumerate(groups):
        fastest: dict[str, Measurement] = {}
        for repeat in range(num_repeats):
            for name in rotated(list(methods), index + repeat):
                timed = measure(methods[name], group, clock)
                if name not in fastest or timed.time_s < fastest[name].time_s:
                    fastest[name] = timed
        for name, measurement in fastest.items():
            measurements[name].append(measurement)
        if on_group is not None:
            on_group(len(group))
    return measurements


def measure(generate: Generate, group: Sequence[Sequence[int]], clock: Callable[[], float]) -> Measurement:
    start_s = clock()
    outputs = generate(group)
    time_s = clock() - start_s
    stats = outputs[0].stats
    for output in outputs[1:]:
        stats = stats + output.stats
    return Measurement(tuple(tuple(output.token_ids) for output in outputs), time_s, stats)


def rotated(names: list[str], steps: int) -> list[str]:
    steps %= len(names)
    return names[steps:] + names[:steps]
