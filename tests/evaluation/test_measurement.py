"""Timing, statistics and rows, on decoders whose acceptance and speed are known by construction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from speculators.decoding.request import RequestOutput
from speculators.decoding.stats import DecodeStats
from speculators.evaluation.measurement import Measurement, measure_interleaved, summarise
from speculators.evaluation.report import EvaluationReport, NotLosslessError
from speculators.evaluation.statistics import bootstrap, count_identical, first_difference


class Clock:
    """Time that passes only when a decoder says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def decoder(
    clock: Clock, rounds: dict[tuple[int, int, int], int], time_s: float, tokens: Sequence[int], log: list[str]
):
    """Gives the same answer to every prompt; `rounds` counts (drafted, depth, accepted). Drafting takes a fifth."""

    def generate(prompts: Sequence[Sequence[int]]) -> list[RequestOutput]:
        clock.now_s += time_s
        log.append(f"{len(prompts)} x {time_s:g} s")
        draft_s = time_s / 5 if any(drafted for drafted, _, _ in rounds) else 0.0
        stats = DecodeStats(Counter(rounds), num_tokens=len(tokens), draft_s=draft_s, verify_s=time_s - draft_s)
        return [RequestOutput(list(prompt), list(tokens), stats=stats) for prompt in prompts]

    return generate


def plain_and_speculative(num_prompts: int = 4, **options):
    clock, log = Clock(), []
    methods = {
        # 7 tokens: one from the prompt, six steps
        "none": decoder(clock, {(0, 0, 0): 6}, 0.6, range(7), log),
        # 7 tokens: one from the prompt, then rounds of 3 drafts accepting 3, 1 and 0 -> 4 + 2 + 1 would be 8 in all
        "toy": decoder(clock, {(3, 3, 3): 1, (3, 3, 1): 1, (3, 3, 0): 1}, 0.4, range(7), log),
    }
    measured = measure_interleaved(methods, [[1]] * num_prompts, clock=clock, **options)
    return measured, log


def row(num_prompts: int = 4):
    measured, _ = plain_and_speculative(num_prompts)
    return summarise("toy", measured["none"], measured["toy"], num_speculative_tokens=3, temperature=0.0)


def test_a_row_holds_the_hand_computed_figures():
    toy = row()
    assert toy.acceptance_length.value == pytest.approx(1 + 4 / 3)
    assert toy.acceptance_rate == pytest.approx(4 / 9)
    # position 1: accepted in 2 of 3 rounds; position 2: in 1 of those 2; position 3: in 1 of that 1
    assert toy.conditional_acceptance == pytest.approx((2 / 3, 1 / 2, 1))
    assert toy.tokens_per_s == pytest.approx(7 / 0.4)
    assert toy.plain_tokens_per_s == pytest.approx(7 / 0.6)
    assert toy.speedup.value == pytest.approx(1.5)
    assert toy.speedup_per_token == pytest.approx(1.5 / (7 / 3))
    assert toy.draft_cost == pytest.approx(0.08 / 3 / 0.1)  # rounds of 0.4 / 3 s, plain steps of 0.6 / 6 s
    assert toy.verify_cost == pytest.approx(0.32 / 3 / 0.1)
    assert (toy.num_identical, toy.num_prompts) == (4, 4)
    assert toy.warnings == ()


def test_costs_are_left_open_when_every_answer_is_one_token():
    one = [Measurement(((7,),), 0.1, DecodeStats(num_tokens=1, prefill_s=0.1))]
    toy = summarise("toy", one, one, num_speculative_tokens=3, temperature=0.0)
    assert toy.draft_cost is None and toy.verify_cost is None


def test_conditional_acceptance_rebuilds_the_acceptance_length():
    """Identity of the speed model: 1 + sum_k prod_{i<=k} a_i, for drafts that are always K long."""
    toy = row()
    assert 1 + np.cumprod(toy.conditional_acceptance).sum() == pytest.approx(toy.acceptance_length.value)


def test_methods_take_turns_and_the_order_rotates():
    _, log = plain_and_speculative(num_prompts=3, num_warmup=0)
    assert log == ["1 x 0.6 s", "1 x 0.4 s", "1 x 0.4 s", "1 x 0.6 s", "1 x 0.6 s", "1 x 0.4 s"]


def test_warm_up_is_not_measured():
    with_warm_up, log = plain_and_speculative(num_prompts=2, num_warmup=2)
    assert len(log) == 4 + 4
    assert sum(m.time_s for m in with_warm_up["none"]) == pytest.approx(1.2)


def test_of_repeats_the_fastest_counts():
    clock = Clock()
    times = iter([5.0, 1.0, 3.0])

    def generate(prompts: Sequence[Sequence[int]]) -> list[RequestOutput]:
        clock.now_s += next(times)
        return [RequestOutput([1], [2])]

    measured = measure_interleaved({"none": generate}, [[1]], num_warmup=0, num_repeats=3, clock=clock)
    assert measured["none"][0].time_s == 1.0


def test_groups_hold_several_prompts():
    measured, log = plain_and_speculative(num_prompts=5, group_size=2, num_warmup=0)
    assert log[:2] == ["2 x 0.6 s", "2 x 0.4 s"]
    assert [len(m.token_ids) for m in measured["toy"]] == [2, 2, 1]


def test_a_speedup_above_the_acceptance_length_is_called_impossible():
    clock, log = Clock(), []
    methods = {
        "none": decoder(clock, {(0, 0, 0): 6}, 3.0, range(7), log),
        "toy": decoder(clock, {(3, 3, 1): 3}, 1.0, range(7), log),
    }
    measured = measure_interleaved(methods, [[1]] * 3, clock=clock)
    toy = summarise("toy", measured["none"], measured["toy"], num_speculative_tokens=3, temperature=0.0)
    assert "cannot be true" in toy.warnings[0]


def test_sampled_answers_are_not_compared():
    measured, _ = plain_and_speculative()
    toy = summarise("toy", measured["none"], measured["toy"], num_speculative_tokens=3, temperature=0.7)
    assert toy.num_identical is None


def test_bootstrap_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(1).normal(10, 2, size=400)
    estimate = bootstrap({"x": values, "n": np.ones(400)}, lambda sums: sums["x"] / sums["n"])
    assert estimate.value == pytest.approx(values.mean())
    half_width = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert estimate.half_width == pytest.approx(half_width, rel=0.1)


def test_bootstrap_of_equal_prompts_has_no_width():
    estimate = bootstrap({"x": [3.0, 3.0]}, lambda sums: sums["x"])
    assert (estimate.low, estimate.high) == (6.0, 6.0)


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="no prompts"):
        measure_interleaved({"none": decoder(Clock(), {}, 0.0, [], [])}, [])


@pytest.mark.parametrize(
    ("plain", "speculative", "position"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([], [], None)],
)
def test_the_first_difference_is_found(plain: list[int], speculative: list[int], position: int | None):
    assert first_difference(plain, speculative) == position


def test_identical_answers_are_counted():
    assert count_identical([[1], [2], [3]], [[1], [9], [3]]) == 2


def test_a_lossy_method_is_named_with_its_counts():
    clock, log = Clock(), []
    methods = {
        "none": decoder(clock, {(0, 0, 0): 2}, 1.0, [1, 2, 3], log),
        "broken": decoder(clock, {(3, 3, 1): 1}, 1.0, [1, 9, 3], log),
    }
    measured = measure_interleaved(methods, [[1]] * 2, clock=clock)
    broken = summarise("broken", measured["none"], measured["broken"], num_speculative_tokens=3, temperature=0.0)
    report = EvaluationReport("v", "d", (broken,))
    assert report.lossless is False
    assert "broken: 0 of 2 answers" in str(NotLosslessError(report.rows, "float32"))


def test_a_report_survives_json_and_shows_every_method(tmp_path):
    import json

    report = EvaluationReport("verifier", "heldout.jsonl", (row(),), {"max_tokens": 7}, {"commit": "abc"})
    saved = json.loads(report.save(tmp_path / "made" / "report.json").read_text())
    assert saved["rows"][0]["acceptance_length"]["value"] == pytest.approx(7 / 3)
    assert saved["lossless"] is True
    [table] = report.tables()
    assert list(table.columns[0].cells) == ["toy"]
    assert list(table.columns[2].cells) == ["2.33 ±0.00"]
    assert list(table.columns[7].cells) == ["4/4"]
