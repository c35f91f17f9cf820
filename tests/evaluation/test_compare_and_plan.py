"""`compare` and `plan` on made-up results whose truth is known by construction."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from speculators import assets
from speculators.cli.app import main, run
from speculators.evaluation.compare import compare_results
from speculators.evaluation.plan import Choice, Curve, CurvePoint, PlanReport, acceptance_lengths, make_plan
from speculators.evaluation.records import GroupFigures, MethodRow
from speculators.evaluation.report import EvaluationReport
from speculators.evaluation.statistics import Estimate, trend_of

NUM_PROMPTS = 30


def sure(value: float, half_width: float = 0.05) -> Estimate:
    return Estimate(value, value - half_width, value + half_width)


def groups(length: float, round_s: float, hardness_N: np.ndarray, first_prompt: int = 0) -> tuple[GroupFigures, ...]:
    """One prompt each, of 20 rounds; `hardness_N` is what prompts take from every method's drafts alike."""
    return tuple(
        GroupFigures(
            prompts=(f"prompt {first_prompt + number}",),
            num_tokens=int(20 * max(length - hardness, 1.0)),
            num_rounds=20,
            num_accepted=int(20 * max(length - hardness - 1, 0.0)),
            time_s=20 * round_s,
        )
        for number, hardness in enumerate(hardness_N)
    )


def row(method: str = "eagle3", num_drafts: int = 4, **changes) -> MethodRow:
    values = {
        "method": method,
        "num_speculative_tokens": num_drafts,
        "temperature": 0.0,
        "num_prompts": NUM_PROMPTS,
        "num_tokens": 600,
        "acceptance_length": sure(1.0 if method == "none" else 2.5),
        "acceptance_rate": 0.4,
        "conditional_acceptance": (0.8, 0.6, 0.5, 0.4)[:num_drafts],
        "tokens_per_s": 9.0,
        "plain_tokens_per_s": 6.0,
        "speedup": sure(1.0 if method == "none" else 1.6),
        "speedup_per_token": 0.6,
        "num_identical": NUM_PROMPTS,
        "draft_share": 0.1,
        "draft_cost": 0.0 if method == "none" else 0.1 * num_drafts,
        "verify_cost": 1.0 if method == "none" else 1 + 0.05 * num_drafts,
        "dataset": "heldout",
    }
    return MethodRow(**{**values, **changes})


def result(length: float, round_s: float = 1.3, *, first_prompt: int = 0, settings=None, **changes) -> EvaluationReport:
    hardness_N = np.random.default_rng(0).uniform(0, 1.2, NUM_PROMPTS)
    plain = row("none", 0, groups=groups(1.0, 1.0, np.zeros(NUM_PROMPTS), first_prompt), **changes)
    drafting = row(groups=groups(length, round_s, hardness_N, first_prompt), **changes)
    return EvaluationReport("verifier", "heldout", (plain, drafting), settings or {"max_tokens": 128})


def test_a_difference_that_prompts_share_is_seen_though_they_scatter_more_than_it():
    [found] = compare_results(result(2.6), result(2.8)).rows
    assert found.acceptance_length.value == pytest.approx(0.2, abs=0.03)
    assert found.acceptance_length.low > 0 and found.acceptance_length.half_width < 0.05
    assert found.num_prompts == NUM_PROMPTS
    # unpaired, the lengths scatter by more than the difference: their intervals overlap
    per_prompt = [group.num_accepted / group.num_rounds for group in result(2.6).rows[1].groups]
    assert 1.96 * np.std(per_prompt) / np.sqrt(NUM_PROMPTS) > 0.1


def test_figures_of_a_comparison_are_ratios_of_sums():
    first, second = result(2.6), result(2.6, round_s=1.0)
    [found] = compare_results(first, second).rows
    for number, report in enumerate((first, second)):
        plain, drafting = (report.rows[place].groups for place in (0, 1))
        rounds, accepted = (sum(getattr(g, name) for g in drafting) for name in ("num_rounds", "num_accepted"))
        assert found.acceptance_lengths[number] == pytest.approx(1 + accepted / rounds)
        speeds = [sum(g.num_tokens for g in side) / sum(g.time_s for g in side) for side in (drafting, plain)]
        assert found.speedups[number] == pytest.approx(speeds[0] / speeds[1])
    assert found.acceptance_length.value == 0 and found.speedup.low > 0
    assert found.sentence().startswith(
        "eagle3 K=4 on heldout: acceptance length: no evidence of a difference, speedup +0."
    )


def test_equal_results_give_no_evidence_of_a_difference():
    report = compare_results(result(2.6), result(2.6))
    assert report.sentence() == "eagle3 K=4 on heldout: no evidence of a difference"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (result(2.6, temperature=0.7), r"no cell in common: temperature 0\.0 and 0\.7$"),
        (result(2.6, num_speculative_tokens=2), "no cell in common: num_speculative_tokens 4 and 2$"),
        (result(2.6, dataset="gsm8k", batch_size=8), "data set heldout and gsm8k; batch size 1 and 8$"),
        (result(2.6, first_prompt=1000), "decoded other prompts of 'heldout'"),
        (result(2.6, settings={"max_tokens": 64}), "did other work.*max_tokens 128 and 64"),
        (replace(result(2.6), verifier="another"), "verifier verifier and another"),
        (replace(result(2.6), rows=(row("none", 0), row())), "has no figures of each prompt"),
        (replace(result(2.6), rows=(row("none", 0), row("ngram"), row("suffix"))), "no method is in both"),
    ],
)
def test_what_is_not_comparable_is_refused_by_its_name(other, said):
    with pytest.raises(ValueError, match=said):
        compare_results(result(2.6), other)


def test_one_measurement_is_no_evidence():
    """Its resamples are itself: the interval has no width, wherever it lies."""
    once = result(2.6, num_prompts=1, speedup=Estimate(1.6, 1.6, 1.6))
    once = replace(once, rows=tuple(replace(r, groups=r.groups[:1]) for r in once.rows))
    faster = replace(
        once, rows=tuple(replace(r, groups=result(3.4).rows[n].groups[:1]) for n, r in enumerate(once.rows))
    )
    report = compare_results(once, faster)
    assert report.rows[0].acceptance_length.value > 0
    assert report.sentence() == "eagle3 K=4 on heldout: no evidence of a difference"
    assert "1.60x, no evidence of a difference" in once.sentence()
    [choice] = make_plan([once]).choices
    assert (choice.method, choice.is_sure) == ("eagle3", False)


def test_prompts_that_one_result_lacks_are_left_out():
    [found] = compare_results(result(2.6), result(2.6, first_prompt=10)).rows
    assert found.num_prompts == NUM_PROMPTS - 10


def test_results_of_one_method_each_are_compared_whatever_its_name():
    other = result(2.6)
    other = replace(other, rows=(other.rows[0], replace(other.rows[1], method="dflash")))
    [found] = compare_results(result(2.6), other).rows
    assert found.methods == ("eagle3", "dflash") and found.name == "eagle3 / dflash"


def test_what_is_left_out_or_not_whole_is_said():
    """A method is left out of a cell where one result alone measured it, though both did in another cell."""
    first, second = result(2.6), result(2.6)
    dflash, of_two = replace(second.rows[1], method="dflash"), {"num_speculative_tokens": 2}
    first = replace(first, rows=(*first.rows, *(replace(row, **of_two) for row in (first.rows[1], dflash))))
    second = replace(second, rows=(*second.rows, dflash, *first.rows[2:]), interrupted="stopped early")
    report = compare_results(first, second, names=("a.json", "b.json"))
    assert [(row.name, row.num_speculative_tokens) for row in report.rows] == [
        ("eagle3", 4),
        ("eagle3", 2),
        ("dflash", 2),
    ]
    assert report.notes == (
        "methods that one result alone measured in a cell are left out there: dflash",
        "b.json is not whole: stopped early",
    )
    assert make_plan([second]).warnings == ("not whole: stopped early",)
    assert compare_results(result(2.6), result(2.6)).notes == make_plan([result(2.6)]).warnings == ()


# -- the plan


def test_the_cost_model_has_the_hand_computed_curve():
    plan = make_plan([EvaluationReport("v", "heldout", (row("none", 0), row("eagle3", 2), row("eagle3", 4)))])
    [curve] = plan.curves
    assert [point.num_speculative_tokens for point in curve.points] == [1, 2, 3, 4]
    # survival 0.8, 0.48, 0.24, 0.096: their sum, 1.616, is taken to the measured 1.5 tokens
    survival = np.cumsum([0.8, 0.48, 0.24, 0.096]) * 1.5 / 1.616
    assert [point.acceptance_length for point in curve.points] == pytest.approx(
        [1 + survival[0], 2.5, 1 + survival[2], 2.5]
    )
    costs = [0.1 + 1.05, 0.2 + 1.1, 0.3 + 1.15, 0.4 + 1.2]
    expected = [point.acceptance_length / cost for point, cost in zip(curve.points, costs, strict=True)]
    assert [point.speedup for point in curve.points] == pytest.approx(expected)
    assert [point.measured is not None for point in curve.points] == [False, True, False, True]


def test_time_outside_of_steps_bounds_the_gain():
    shares = {"prefill": 0.3, "verify": 0.45, "overhead": 0.05}  # half of plain decoding's time is steps
    plain = row("none", 0, time_shares=shares)
    [curve] = make_plan([EvaluationReport("v", "heldout", (plain, row()))]).curves
    assert curve.points[-1].speedup == pytest.approx(1 / (0.5 + 0.5 * 1.6 / 2.5))


def test_rounds_without_drafts_shorten_the_expected_length():
    rare = row("ngram", 2, conditional_acceptance=(0.9, 0.5), acceptance_length=sure(1.2))
    assert acceptance_lengths(rare) == pytest.approx([1.0, 1 + 0.2 * 0.9 / 1.35, 1.2])


def test_the_choice_is_the_fastest_of_each_batch_size_and_plain_decoding_where_nothing_pays():
    rows = (
        row("none", 0),
        row("eagle3", 4, speedup=sure(1.6)),
        row("ngram", 4, speedup=sure(1.2)),
        row("none", 0, batch_size=8),
        row("eagle3", 4, speedup=sure(0.9), batch_size=8),
        row("none", 0, batch_size=4),
        row("eagle3", 4, speedup=sure(1.02), batch_size=4),
    )
    chosen = make_plan([EvaluationReport("v", "heldout", rows)]).choices
    assert [(c.batch_size, c.method, c.num_speculative_tokens, c.is_sure) for c in chosen] == [
        (1, "eagle3", 4, True),
        (4, "eagle3", 4, False),
        (8, "none", 0, False),
    ]


def test_what_cannot_be_true_is_not_recommended():
    plain, honest = row("none", 0), row("eagle3", 4, speedup=sure(1.6))
    magic = row("magic", 4, speedup=sure(4.0), acceptance_length=sure(1.5))
    report = EvaluationReport("v", "heldout", (plain, honest, magic))
    [choice] = make_plan([report]).choices
    assert choice.method == "eagle3" and report.best == honest
    [choice] = make_plan([replace(report, rows=(plain, magic))]).choices
    assert (choice.method, choice.is_sure) == ("none", False)


def test_a_number_of_drafts_that_the_model_promises_more_for_is_named():
    rows = (
        row("none", 0),
        row("eagle3", 4, speedup=sure(1.5), draft_cost=1.2),
    )  # a quarter of the drafts, of their cost
    [choice] = make_plan([EvaluationReport("v", "heldout", rows)]).choices
    assert choice.hint.startswith("eagle3 K=1: ") or choice.hint.startswith("eagle3 K=2: ")


def sized(size: int | None, length: float, half_width: float = 0.05) -> EvaluationReport:
    trained = {"acceptance_length": sure(length, half_width), "speculative_config": {"model": "run/3"}}
    rows = (row("none", 0), row(**trained, training_rows=size))
    return EvaluationReport("v", "heldout", rows)


def test_what_more_data_is_worth_follows_a_line_in_its_logarithm():
    plan = make_plan([sized(size, 1 + 0.2 * np.log2(size)) for size in (128, 512, 2048)])
    [curve] = plan.learning
    assert curve.trend is not None and curve.trend.per_doubling.value == pytest.approx(0.2)
    assert curve.trend.sizes == (4096, 8192)
    assert [found.value for found in curve.trend.predicted] == pytest.approx([3.4, 3.6])
    assert all(found.low < found.value < found.high for found in curve.trend.predicted)
    assert "each doubling of the data adds +0.20" in curve.sentence() and "4,096 rows 3.40" in curve.sentence()


def test_fewer_than_three_sizes_say_nothing():
    [curve] = make_plan([sized(100, 2.0), sized(300, 2.4)]).learning
    assert curve.trend is None and "cannot say what more data is worth" in curve.sentence()
    assert make_plan([sized(None, 2.0)]).learning == ()


def test_flat_or_scattered_figures_are_no_evidence_that_data_helps():
    [curve] = make_plan([sized(size, 2.0, 0.2) for size in (100, 300, 1000)]).learning
    assert "no evidence that more data helps" in curve.sentence()
    scattered = trend_of([100, 300, 1000], [sure(2.0, 0.001), sure(2.6, 0.001), sure(2.1, 0.001)])
    assert scattered.per_doubling.low < 0 < scattered.per_doubling.high  # however sure each figure is


def test_sizes_may_be_said_where_results_do_not(tmp_path, capsys):
    paths = [str(sized(None, 1 + n).save(tmp_path / f"{n}.json")) for n in (1, 1.5, 2)]
    record = run(["plan", *paths, "--training-sizes", "100,1000,10000", "--output", str(tmp_path / "plan.json")])
    assert list(record["learning"][0]["sizes"]) == [100, 1000, 10000]
    assert json.loads((tmp_path / "plan.json").read_text())["choices"] == json.loads(json.dumps(record["choices"]))
    assert main(["plan", *paths, "--training-sizes", "100"]) == 2
    assert "1 training sizes for 3 results" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing drafts"):
        make_plan([EvaluationReport("v", "heldout", (row("none", 0),))])


def test_sizes_are_those_of_trained_drafters():
    reports = [sized(None, 1 + n) for n in (1, 1.5, 2)]
    reports = [replace(r, rows=(*r.rows, row("ngram", speculative_config={"method": "ngram"}))) for r in reports]
    assert [curve.method for curve in make_plan(reports, [100, 1000, 10000]).learning] == ["eagle3"]


def test_results_of_other_verifiers_have_no_plan_in_common():
    with pytest.raises(ValueError, match="for one verifier: these results are of 'v' and 'w'"):
        make_plan([sized(100, 2.0), replace(sized(300, 2.4), verifier="w")])


def test_the_commands_print_tables_a_sentence_and_json(tmp_path, capsys):
    paths = [str(result(length).save(tmp_path / f"{length}.json")) for length in (2.6, 2.8)]
    assert main(["compare", *paths, "--output", str(tmp_path / "difference.json")]) == 0
    printed = capsys.readouterr().out
    assert "acceptance length +0.20" in " ".join(printed.split())
    assert json.loads(printed.splitlines()[-1])["verb"] == "compare"
    assert json.loads((tmp_path / "difference.json").read_text())["rows"][0]["num_prompts"] == NUM_PROMPTS
    assert main(["plan", *paths]) == 0
    printed = capsys.readouterr().out
    assert "What to serve on heldout" in printed and "Cost model" in printed


# -- what cannot be true


def test_a_made_up_speedup_is_flagged_wherever_it_is_shown(tmp_path, capsys, monkeypatch):
    true = result(2.6)
    fast = replace(true.rows[1], speedup=sure(4.0))
    made_up = replace(true, rows=(true.rows[0], fast), settings={"max_tokens": 128, "data": "heldout"})
    named = "eagle3: speedup 4.00 exceeds the acceptance length 2.50: this cannot be true"
    a, b = (str(report.save(tmp_path / f"{name}.json")) for name, report in (("a", true), ("b", made_up)))
    monkeypatch.setattr("speculators.api.evaluate", lambda **settings: made_up)
    evaluated = ["evaluate", "--verifier", str(assets.tiny_verifier_path()), "--data", "ours", "--method", "ngram"]
    for words in (["compare", a, b], ["plan", b], ["report", b, "-o", str(tmp_path / "page.html")], evaluated):
        assert main(words) == 0
        printed = capsys.readouterr()
        said = " ".join(f"{printed.err} {printed.out}".split())
        assert (f"{b}: {named}" if words[0] == "compare" else named) in said
        assert "speculators serve" not in said
    assert "4.00x cannot be true, it is above the acceptance length 2.50" in said  # evaluate's last line
    page = (tmp_path / "page.html").read_text()
    assert named in page and "4.00x faster" not in page
    [choice] = make_plan([made_up]).choices
    assert (choice.method, choice.num_speculative_tokens) == ("none", 0)
    assert main(["plan", a]) == 0 and "cannot be true" not in capsys.readouterr().err


def test_a_table_of_eight_k_names_its_methods_on_eighty_columns():
    points = tuple(
        CurvePoint(num_speculative_tokens=k, acceptance_length=2.0, speedup=1.0 + k / 10, measured=sure(1.5))
        for k in range(1, 9)
    )
    curves = tuple(
        Curve(method=method, dataset=dataset, temperature=0.0, batch_size=1, points=points)
        for dataset in ("a-data-set-with-a-long-name.jsonl", "gsm8k")
        for method in ("eagle3", "suffix")
    )
    console = Console(file=io.StringIO(), width=80)
    choices = tuple(
        Choice(
            method="eagle3",
            dataset=curve.dataset,
            temperature=0.0,
            batch_size=1,
            num_speculative_tokens=4,
            speedup=sure(1.5),
            is_sure=True,
        )
        for curve in curves[::2]
    )
    for table in PlanReport(choices, curves, ()).tables():
        console.print(table)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines if "1.10" in line] == ["eagle3", "suffix"] * 2
    assert sum("Cost model on" in line for line in lines) == 2 and "…" not in console.file.getvalue()
