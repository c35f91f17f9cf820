"""Measures one cell: methods of drafting beside plain decoding of the same prompts, all engines in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from speculators.decoding import Engine, RequestOutput, SamplingParams
from speculators.decoding.method import PLAIN, Method
from speculators.decoding.request import StreamEvent, TokenLogprobs, raise_for_failed
from speculators.decoding.target import DecodingTarget
from speculators.decoding.text import REPLACEMENT
from speculators.evaluation.config import EvaluateConfig
from speculators.evaluation.measurement import (
    Generate,
    Group,
    Measurement,
    MeasuringStoppedError,
    figures_of,
    groups_of,
    measure_groups,
    seeded_by_prompt,
    summarise,
)
from speculators.evaluation.prompts import NamedPrompts
from speculators.evaluation.records import KeptAnswer, KeptToken, MethodRow
from speculators.evaluation.statistics import two_sample_p_value
from speculators.utils.progress import HasTokens, Progress

NUM_ALTERNATIVES = 3
"""Likeliest tokens that are kept beside each token of a kept answer."""
MOST_PROMPT_LETTERS = 2000
"""Of a kept answer's prompt: its end."""


@dataclass(frozen=True)
class CellResult:
    """Rows of one cell: per method one about all prompts, then one per task."""

    rows: tuple[MethodRow, ...]
    num_done: int
    time_s: float
    is_whole: bool
    """False: Ctrl-C came after `num_done` prompts."""


def measure_cell(
    config: EvaluateConfig,
    methods: Sequence[Method],
    target: DecodingTarget,
    prompts: NamedPrompts,
    show: Progress,
    on_token: Callable[[HasTokens], None] | None,
) -> CellResult:
    """Measures every method on the same prompts; `show` is told how many are done."""
    begun_s, done = time.perf_counter(), 0
    engines = {
        method.name: Engine(
            target.model,
            method.speculative_config,
            tokenizer=target.tokenizer,
            max_batch_size=config.batch_size,
            max_length=max(map(len, prompts.all)) + config.max_tokens,
        )
        for method in methods
    }
    sampling = config.sampling()
    groups = [
        group for task, of_task in prompts.by_task.items() for group in groups_of(of_task, config.batch_size, task)
    ]

    def add(num_prompts: int) -> None:
        nonlocal done
        done += num_prompts
        show("decode", done, len(prompts.all))

    show("decode", 0, len(prompts.all))
    stopped = False
    try:
        measurements = measure_groups(
            {name: decoder(name, engine, sampling, on_token) for name, engine in engines.items()},
            groups,
            num_warmup=config.num_warmup,
            num_repeats=config.num_repeats,
            on_group=add,
        )
    except MeasuringStoppedError as stop:
        stopped, measurements = True, stop.measurements
    draws = config.check_sampling and config.temperature > 0 and not stopped
    p_values = sampling_p_values(engines, prompts.all, config) if draws else {}
    rows: list[MethodRow] = []
    for method in methods:
        whole = row_of(config, prompts, method, measurements, p_values.get(method.name))
        kept = () if stopped else kept_answers(engines[method.name], target, prompts, config)
        figures = figures_of(groups, measurements[method.name], prompts.hash_of)
        rows.append(replace(whole, groups=figures, answers=kept))
        rows += rows_of_tasks(config, prompts, method, measurements, groups)
    return CellResult(tuple(rows), done, time.perf_counter() - begun_s, not stopped)


def row_of(
    config: EvaluateConfig,
    prompts: NamedPrompts,
    method: Method,
    measurements: Mapping[str, Sequence[Measurement]],
    p_value: float | None = None,
) -> MethodRow:
    row = summarise(
        method.name,
        measurements[PLAIN],
        measurements[method.name],
        num_speculative_tokens=method.num_speculative_tokens,
        temperature=config.temperature,
        sampling_p_value=p_value,
    )
    return replace(
        row, dataset=prompts.name, batch_size=config.batch_size, speculative_config=method.speculative_config
    )


def rows_of_tasks(
    config: EvaluateConfig,
    prompts: NamedPrompts,
    method: Method,
    measurements: Mapping[str, Sequence[Measurement]],
    groups: Sequence[Group],
) -> list[MethodRow]:
    """One row per task of a set that has several, of those that were reached."""
    num_measured = len(measurements[method.name])
    rows = []
    for task in prompts.by_task if len(prompts.by_task) > 1 else ():
        places = [place for place, group in enumerate(groups[:num_measured]) if group.task == task]
        if places:
            of_task = {name: [all_of[place] for place in places] for name, all_of in measurements.items()}
            rows.append(replace(row_of(config, prompts, method, of_task), task=task))
    return rows


def sampling_p_values(
    engines: Mapping[str, Engine], prompts: Sequence[Sequence[int]], config: EvaluateConfig
) -> dict[str, float]:
    """Two-sample test of each method against plain decoding. No two answers share a seed: they must be independent."""
    seeds = count(config.seed + 1)
    num_tokens = min(config.max_tokens, config.num_sampled_tokens)
    base = replace(config.sampling(), max_tokens=num_tokens, min_tokens=min(config.min_tokens, num_tokens))

    def draw(engine: Engine) -> list[list[list[int]]]:
        sampled = []
        for prompt in prompts:
            params = [replace(base, seed=next(seeds)) for _ in range(config.num_samples)]
            outputs = engine.generate([list(prompt)] * len(params), params)
            raise_for_failed(outputs, "sampled answer")
            sampled.append([output.token_ids for output in outputs])
        return sampled

    plain = draw(engines[PLAIN])
    return {name: two_sample_p_value(plain, draw(engine)) for name, engine in engines.items() if name != PLAIN}


def decoder(
    name: str, engine: Engine, sampling: SamplingParams, on_token: Callable[[HasTokens], None] | None
) -> Generate:
    def generate(prompts: Sequence[Sequence[int]]) -> list[RequestOutput]:
        engine.forget_requests()  # the answer to a prompt that was decoded before must not be a draft
        params = [seeded_by_prompt(sampling, prompt) for prompt in prompts]
        outputs = engine.generate([list(prompt) for prompt in prompts], params, on_token=on_token)
        raise_for_failed(outputs, f"{name}: prompt")
        return outputs

    return generate


# -- answers that are kept token by token


def kept_answers(
    engine: Engine, target: DecodingTarget, prompts: NamedPrompts, config: EvaluateConfig
) -> tuple[KeptAnswer, ...]:
    """Decodes prompts from all over the set once more, by themselves, and notes who wrote each token."""
    pairs = [(task, prompt) for task, of_task in prompts.by_task.items() for prompt in of_task]
    number = min(config.keep_tokens, len(pairs))
    answers = []
    for task, prompt in (pairs[place * len(pairs) // number] for place in range(number)):
        events: list[StreamEvent] = []
        params = replace(seeded_by_prompt(config.sampling(), prompt), logprobs=NUM_ALTERNATIVES)
        engine.forget_requests()
        raise_for_failed(engine.generate([list(prompt)], params, on_token=events.append), "kept answer")
        asked = str(target.tokenizer.decode(list(prompt)))[-MOST_PROMPT_LETTERS:]
        answers.append(KeptAnswer(prompt=asked, task=task, tokens=kept_tokens(events, target)))
    return tuple(answers)


def kept_tokens(events: Sequence[StreamEvent], target: DecodingTarget) -> tuple[KeptToken, ...]:
    placed = [(event, place) for event in events for place in range(len(event.token_ids))]
    token_ids = [token_id for event in events for token_id in event.token_ids]
    logprobs = [found for event in events for found in event.logprobs or ()]
    texts = pieces(token_ids, target)
    return tuple(
        KeptToken(
            token_id=token_id,
            text=text,
            **origin_of(event, place, target),
            probability=probability(found.logprob),
            alternatives=likeliest(found, target),
        )
        for token_id, text, (event, place), found in zip(token_ids, texts, placed, logprobs, strict=True)
    )


def origin_of(event: StreamEvent, place: int, target: DecodingTarget) -> dict[str, Any]:
    """Says who wrote the token at `place` of a round's tokens, and what the drafter made of that place: fields of
    `KeptToken`."""
    drafted = event.drafted
    own_prob = drafted.own_probs[place] if drafted.own_probs is not None and place < len(drafted.own_probs) else None
    if place < drafted.num_accepted:
        return {"origin": "draft", "position": place + 1, "draft_probability": own_prob}
    if drafted.depth == 0:
        return {"origin": "verifier"}
    if drafted.num_accepted == drafted.depth:
        return {"origin": "bonus"}
    is_known = place < len(drafted.token_ids)
    rejected = (str(target.tokenizer.decode([drafted.token_ids[place]])), own_prob) if is_known else None
    return {"origin": "recovered", "rejected": rejected}


def pieces(token_ids: Sequence[int], target: DecodingTarget) -> list[str]:
    """The text that each token adds; a character of several tokens is the last one's."""
    texts, known = [], ""
    for end in range(1, len(token_ids) + 1):
        text = str(target.tokenizer.decode(list(token_ids[:end])))
        whole = known if text.endswith(REPLACEMENT) and end < len(token_ids) else text
        texts.append(whole[len(known) :])
        known = whole
    return texts


def likeliest(found: TokenLogprobs, target: DecodingTarget) -> tuple[tuple[str, float], ...]:
    ranked = sorted(found.top.items(), key=lambda pair: -pair[1])
    return tuple((str(target.tokenizer.decode([token_id])), probability(logprob)) for token_id, logprob in ranked)


def probability(logprob: float) -> float:
    return min(math.exp(logprob), 1.0)
