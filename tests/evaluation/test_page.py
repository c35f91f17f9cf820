"""The page of a report: complete without a network, every figure in it twice (drawn, and as text), and nothing in it
that a model wrote is taken for HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from speculators.cli.app import main
from speculators.evaluation.charts import Panel, Point, Series, draw, ticks
from speculators.evaluation.page import page_of
from speculators.evaluation.records import KeptAnswer, KeptToken, MethodRow
from speculators.evaluation.report import EvaluationReport
from speculators.evaluation.statistics import Estimate

SHARES = {"prefill": 0.1, "draft": 0.15, "verify": 0.6, "overhead": 0.05}
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[2J"


def sure(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1)


def row(method: str, num_drafts: int, length: float, speedup: float, **changes: Any) -> MethodRow:
    values = {
        "method": method,
        "num_speculative_tokens": num_drafts,
        "temperature": 0.0,
        "num_prompts": 20,
        "num_tokens": 600,
        "acceptance_length": sure(length),
        "acceptance_rate": 0.4,
        "conditional_acceptance": (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)[:num_drafts],
        "tokens_per_s": 12 * speedup,
        "plain_tokens_per_s": 12.0,
        "speedup": sure(speedup),
        "speedup_per_token": speedup / length,
        "num_identical": 20,
        "draft_share": 0.15,
        "draft_cost": 0.06 * num_drafts,
        "verify_cost": 1 + 0.04 * num_drafts,
        "dataset": "spec-bench",
        "time_shares": SHARES,
    }
    return MethodRow(**{**values, **changes})


def answer(text: str = "It is 42.") -> KeptAnswer:
    origins = [("verifier", None), ("draft", 1), ("draft", 2), ("recovered", None), ("draft", 1), ("bonus", None)]
    tokens = tuple(
        KeptToken(
            token_id=number,
            text=word,
            origin=origin,
            position=position,
            probability=0.9 - 0.1 * number,
            alternatives=((word, 0.8), ("other", 0.1)),
            draft_probability=0.55 if number == 2 else None,
            rejected=("no", 0.25) if origin == "recovered" else None,
        )
        for number, ((origin, position), word) in enumerate(zip(origins, [*"It is", text], strict=True))
    )
    return KeptAnswer(prompt="How much is 6 x 7?", tokens=tokens)


def result(**changes: Any) -> EvaluationReport:
    """Two methods at three K and two batch sizes, a task row, and an answer token by token."""
    rows: list[MethodRow] = []
    for batch_size, worth in ((1, 1.0), (8, 0.7)):
        for num_drafts in (2, 4, 6):
            rows.append(row("none", 0, 1.0, 1.0, batch_size=batch_size, draft_cost=0.0, verify_cost=1.0))
            for method, length in (("eagle3", 1 + 0.45 * num_drafts**0.7), ("ngram", 1 + 0.1 * num_drafts**0.5)):
                speedup = worth * length * (1 - 0.06 * num_drafts)
                kept = (answer(),) if (method, num_drafts, batch_size) == ("eagle3", 4, 1) else ()
                rows.append(row(method, num_drafts, length, speedup, batch_size=batch_size, answers=kept))
    rows.append(row("eagle3", 4, 2.0, 1.4, task="qa"))
    facts = {"device": "x86_64", "num_cpus": 2, "num_threads": 1}
    return replace(EvaluationReport("models/smollm2", "spec-bench", tuple(rows), {"max_tokens": 7}, facts), **changes)


class Page(HTMLParser):
    """Collects tags, and refuses what is not closed."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_has_every_section_and_loads_nothing():
    page = Page(html := page_of([result()]))
    for heading in (
        *("Results", "Acceptance by position", "Draft tokens: acceptance length and speedup"),
        *("Speedup against batch size", "Where the time goes", "Who wrote each token", "How to read this"),
    ):
        assert heading in page.text
    assert not re.search(r"https?://|url\(|@import|<link|<iframe|\bsrc=", html)
    assert not any("href" in attributes for _, attributes in page.tags)
    [policy] = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and '<html lang="en">' in html


def test_every_picture_has_a_text_alternative_and_every_figure_stands_in_a_table():
    page = Page(page_of([result()]))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("aria-hidden") != "true"]
    assert len(pictures) >= 8 and all(a.get("role") == "img" and a.get("aria-label") for a in pictures)
    told = " ".join(str(a["aria-label"]) for a in pictures)
    assert "speedup against K, draft tokens per round: eagle3, model" in told
    eagle = next(row for row in result().rows if (row.method, row.num_speculative_tokens) == ("eagle3", 4))
    length, speedup = eagle.acceptance_length, eagle.speedup
    assert f"{length.value:.2f} ({length.low:.2f} to {length.high:.2f})" in page.text
    assert f"{speedup.value:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})" in page.text
    assert "10.0%" in page.text and "plain decoding, spec-bench, greedy" in page.text


def test_tokens_say_who_wrote_them():
    page = Page(page_of([result()]))
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "data-told" in attributes]
    classes = [attributes["class"] for attributes in spans]
    assert classes == ["verifier", "draft", "draft", "recovered", "draft", "bonus"]
    told = [str(attributes["data-told"]) for attributes in spans]
    assert told[1].startswith("'t': draft, position 1. Probability: verifier 80.0%, drafter: none. The verifier's")
    assert told[2].startswith("' ': draft, position 2. Probability: verifier 70.0%, drafter 55.0%. The verifier's")
    assert "a rejected draft ('no', drafter 25.0%). Probability: verifier 60.0%. The" in told[3]
    assert "6 tokens: 3 draft, 1 recovered, 1 bonus, 1 verifier" in page.text


def test_nothing_that_was_written_elsewhere_is_taken_for_html():
    hostile = result(verifier=HOSTILE, dataset=HOSTILE, settings={"x": HOSTILE})
    rows = tuple(
        replace(r, method=r.method + HOSTILE, dataset=HOSTILE, answers=(answer(HOSTILE),)) for r in hostile.rows
    )
    html = page_of([replace(hostile, rows=rows)])
    page = Page(html)
    assert html.count("<script>") == html.count("</script>") == 1
    assert "\x1b" not in html and not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_a_made_up_speedup_is_flagged_on_the_page():
    made_up = replace(result(), rows=(*result().rows, row("magic", 2, 1.5, 3.0)))
    assert (
        "magic: speedup 3.00 exceeds the acceptance length 1.50: this cannot be true" in Page(page_of([made_up])).text
    )
    assert "Mind" not in Page(page_of([result()])).text


def test_several_results_make_one_page_and_a_learning_curve():
    few, more, most = (
        EvaluationReport("v", "ours", (row("none", 0, 1, 1), row("eagle3", 4, length, 1.3, training_rows=size)))
        for size, length in ((100, 1.6), (300, 2.0), (1000, 2.4))
    )
    page = Page(page_of([few, more, most]))
    assert "What more data is worth" in page.text and "each doubling of the data adds +0.24" in page.text
    assert sum("training rows" in str(a.get("aria-label")) for _, a in page.tags) == 1
    other = EvaluationReport(
        "v", "gsm8k", (row("none", 0, 1, 1, dataset="gsm8k"), row("ngram", 2, 1.2, 1.1, dataset="gsm8k"))
    )
    assert "gsm8k, greedy, 20 prompts" in Page(page_of([few, other])).text
    eight = {"dataset": "gsm8k", "batch_size": 8}  # accepts as it would alone: positions of each data set are shown
    batched = EvaluationReport("v", "gsm8k", (row("none", 0, 1, 1, **eight), row("eagle3", 2, 1.2, 1.1, **eight)))
    pictures = [str(a.get("aria-label")) for _, a in Page(page_of([few, batched])).tags]
    assert sum("share of rounds accepting it" in label for label in pictures) == 2
    plain = EvaluationReport("v", "ours", (row("none", 0, 1, 1),))
    assert "Results" in Page(page_of([plain])).text  # nothing drafts: a table all the same
    with pytest.raises(ValueError, match="no result"):
        page_of([])


def test_marks_stand_where_their_values_are():
    points = [Point(1, 0.0), Point(2, 1.0, 0.8, 1.2), Point(4, 2.0)]
    html = draw(Panel("t", "x", "y", [Series("a", 0, points, best=4)]))
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", html)[0])  # type: ignore[index]
    marks = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle") if c.get("class") == "mark"]
    (x0, y0), (x1, y1), (x2, y2) = marks
    assert (x1 - x0) * 2 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    [ring] = [c for c in svg.iter("circle") if c.get("class") == "ring"]
    assert (float(ring.get("cx")), float(ring.get("cy"))) == marks[2]
    [bar] = [p.get("d") for p in svg.iter("path") if p.get("class") == "bar"]
    low, high = map(float, re.search(r" ([\d.]+)V([\d.]+)", bar).groups())  # type: ignore[union-attr]
    assert low - y1 == pytest.approx(y1 - high, abs=0.2) and low - y1 == pytest.approx((y0 - y1) * 0.2, abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.93, 2.1, [0.5, 1.0, 1.5, 2.0, 2.5]), (3, 3, [3.0])],
)
def test_ticks_are_round_and_hold_all_values(low, high, expected):
    assert ticks(low, high)[: len(expected)] == pytest.approx(expected)


def test_the_command_writes_one_file(tmp_path, capsys):
    saved = result().save(tmp_path / "result.json")
    assert main(["report", str(saved)]) == 0
    assert "Who wrote each token" in (tmp_path / "result.html").read_text()
    assert main(["report", str(saved), "-o", str(tmp_path / "made" / "page.html")]) == 0
    assert (tmp_path / "made" / "page.html").read_text() == (tmp_path / "result.html").read_text()
    assert main(["report", str(tmp_path / "result.html")]) == 2
    assert "is not JSON" in capsys.readouterr().err
