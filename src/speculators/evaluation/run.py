"""Measures methods of drafting beside plain decoding: one verifier, the same prompts, all engines in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from speculators.data_generation.rollout import load_prompts
from speculators.decoding import Engine, RequestOutput, SamplingParams
from speculators.decoding.method import PLAIN, Method, parse_methods
from speculators.decoding.request import raise_for_failed
from speculators.decoding.target import VerifierSource, open_target
from speculators.evaluation.config import EvaluateConfig
from speculators.evaluation.measurement import (
    Generate,
    MeasuringStoppedError,
    measure_interleaved,
    seeded_by_prompt,
    summarise,
)
from speculators.evaluation.report import EvaluationReport, EvaluationStoppedError, environment
from speculators.evaluation.statistics import two_sample_p_value
from speculators.utils.progress import HasTokens, Progress, reporting, token_counter


def measure_methods(
    config: EvaluateConfig,
    verifier: VerifierSource,
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool | Progress | None = None,
) -> EvaluationReport:
    """Measure every method on the same prompts; `progress` counts them.

    `verifier`, `data`: what `config` names, or the loaded model and the rows that it names. Raises `ValueError` for a
    verifier, drafter or data set that cannot be read, and for a verifier whose scores are not finite;
    `EvaluationStoppedError` on Ctrl-C, with the report of the prompts that were measured.
    """
    trees = {"speculative_token_tree": config.speculative_token_tree, "dynamic_tree": config.dynamic_tree}
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    methods = parse_methods(config.methods, config.num_speculative_tokens, trees)
    methods = [Method(PLAIN, None), *(method for method in methods if method.speculative_config is not None)]
    target = open_target(
        verifier,
        tokenizer=tokenizer,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    found = {"dtype": str(target.model.dtype).removeprefix("torch."), "device": str(target.model.device)}
    prompts = load_prompts(data, target.tokenizer, limit=config.num_prompts)
    max_length = max(map(len, prompts)) + config.max_tokens
    engines = {
        method.name: Engine(
            target.model,
            method.speculative_config,
            tokenizer=target.tokenizer,
            max_batch_size=config.batch_size,
            max_length=max_length,
        )
        for method in methods
    }
    sampling = config.sampling()
    done, total = 0, len(prompts)

    def add(num_prompts: int) -> None:
        nonlocal done
        done += num_prompts
        show("decode", done, total)

    stopped: MeasuringStoppedError | None = None
    with reporting(progress) as show:
        show("decode", 0, total)
        try:
            measurements = measure_interleaved(
                {name: decoder(name, engine, sampling, token_counter(show)) for name, engine in engines.items()},
                prompts,
                group_size=config.batch_size,
                num_warmup=config.num_warmup,
                num_repeats=config.num_repeats,
                on_group=add,
            )
        except MeasuringStoppedError as stop:
            stopped, measurements = stop, stop.measurements
    draws = config.check_sampling and config.temperature > 0 and stopped is None
    p_values = sampling_p_values(engines, prompts, config) if draws else {}
    rows = tuple(
        summarise(
            method.name,
            measurements[PLAIN],
            measurements[method.name],
            num_speculative_tokens=method.num_speculative_tokens,
            temperature=config.temperature,
            sampling_p_value=p_values.get(method.name),
        )
        for method in methods
    )
    report = EvaluationReport(
        verifier=config.verifier,
        dataset=config.data,
        rows=rows,
        settings=asdict(config) | found | {"speculative_configs": {m.name: m.speculative_config for m in methods}},
        environment=environment(),
        interrupted=None if stopped is None else f"stopped after {done} of {total} prompts",
    )
    if stopped is not None:
        raise EvaluationStoppedError(report) from stopped
    return report


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
