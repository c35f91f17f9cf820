"""Results are read again: of this schema, of the one before it, and made-up ones, which are flagged or refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from row_toys import ROW

from speculators.decoding.request import RequestOutput
from speculators.decoding.stats import DecodeStats
from speculators.evaluation import load_result, measure_interleaved, result_schema, summarise
from speculators.evaluation.records import MethodRow
from speculators.evaluation.report import EvaluationReport, NotLosslessError
from speculators.evaluation.statistics import Estimate

NEW_KEYS = {"dataset", "task", "batch_size", "speculative_config", "training_rows", "time_shares", "groups", "answers"}


def save(tmp_path, document) -> str:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_what_is_saved_is_what_is_read(tmp_path):
    report = EvaluationReport("v", "heldout", (replace(ROW, dataset="heldout", batch_size=8),), {"max_tokens": 7})
    assert load_result(report.save(tmp_path / "result.json")) == report


def test_a_result_of_one_cell_without_a_version_is_read(tmp_path):
    row = {key: value for key, value in asdict(ROW).items() if key not in NEW_KEYS}
    settings = {"batch_size": 8, "speculative_configs": {"none": None, "eagle3": {"model": "run/3"}}}
    document = {"verb": "evaluate", "verifier": "v", "dataset": "chats.jsonl", "rows": [row], "settings": settings}
    [read] = load_result(save(tmp_path, {**document, "environment": {}, "interrupted": None, "lossless": None})).rows
    assert read == replace(ROW, dataset="chats.jsonl", batch_size=8, speculative_config={"model": "run/3"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 99}, "schema version 99, this release reads up to 2"),
        ({"rows": []}, "has no rows"),
        ({"rows": [{**asdict(ROW), "acceptance_rate": 1.5}]}, r"rows\.0\.acceptance_rate"),
        ({"rows": [{**asdict(ROW), "speedup": {"value": "fast"}}]}, r"rows\.0\.speedup\.value"),
        ({"rows": 3}, "rows: Input should be"),
        ({"server": "http://x"}, "measured on a server"),
    ],
)
def test_what_is_no_result_is_refused_by_the_place_of_the_fault(changes, said, tmp_path):
    document = asdict(EvaluationReport("v", "heldout", (ROW,))) | changes
    with pytest.raises(ValueError, match=said):
        load_result(save(tmp_path, document))


def test_a_made_up_speedup_above_the_acceptance_length_is_flagged_by_the_reader(tmp_path):
    rows = (
        ROW,
        replace(ROW, speedup=Estimate(3.5, 3.1, 3.9)),
        replace(ROW, speedup=Estimate(2.6, 2.4, 2.8)),
        replace(ROW, speedup=Estimate(2.6, 2.4, 2.8), batch_size=8),  # a batch lasts as long as its longest answer
    )
    read = load_result(EvaluationReport("v", "heldout", rows).save(tmp_path / "result.json"))
    assert [bool(row.doubts()) for row in read.rows] == [False, True, True, False]
    first, second = read.warnings()
    assert "cannot be true" in first and "noise alone" in second


def test_an_answer_that_differs_is_counted_once_though_its_task_has_a_row_too():
    report = EvaluationReport("v", "spec-bench", (ROW, replace(ROW, task="qa", num_prompts=3, num_identical=2)))
    with pytest.raises(NotLosslessError) as caught:
        report.raise_for_errors()
    assert str(caught.value) == "not lossless: eagle3: 19 of 20 answers are identical"


def test_the_schema_says_which_fields_a_result_has():
    schema = result_schema()
    row = schema["$defs"]["MethodRow"]
    assert {"acceptance_length", "speedup", "groups"} <= row["properties"].keys()
    assert set(row["required"]).isdisjoint(NEW_KEYS) and "speedup" in row["required"]
    assert row["properties"]["acceptance_rate"]["maximum"] == 1


def noisy(rng: np.random.Generator, num_prompts: int = 60) -> MethodRow:
    """A drafter of known acceptance and speed, timed on a noisy machine: drafts of 3, a round costs 1.3 plain steps."""
    now_s = [0.0]

    def decoder(num_drafts: int, step_s: float):
        def generate(prompts):
            rounds = Counter((num_drafts, num_drafts, int(n)) for n in rng.binomial(num_drafts, 0.5, size=12))
            num_tokens = 1 + sum((accepted + 1) * number for (_, _, accepted), number in rounds.items())
            now_s[0] += step_s * 12 * float(rng.lognormal(sigma=0.15))
            stats = DecodeStats(rounds, num_tokens, verify_s=step_s)
            return [RequestOutput(list(prompts[0]), [7] * num_tokens, stats=stats)]

        return generate

    methods = {"none": decoder(0, 1.0), "toy": decoder(3, 1.3)}
    prompts = [[number] for number in range(num_prompts)]
    measured = measure_interleaved(methods, prompts, num_warmup=0, clock=lambda: now_s[0])
    return summarise("toy", measured["none"], measured["toy"], num_speculative_tokens=3, temperature=0.0)


def test_repeating_an_evaluation_gives_overlapping_intervals_that_cover_the_truth():
    rows = [noisy(np.random.default_rng(seed)) for seed in range(100, 200)]
    # 12 rounds of 1 + 3 x 0.5 tokens and one from the prompt, at 1.3 steps a round, against 13 tokens in 12 steps
    truths = {"acceptance_length": 2.5, "speedup": (12 * 2.5 + 1) / (12 * 1.3) / (13 / 12)}
    for name, truth in truths.items():
        found = [getattr(row, name) for row in rows]
        covering = sum(estimate.low <= truth <= estimate.high for estimate in found)
        overlapping = sum(a.low <= b.high and b.low <= a.high for a, b in pairwise(found))
        assert covering >= 87  # of 100; percentile intervals of 60 prompts cover 94 %, give or take 2.4
        assert overlapping >= 96  # of 99 pairs; two intervals of 95 % miss one another in 1 of 180
