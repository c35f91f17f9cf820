"""`speculators compare`: two results beside each other, prompt by prompt, with intervals of the differences.

Prompts that both results decoded are resampled together, so what makes one prompt easy for both cancels out. A speedup
is that of each result over its own plain decoding: two machines, or two days of one, may be compared in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from speculators.evaluation.records import GroupFigures, MethodRow
from speculators.evaluation.report import EvaluationReport, SavedReport, results_table, with_interval
from speculators.evaluation.statistics import Estimate, bootstrap
from speculators.utils.files import is_same_model

SETTINGS = (
    *("max_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "dtype"),
    *(
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "bad_words",
    ),
)
"""Settings that shape an answer: results that differ in one measured other work."""
NO_EVIDENCE = "no evidence of a difference"
MACHINE = ("device", "num_cpus", "num_threads")
COLUMNS = (
    *("K", "prompts", "τ\nfirst", "τ\nsecond", "difference\nof τ"),
    *("speedup\nfirst", "speedup\nsecond", "difference\nof speedup"),
)
Place = tuple[str, float, int, int]
"""Data set, temperature, batch size, draft tokens."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One method in two results, on the prompts that both decoded. Differences are second minus first."""

    dataset: str
    temperature: float
    batch_size: int
    num_speculative_tokens: int
    methods: tuple[str, str]
    num_prompts: int
    acceptance_lengths: tuple[float, float]
    speedups: tuple[float, float]
    acceptance_length: Estimate
    speedup: Estimate

    @property
    def name(self) -> str:
        return self.methods[0] if len(set(self.methods)) == 1 else " / ".join(self.methods)

    def sentence(self) -> str:
        """Says what there is evidence of."""
        where = f"{self.name} K={self.num_speculative_tokens} on {self.dataset}"
        where += f", batch {self.batch_size}" if self.batch_size > 1 else ""
        where += f", temperature {self.temperature:g}" if self.temperature else ""
        figures = {"acceptance length": self.acceptance_length, "speedup": self.speedup}
        if not any(map(is_evidence, figures.values())):
            return f"{where}: {NO_EVIDENCE}"
        parts = [
            f"{name} {found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
            if is_evidence(found)
            else f"{name}: {NO_EVIDENCE}"
            for name, found in figures.items()
        ]
        return f"{where}: {', '.join(parts)}"


@dataclass(frozen=True)
class ComparisonReport(SavedReport):
    first: str
    second: str
    rows: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    """What was left out, and what to mind."""

    def tables(self) -> list[Table]:
        caption = "± 95 % bootstrap over the prompts of both; a difference whose interval holds 0 is no evidence of one"
        tables = []
        for dataset, temperature, batch_size in dict.fromkeys(
            (r.dataset, r.temperature, r.batch_size) for r in self.rows
        ):
            together = f", {batch_size} together" if batch_size > 1 else ""
            table = results_table(
                f"{self.first} and {self.second} on {dataset}{together}", temperature, caption, COLUMNS
            )
            for row in self.rows:
                if (row.dataset, row.temperature, row.batch_size) == (dataset, temperature, batch_size):
                    table.add_row(*map(escape, cells(row)))
            tables.append(table)
        return tables

    def sentence(self) -> str:
        return "; ".join(row.sentence() for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sentences": [row.sentence() for row in self.rows]}


def is_evidence(found: Estimate) -> bool:
    """Whether 0 lies outside of the interval of a difference."""
    return found.is_above(0) or found.is_below(0)


def cells(row: Difference) -> list[str]:
    lengths, speedups = row.acceptance_lengths, row.speedups
    return [
        row.name,
        str(row.num_speculative_tokens),
        str(row.num_prompts),
        *(f"{length:.2f}" for length in lengths),
        ("+" if row.acceptance_length.value >= 0 else "") + with_interval(row.acceptance_length),
        *(f"{speedup:.2f}x" for speedup in speedups),
        ("+" if row.speedup.value >= 0 else "") + with_interval(row.speedup),
    ]


def compare_results(
    first: EvaluationReport, second: EvaluationReport, *, names: tuple[str, str] = ("first", "second")
) -> ComparisonReport:
    """Compares the methods that two results share; where each has one, whatever its name, these.

    `names`: of the results, for the table. Raises `ValueError`, naming what differs, for results of other verifiers,
    other settings of decoding, or without a data set, temperature, batch size and K, or prompts, in common.
    """
    refuse_other_work(first, second, names)
    rows = [by_place(report) for report in (first, second)]
    shared = [place for place in rows[0] if place in rows[1]]
    if not shared:
        raise ValueError(f"{names[0]} and {names[1]} have no cell in common: {'; '.join(no_overlap(rows[0], rows[1]))}")
    notes = machine_notes(first, second)
    left_out = len(rows[0].keys() ^ rows[1].keys())
    if left_out:
        notes.append(f"{left_out} combinations of data set, temperature, batch size and K are in one result alone")
    found: list[Difference] = []
    unpaired: set[str] = set()
    for place in shared:
        paired = pairs(rows[0][place], rows[1][place], names)
        found += [differences(place, (first, one), (second, other), names) for one, other in paired]
        measured = {row.method for side in rows for row in side[place]}
        unpaired |= measured - {row.method for pair in paired for row in pair}
    if unpaired:
        notes.append(f"methods that one result alone measured in a cell are left out there: {listed(unpaired)}")
    for name, report in zip(names, (first, second), strict=True):
        notes += [f"{name} is not whole: {report.interrupted}"] if report.interrupted else []
        notes += [f"{name}: {warning}" for warning in report.warnings()]
    num_intervals = 2 * len(found)
    if num_intervals >= 20:
        notes.append(f"of {num_intervals} intervals of 95 %, {num_intervals / 20:.0f} miss a true 0 by chance")
    return ComparisonReport(*names, tuple(found), tuple(notes))


def refuse_other_work(first: EvaluationReport, second: EvaluationReport, names: tuple[str, str]) -> None:
    differing = []
    if not is_same_model(first.verifier, second.verifier):
        differing.append(f"verifier {first.verifier} and {second.verifier}")
    for name in SETTINGS:
        one, other = (as_read(report.settings.get(name)) for report in (first, second))
        if one != other:
            differing.append(f"{name} {one} and {other}")
    if differing:
        raise ValueError(f"{names[0]} and {names[1]} did other work, so they are not compared: {', '.join(differing)}")


def as_read(value: Any) -> Any:
    """As JSON gives it back: a report that was just measured has tuples, and an earlier release left settings out."""
    return list(value) if isinstance(value, tuple) else value


def by_place(report: EvaluationReport) -> dict[Place, list[MethodRow]]:
    rows: dict[Place, list[MethodRow]] = {}
    for row in report.whole_rows:
        if not row.is_plain:
            place = (row.dataset, row.temperature, row.batch_size, row.num_speculative_tokens)
            rows.setdefault(place, []).append(row)
    return rows


def no_overlap(first: Mapping[Place, Any], second: Mapping[Place, Any]) -> list[str]:
    """Names the parts of the places that are disjoint."""
    told = []
    for number, name in enumerate(("data set", "temperature", "batch size", "num_speculative_tokens")):
        one, other = ({place[number] for place in places} for places in (first, second))
        if one.isdisjoint(other):
            told.append(f"{name} {listed(one)} and {listed(other)}")
    return told or ["no combination of data set, temperature, batch size and K is in both"]


def listed(values: set[Any]) -> str:
    return ", ".join(map(str, sorted(values))) or "none"


def pairs(
    first: Sequence[MethodRow], second: Sequence[MethodRow], names: tuple[str, str]
) -> list[tuple[MethodRow, MethodRow]]:
    methods = [[row.method for row in rows] for rows in (first, second)]
    found = [(row, other) for row in first for other in second if row.method == other.method]
    if not found and len(first) == len(second) == 1:
        return [(first[0], second[0])]
    if not found:
        raise ValueError(
            f"{names[0]} measured {listed(set(methods[0]))}, {names[1]} {listed(set(methods[1]))}: no method is in "
            "both, and which to compare is open where there are several"
        )
    return found


def differences(
    place: Place,
    first: tuple[EvaluationReport, MethodRow],
    second: tuple[EvaluationReport, MethodRow],
    names: tuple[str, str],
) -> Difference:
    sides = [groups_of_side(*side, name) for side, name in zip((first, second), names, strict=True)]
    common = [prompts for prompts in sides[0] if prompts in sides[1]]
    if not common:
        raise ValueError(
            f"{names[0]} and {names[1]} decoded other prompts of {place[0]!r} (no group of {place[2]} is in both): "
            "measure both on the same ones"
        )
    counts: dict[str, list[float]] = {}
    for number, side in enumerate(sides):
        for group, plain in (side[prompts] for prompts in common):
            values = {
                "accepted": group.num_accepted,
                "rounds": group.num_rounds,
                "tokens": group.num_tokens,
                "s": group.time_s,
                "plain_tokens": plain.num_tokens,
                "plain_s": plain.time_s,
            }
            for name, value in values.items():
                counts.setdefault(f"{name}{number}", []).append(value)
    lengths = [float(length_of(sums_of(counts), number)[0]) for number in (0, 1)]
    speedups = [float(speedup_of(sums_of(counts), number)[0]) for number in (0, 1)]
    dataset, temperature, batch_size, num_drafts = place
    return Difference(
        dataset=dataset,
        temperature=temperature,
        batch_size=batch_size,
        num_speculative_tokens=num_drafts,
        methods=(first[1].method, second[1].method),
        num_prompts=sum(map(len, common)),
        acceptance_lengths=(lengths[0], lengths[1]),
        speedups=(speedups[0], speedups[1]),
        acceptance_length=bootstrap(counts, lambda sums: length_of(sums, 1) - length_of(sums, 0)),
        speedup=bootstrap(counts, lambda sums: speedup_of(sums, 1) - speedup_of(sums, 0)),
    )


def groups_of_side(
    report: EvaluationReport, row: MethodRow, name: str
) -> dict[tuple[str, ...], tuple[GroupFigures, GroupFigures]]:
    """Prompts -> what was counted of them by the method, and by the plain decoding beside it."""
    plain = report.plain_of(row)
    if not row.groups or plain is None or not plain.groups:
        raise ValueError(f"{name} has no figures of each prompt (it is of an earlier release): measure it again")
    plain_of = {group.prompts: group for group in plain.groups}
    return {group.prompts: (group, plain_of[group.prompts]) for group in row.groups if group.prompts in plain_of}


def sums_of(counts: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    return {name: np.asarray([sum(values)], dtype=np.float64) for name, values in counts.items()}


def length_of(sums: Mapping[str, np.ndarray], side: int) -> np.ndarray:
    return 1 + sums[f"accepted{side}"] / np.maximum(sums[f"rounds{side}"], 1)


def speedup_of(sums: Mapping[str, np.ndarray], side: int) -> np.ndarray:
    speed, plain = (sums[f"{name}tokens{side}"] / sums[f"{name}s{side}"] for name in ("", "plain_"))
    return speed / plain


def machine_notes(first: EvaluationReport, second: EvaluationReport) -> list[str]:
    differing = [
        f"{name} {first.environment.get(name)} and {second.environment.get(name)}"
        for name in MACHINE
        if first.environment.get(name) != second.environment.get(name)
    ]
    told = [f"they were measured on other machines ({', '.join(differing)}): τ is the same on each, speed is not"]
    return told if differing else []
