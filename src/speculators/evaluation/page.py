"""`speculators report`: results as one HTML page with charts drawn here (`charts`). It loads nothing from anywhere.

`page.html` holds the style and the words around what is made here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template

from speculators.evaluation.charts import Panel, Point, Series, draw, legend, stacked_bar, table, text
from speculators.evaluation.plan import Curve, PlanReport, acceptance_lengths, make_plan, told_choice
from speculators.evaluation.records import KeptAnswer, KeptToken, LearningCurve, MethodRow
from speculators.evaluation.report import EvaluationReport, together, verdict
from speculators.evaluation.statistics import Estimate
from speculators.utils.files import atomic_write

SHARES = {"prefill": 7, "draft": 1, "verify": 0, "overhead": 4, "outside": 3}
"""Part of the time -> its style."""
ORIGINS = {
    "draft": "proposed by the drafter and accepted (stronger: later in the draft)",
    "recovered": "the verifier's choice in place of a rejected draft",
    "bonus": "the verifier's choice after all drafts were accepted",
    "verifier": "the verifier's choice with no draft before it",
}
UNFINISHED = "\N{MIDDLE DOT}"
"""Stands for a token that ends inside a character."""
DEEPEST = 8
"""Positions of a draft that are told apart by colour."""


def write_page(
    results: Sequence[EvaluationReport], path: str | os.PathLike[str], training_sizes: Sequence[int | None] = ()
) -> Path:
    """Writes the page of one result, or of several: rows that the first lacks are added from the others, which also
    make the learning curve. `training_sizes`: see `make_plan`. Raises `ValueError` for no result."""
    path = Path(path)
    with atomic_write(path, "w") as file:
        file.write(page_of(results, training_sizes))
    return path


def page_of(results: Sequence[EvaluationReport], training_sizes: Sequence[int | None] = ()) -> str:
    if not results:
        raise ValueError("no result was given, so there is nothing to report")
    report = merged(results)
    has_drafts = any(not row.is_plain for row in report.rows)
    plan = make_plan([report]) if has_drafts else PlanReport((), (), ())
    learning = make_plan(results, training_sizes).learning if has_drafts else ()
    drafting = dict.fromkeys(row.method for row in report.rows if not row.is_plain)
    styles = {name: number for number, name in enumerate(drafting)}
    sections = [
        results_section(report),
        legend(styles, "methods"),
        section("Acceptance by position", POSITIONS, position_panels(report, styles)),
        section("Draft tokens: acceptance length and speedup", DRAFT_TOKENS, curve_panels(plan.curves, styles)),
        section("Speedup against batch size", BATCHES, batch_panels(report, styles)),
        shares_section(report),
        learning_section(learning, styles),
        tokens_section(report),
    ]
    facts = {"verifier": report.verifier, "settings": report.settings, "environment": report.environment}
    names = {"device": "{}", "num_cpus": "{} CPUs", "num_threads": "{} thread(s)"}
    where = [words.format(report.environment[name]) for name, words in names.items() if name in report.environment]
    best = [told_choice(choice) for choice in plan.choices] if len(plan.choices) > 1 else [report.sentence()]
    warnings = [*([report.interrupted] if report.interrupted else []), *report.warnings()]
    template = Template(files("speculators.evaluation").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=text(f"Speculative decoding of {Path(report.verifier).name or report.verifier}"),
        subtitle=text("; ".join([report.dataset, ", ".join(where)])),
        verdict="<br>".join(map(text, best)),
        warnings=warnings_box(warnings),
        body="\n".join(filter(None, sections)),
        settings=text(json.dumps(facts, indent=1, default=str)),
    )


def merged(results: Sequence[EvaluationReport]) -> EvaluationReport:
    report = results[0]
    for other in results[1:]:
        known = {key_of(row) for row in report.rows if not row.is_plain}
        if any(key_of(row) not in known for row in other.rows if not row.is_plain):
            added = tuple(row for row in other.rows if row.is_plain or key_of(row) not in known)
            names = dict.fromkeys([*report.dataset.split(", "), *other.dataset.split(", ")])
            report = replace(report, rows=(*report.rows, *added), dataset=", ".join(names))
    return report


def key_of(row: MethodRow) -> tuple[object, ...]:
    return row.method, row.num_speculative_tokens, row.dataset, row.task, row.temperature, row.batch_size


def warnings_box(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{text(warning)}</li>" for warning in warnings)
    return f'<div class="warnings" role="note"><strong>Mind</strong><ul>{items}</ul></div>' if warnings else ""


def section(title: str, words: str, panels: Sequence[Panel]) -> str:
    if not panels:
        return ""
    return f'<section><h2>{title}</h2><p>{words}</p><div class="panels">{"".join(map(draw, panels))}</div></section>'


def place_of(row: MethodRow | Curve) -> str:
    """What a panel or table is about, beside the method."""
    words = [row.dataset or "prompts", f"temperature {row.temperature:g}" if row.temperature else "greedy"]
    return ", ".join(words + ([f"{row.batch_size} together"] if row.batch_size > 1 else []))


# -- the sections


def results_section(report: EvaluationReport) -> str:
    head = ("method", "K", "acceptance length τ", "speedup", "speedup / τ", "tokens/s", "same text", "drafting / round")
    tables = []
    for rows in together(report.rows):
        whole = [row for row in rows if row.task is None]
        name = place_of(rows[0])
        tables.append(table(head, map(cells, whole), f"{name}, {whole[0].num_prompts} prompts"))
        tasks = [row for row in rows if row.task is not None and not row.is_plain]
        if tasks:
            shown = [[f"{row.method} K={row.num_speculative_tokens}", str(row.task), *cells(row)[2:7]] for row in tasks]
            by_task = table(("method", "task", *head[2:7]), shown, f"{name}, by task")
            tables.append(f"<details><summary>{text(name)}, by task</summary>{by_task}</details>")
    return f"<section><h2>Results</h2>{''.join(tables)}</section>"


def cells(row: MethodRow) -> list[str]:
    if row.is_plain:
        return ["plain decoding", "0", "1", "1", "", f"{row.tokens_per_s:.1f}", "", ""]
    return [
        *(row.method, str(row.num_speculative_tokens), estimate(row, row.acceptance_length, "")),
        *(estimate(row, row.speedup, "x"), f"{row.speedup_per_token:.2f}", f"{row.tokens_per_s:.1f}"),
        *(verdict(row), "" if row.draft_cost is None else f"{row.draft_cost:.2f} steps"),
    ]


def estimate(row: MethodRow, found: Estimate, unit: str) -> str:
    """With its interval, which one measurement has none of."""
    if row.num_prompts <= row.batch_size:
        return f"{found.value:.2f}{unit}"
    return f"{found.value:.2f}{unit} ({found.low:.2f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{found.high:.2f})"


POSITIONS = "Share of rounds that accept the first draft, the first two, and so on, of the longest measured drafts."


def position_panels(report: EvaluationReport, styles: dict[str, int]) -> list[Panel]:
    panels = []
    for rows in together(report.whole_rows):
        if rows[0].batch_size != min(row.batch_size for row in report.rows if row.dataset == rows[0].dataset):
            continue  # batches do not change what is accepted
        series = []
        for method, style in styles.items():
            of_method = [row for row in rows if row.method == method and row.conditional_acceptance]
            if of_method:
                lengths = acceptance_lengths(max(of_method, key=lambda row: row.num_speculative_tokens))
                gains = [longer - shorter for shorter, longer in pairwise(lengths)]
                points = [Point(k, gain) for k, gain in enumerate(gains, start=1)]
                series.append(Series(method, style, points))
        if series:
            panels.append(Panel(place_of(rows[0]), "position", "share of rounds accepting it", series, reference=0.0))
    return panels


DRAFT_TOKENS = (
    "Marks are measured; broken lines are the cost model's, from measured acceptance and measured costs of drafting "
    "and scoring. The ring is the best K of the model."
)


def curve_panels(curves: Sequence[Curve], styles: dict[str, int]) -> list[Panel]:
    panels = []
    for place in dict.fromkeys((curve.dataset, curve.temperature, curve.batch_size) for curve in curves):
        here = [curve for curve in curves if (curve.dataset, curve.temperature, curve.batch_size) == place]
        title = place_of(here[0])
        lengths: list[Series] = []
        speeds: list[Series] = []
        for curve in here:
            name, style = curve.method, styles[curve.method]
            numbered = [(float(point.num_speculative_tokens), point) for point in curve.points]
            best = float(curve.best.num_speculative_tokens)
            lengths.append(Series(f"{name}, model", style, [Point(k, p.acceptance_length) for k, p in numbered], True))
            lengths.append(
                Series(name, style, [Point.of(k, p.measured_length) for k, p in numbered if p.measured_length])
            )
            speeds.append(Series(f"{name}, model", style, [Point(k, p.speedup) for k, p in numbered], True, best))
            speeds.append(Series(name, style, [Point.of(k, p.measured) for k, p in numbered if p.measured]))
        panels.append(Panel(f"{title}: τ", "K, draft tokens per round", "acceptance length τ", lengths))
        panels.append(Panel(f"{title}: speedup", "K, draft tokens per round", "speedup", speeds, reference=1.0))
    return panels


BATCHES = "The fastest K of each method at each batch size; the broken line is plain decoding."


def batch_panels(report: EvaluationReport, styles: dict[str, int]) -> list[Panel]:
    panels = []
    for dataset, temperature in dict.fromkeys((row.dataset, row.temperature) for row in report.whole_rows):
        rows = [row for row in report.whole_rows if (row.dataset, row.temperature) == (dataset, temperature)]
        sizes = sorted({row.batch_size for row in rows})
        if len(sizes) < 2:
            continue
        series = []
        for method, style in styles.items():
            by_size = {size: [r for r in rows if r.method == method and r.batch_size == size] for size in sizes}
            best = {size: max(found, key=lambda r: r.speedup.value) for size, found in by_size.items() if found}
            series.append(Series(method, style, [Point.of(size, row.speedup) for size, row in best.items()]))
        title = place_of(replace(rows[0], batch_size=1))
        shown = [one for one in series if one.points]
        panels.append(Panel(title, "prompts decoded together", "speedup", shown, reference=1.0, x_is_log=True))
    return panels


def shares_section(report: EvaluationReport) -> str:
    """Where the time of each row went: bars, and their figures."""
    rows = [row for group in together(report.whole_rows) for row in group if row.time_shares]
    if not rows:
        return ""
    bars, figures = [], []
    for row in rows:
        shares = {**row.time_shares, "outside": max(0.0, 1 - sum(row.time_shares.values()))}
        label = row.place if not row.is_plain else f"plain decoding, {place_of(row)}"
        bars.append(stacked_bar(label, shares, SHARES))
        figures.append([label, *(f"{shares.get(name, 0.0):.1%}" for name in SHARES)])
    return (
        f"<section><h2>Where the time goes</h2>{legend(SHARES, 'parts of the time', are_marks=False)}{''.join(bars)}"
        f"<details><summary>Figures</summary>{table(('row', *SHARES), figures)}</details></section>"
    )


def learning_section(curves: Sequence[LearningCurve], styles: dict[str, int]) -> str:
    """Acceptance length against training rows, with the line and what it promises."""
    panels, words = [], []
    for curve in curves:
        words.append(f"<p>{text(curve.sentence())}.</p>")
        found = [Point.of(size, length) for size, length in zip(curve.sizes, curve.acceptance_lengths, strict=True)]
        series = [Series(curve.method, styles.get(curve.method, 0), found)]
        if curve.trend is not None:
            ahead = zip(curve.trend.sizes, curve.trend.predicted, strict=True)
            expected = [found[-1], *(Point.of(size, length) for size, length in ahead)]
            series.append(Series(f"{curve.method}, expected", styles.get(curve.method, 0), expected, is_model=True))
        if len(curve.sizes) > 1:
            title = f"{curve.method} K={curve.num_speculative_tokens}, {curve.dataset}"
            panels.append(Panel(title, "training rows", "acceptance length τ", series, x_is_log=True))
    drawn = f'<div class="panels">{"".join(map(draw, panels))}</div>'
    return f"<section><h2>What more data is worth</h2>{''.join(words)}{drawn}</section>" if curves else ""


def tokens_section(report: EvaluationReport) -> str:
    """Answers token by token."""
    rows = [row for row in report.whole_rows if row.answers and not row.is_plain]
    if not rows:
        return ""
    samples = "".join(
        f'<li><span class="{name}" style="--depth:.3">&nbsp;{name}&nbsp;</span> {words}</li>'
        for name, words in ORIGINS.items()
    )
    answers = "".join(answer_of(row, answer) for row in rows for answer in row.answers)
    return (
        "<section><h2>Who wrote each token</h2><p>Point at a token, tap it, or use the arrow keys: probabilities are "
        "those before temperature. N-gram and suffix drafts have none; those of draft trees are not kept.</p>"
        f'<ul class="legend" aria-label="origins of tokens">{samples}</ul>{answers}</section>'
    )


def answer_of(row: MethodRow, answer: KeptAnswer) -> str:
    counts = {origin: sum(token.origin == origin for token in answer.tokens) for origin in ORIGINS}
    told = ", ".join(f"{number} {origin}" for origin, number in counts.items() if number)
    spans = "".join(map(span, answer.tokens))
    label = text(f"answer of {row.place}, {told}: {''.join(token.text for token in answer.tokens)}")
    return (
        f'<div class="answer"><h3>{text(row.place)}</h3><p class="note">{len(answer.tokens)} tokens: {told}</p>'
        f'<p class="prompt" tabindex="0">{text(answer.prompt)}</p>'
        f'<div class="tokens" tabindex="0" role="group" aria-label="{label}">{spans}</div>'
        '<div class="told" role="status" aria-live="polite"></div></div>'
    )


def span(token: KeptToken) -> str:
    who = f"draft, position {token.position}" if token.position else f"{token.origin}, {ORIGINS[token.origin]}"
    if token.rejected is not None:
        who += f" ({token.rejected[0]!r}, {by_drafter(token.rejected[1])})"
    gave = f"verifier {token.probability:.1%}"
    gave += f", {by_drafter(token.draft_probability)}" if token.position else ""
    others = "; ".join(f"{word!r} {probability:.1%}" for word, probability in token.alternatives)
    told = f"{token.text!r}: {who}. Probability: {gave}. The verifier's likeliest: {others}"
    depth = f' style="--depth:{0.16 + 0.5 * min(token.position, DEEPEST) / DEEPEST:.2f}"' if token.position else ""
    shown = text(token.text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n") or UNFINISHED)
    return f'<span class="{token.origin}"{depth} data-told="{text(told)}">{shown}</span>'


def by_drafter(probability: float | None) -> str:
    return "drafter: none" if probability is None else f"drafter {probability:.1%}"
