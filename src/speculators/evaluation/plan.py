"""`speculators plan`: what measured acceptance and costs say to serve, and what more training data is worth.

The cost model, in plain decoding's time for the same tokens; K draft tokens per round; c drafting and v scoring K + 1
positions (and bookkeeping), in plain steps, both measured; tau the tokens of a round; p the share of plain decoding's
time outside of its steps (prefill):

    time(K) = p + (1 - p) (c(K) + v(K)) / tau(K)        speedup(K) = 1 / time(K)        time(0) = 1

Costs between measured K are interpolated, from c(0) = 0 and v(0) = 1; acceptance of a shorter draft is that of its
positions in the longest one measured. Nothing is extrapolated beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from speculators.decoding.method import PLAIN
from speculators.evaluation.records import FEWEST_SIZES, LearningCurve, MethodRow
from speculators.evaluation.report import EvaluationReport, SavedReport, results_table, with_interval
from speculators.evaluation.statistics import Estimate, trend_of
from speculators.utils.files import is_same_model

WORTH_MEASURING = 0.02
"""A number of draft tokens that was not measured is named when the model promises so much more, relatively."""
TREES = ("speculative_token_tree", "dynamic_tree")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    num_speculative_tokens: int
    acceptance_length: float
    speedup: float
    """By the cost model."""
    measured: Estimate | None = None
    """The measured speedup; None where this K was not measured."""
    measured_length: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Speedup of one method against K, on one data set."""

    method: str
    dataset: str
    temperature: float
    batch_size: int
    points: tuple[CurvePoint, ...]

    @property
    def best(self) -> CurvePoint:
        return max(self.points, key=lambda point: point.speedup)

    @property
    def height(self) -> float:
        """Measured speedup over the model's, on average: what the model leaves out."""
        ratios = [point.measured.value / point.speedup for point in self.points if point.measured is not None]
        return sum(ratios) / len(ratios) if ratios else 1.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to serve at one batch size."""

    dataset: str
    temperature: float
    batch_size: int
    method: str
    """`none`: plain decoding."""
    num_speculative_tokens: int
    speedup: Estimate
    is_sure: bool
    """Whether the interval of its speedup lies above 1."""
    is_tree: bool = False
    speculative_config: dict[str, Any] | None = None
    hint: str = ""
    """A number of draft tokens worth measuring."""


@dataclass(frozen=True)
class PlanReport(SavedReport):
    choices: tuple[Choice, ...]
    curves: tuple[Curve, ...]
    learning: tuple[LearningCurve, ...]
    warnings: tuple[str, ...] = ()

    def tables(self) -> list[Table]:
        columns = ("batch", "K", "speedup", "sure", "worth\nmeasuring")
        caption, tables = "measured speedup ± 95 % bootstrap over prompts; sure: the interval lies above 1", []
        for place in dict.fromkeys((c.dataset, c.temperature) for c in self.choices):
            table = results_table(f"What to serve on {place[0]}", place[1], caption, columns)
            for choice in (c for c in self.choices if (c.dataset, c.temperature) == place):
                table.add_row(*map(escape, cells(choice)))
            curves = [c for c in self.curves if (c.dataset, c.temperature) == place]
            tables += [table, *([curves_table(curves)] if curves else [])]
        return tables

    def sentence(self) -> str:
        return "; ".join([*map(told_choice, self.choices), *(curve.sentence() for curve in self.learning)])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sentences": [curve.sentence() for curve in self.learning]}


def cells(choice: Choice) -> list[str]:
    name = f"{choice.method} (tree)" if choice.is_tree else choice.method
    if choice.method == PLAIN:
        return [name, str(choice.batch_size), "0", "1", "", choice.hint]
    return [
        *(name, str(choice.batch_size), str(choice.num_speculative_tokens)),
        *(with_interval(choice.speedup) + "x", "yes" if choice.is_sure else "no", choice.hint),
    ]


def told_choice(choice: Choice) -> str:
    where = f"batch {choice.batch_size} on {choice.dataset}"
    where += f", temperature {choice.temperature:g}" if choice.temperature else ""
    if choice.method == PLAIN:
        return f"{where}: plain decoding (K = 0), nothing measured is faster"
    doubt = "" if choice.is_sure else ", which its interval does not tell from plain decoding"
    return f"{where}: {choice.method} with K = {choice.num_speculative_tokens}, {choice.speedup.value:.2f}x{doubt}"


def curves_table(curves: Sequence[Curve]) -> Table:
    most = max(point.num_speculative_tokens for curve in curves for point in curve.points)
    caption = "speedup by the cost model, measured one in brackets; the largest of each row in stars"
    columns = ["batch", *(f"K={k}" for k in range(1, most + 1))]
    table = results_table(f"Cost model on {curves[0].dataset}", curves[0].temperature, caption, columns)
    for column in table.columns[2:]:
        column.no_wrap = False  # what was measured goes below, where the screen is narrow
    for curve in curves:
        found = {point.num_speculative_tokens: point for point in curve.points}
        shown = [cell_of_curve(found.get(k), curve.best) for k in range(1, most + 1)]
        table.add_row(*map(escape, [curve.method, str(curve.batch_size), *shown]))
    return table


def cell_of_curve(point: CurvePoint | None, best: CurvePoint) -> str:
    if point is None:
        return ""
    star = "*" if point is best else ""
    measured = "" if point.measured is None else f" ({point.measured.value:.2f})"
    return f"{star}{point.speedup:.2f}{star}{measured}"


def make_plan(results: Sequence[EvaluationReport], training_sizes: Sequence[int | None] = ()) -> PlanReport:
    """Chooses method and K per data set, temperature and batch size, and fits what data is worth.

    `training_sizes`: rows that the drafters of each result were trained on, where the results do not say so. Raises
    `ValueError` for results of several verifiers or in which nothing drafts, and for another number of sizes.
    """
    if training_sizes and len(training_sizes) != len(results):
        raise ValueError(f"{len(training_sizes)} training sizes for {len(results)} results: give one for each")
    others = [report.verifier for report in results if not is_same_model(results[0].verifier, report.verifier)]
    if others:
        raise ValueError(f"a plan is for one verifier: these results are of {results[0].verifier!r} and {others[0]!r}")
    rows = [(row, report.plain_of(row)) for report in results for row in report.whole_rows if not row.is_plain]
    if not rows:
        raise ValueError("nothing drafts in these results, so there is nothing to choose: evaluate with a --method")
    curves, drafting = curves_of(rows), [row for row, _ in rows]
    sized = [(row, row.training_rows) for row in drafting]
    if training_sizes:  # what has no weights was trained on nothing
        given = zip(results, training_sizes, strict=True)
        sized = [(r, n) for report, n in given for r in report.whole_rows if (r.speculative_config or {}).get("model")]
    notes = [f"not whole: {report.interrupted}" for report in results if report.interrupted]
    notes += [warning for report in results for warning in report.warnings()]
    return PlanReport(choices_of(drafting, curves), curves, learning_curves(sized), tuple(notes))


# -- the cost model


def curves_of(rows: Sequence[tuple[MethodRow, MethodRow | None]]) -> tuple[Curve, ...]:
    """One curve per drafter, data set, temperature and batch size. Trees have none: K does not say what they cost."""
    groups: dict[tuple[Any, ...], list[tuple[MethodRow, MethodRow | None]]] = {}
    for row, plain in rows:
        if not is_tree(row) and row.conditional_acceptance and None not in (row.draft_cost, row.verify_cost):
            drafter = (row.method, (row.speculative_config or {}).get("model"))
            groups.setdefault((*drafter, row.dataset, row.temperature, row.batch_size), []).append((row, plain))
    return tuple(map(curve_of, groups.values()))


def curve_of(measured: Sequence[tuple[MethodRow, MethodRow | None]]) -> Curve:
    by_number = {row.num_speculative_tokens: (row, plain) for row, plain in measured}
    longest, plain = by_number[max(by_number)]
    numbers = sorted(by_number)
    draft_costs = [by_number[k][0].draft_cost or 0.0 for k in numbers]
    verify_costs = [by_number[k][0].verify_cost or 1.0 for k in numbers]
    lengths = acceptance_lengths(longest)
    outside = share_outside(plain)
    points = []
    for k in range(1, min(len(lengths) - 1, max(numbers)) + 1):
        cost = np.interp(k, [0, *numbers], [0.0, *draft_costs]) + np.interp(k, [0, *numbers], [1.0, *verify_costs])
        length = by_number[k][0].acceptance_length.value if k in by_number else lengths[k]
        points.append(
            CurvePoint(
                num_speculative_tokens=k,
                acceptance_length=length,
                speedup=float(1 / (outside + (1 - outside) * cost / length)),
                measured=by_number[k][0].speedup if k in by_number else None,
                measured_length=by_number[k][0].acceptance_length if k in by_number else None,
            )
        )
    return Curve(
        method=longest.method,
        dataset=longest.dataset,
        temperature=longest.temperature,
        batch_size=longest.batch_size,
        points=tuple(points),
    )


def acceptance_lengths(row: MethodRow) -> list[float]:
    """[K]: tokens of a round with K drafts, as the positions of a longer draft were accepted. Rounds in which nothing
    was drafted are not among the conditional rates: the measured length says how many there were."""
    survival_K = np.cumprod(row.conditional_acceptance)
    drafting = (row.acceptance_length.value - 1) / survival_K.sum() if survival_K.sum() else 0.0
    return [1.0, *(1 + drafting * survival_K.cumsum())]


def share_outside(plain: MethodRow | None) -> float:
    """Share of plain decoding's time that drafting cannot shorten."""
    shares = {} if plain is None else plain.time_shares
    steps = sum(shares.get(name, 0.0) for name in ("draft", "verify", "overhead"))
    return max(0.0, 1 - steps) if shares else 0.0


def is_tree(row: MethodRow) -> bool:
    return any((row.speculative_config or {}).get(name) for name in TREES)


def choices_of(rows: Sequence[MethodRow], curves: Sequence[Curve]) -> tuple[Choice, ...]:
    choices = []
    for place in sorted({(row.dataset, row.temperature, row.batch_size) for row in rows}):
        here = [row for row in rows if (row.dataset, row.temperature, row.batch_size) == place]
        best = max(here, key=lambda row: (row.is_possible, row.speedup.value))
        ours = [curve for curve in curves if (curve.dataset, curve.temperature, curve.batch_size) == place]
        pays = best.speedup.value > 1 and best.is_possible
        choices.append(
            Choice(
                dataset=place[0],
                temperature=place[1],
                batch_size=place[2],
                method=best.method if pays else PLAIN,
                num_speculative_tokens=best.num_speculative_tokens if pays else 0,
                speedup=best.speedup if pays else Estimate(1.0, 1.0, 1.0),
                is_sure=pays and best.speedup.is_above(1),
                is_tree=pays and is_tree(best),
                speculative_config=best.speculative_config if pays else None,
                hint=hint_of(max(best.speedup.value, 1.0), ours),
            )
        )
    return tuple(choices)


def hint_of(reached: float, curves: Sequence[Curve]) -> str:
    """Names an unmeasured K that the model promises more for. Its curve is taken to the measured height."""
    promising = [
        (curve.height * point.speedup, f"{curve.method} K={point.num_speculative_tokens}")
        for curve in curves
        for point in curve.points
        if point.measured is None and curve.height * point.speedup > reached * (1 + WORTH_MEASURING)
    ]
    speedup, name = max(promising, default=(0.0, ""))
    return f"{name}: {speedup:.2f}x" if name else ""


# -- what more data is worth


def learning_curves(rows: Sequence[tuple[MethodRow, int | None]]) -> tuple[LearningCurve, ...]:
    """One curve per method, data set, K, temperature and batch size, of the rows whose training size is known."""
    groups: dict[tuple[Any, ...], dict[int, Estimate]] = {}
    for row, size in rows:
        if size is not None:
            place = (row.method, row.dataset, row.num_speculative_tokens, row.temperature, row.batch_size)
            groups.setdefault(place, {})[size] = row.acceptance_length
    curves = []
    for (method, dataset, num_drafts, temperature, batch_size), found in groups.items():
        sizes, lengths = zip(*sorted(found.items()), strict=True)
        trend = trend_of(sizes, lengths, num_drafts + 1) if len(sizes) >= FEWEST_SIZES else None
        curves.append(
            LearningCurve(
                method=method,
                dataset=dataset,
                num_speculative_tokens=num_drafts,
                temperature=temperature,
                batch_size=batch_size,
                sizes=sizes,
                acceptance_lengths=lengths,
                trend=trend,
            )
        )
    return tuple(curves)
