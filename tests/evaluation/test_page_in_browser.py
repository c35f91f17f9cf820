"""The page of a small evaluation in a real browser: at the widths of a phone and of a desk, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser_pages import DESK, IN_A_BROWSER, PHONE, chromium, opened
from playwright.sync_api import Browser, expect

import speculators as sp
from speculators import assets
from speculators.evaluation import EvaluationReport, write_page

pytestmark = IN_A_BROWSER
EARLY_EXIT = '{"method": "early_exit", "early_exit_layer": 1, "num_speculative_tokens": 2}'
SECTIONS = [
    *("Results", "Acceptance by position", "Draft tokens: acceptance length and speedup", "Speedup against batch size"),
    *("Where the time goes", "What more data is worth", "Who wrote each token", "How to read this"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return sp.evaluate(
        str(assets.tiny_verifier_path()),
        ["ours"],
        methods=("ngram", EARLY_EXIT),
        batch_size=[1, 2],
        num_prompts=2,
        max_tokens=8,
        num_warmup=0,
        keep_tokens=1,
    )


@pytest.fixture(scope="module")
def page_file(report: EvaluationReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three results that differ in what they say of the training make a learning curve."""
    results = [
        replace(report, rows=tuple(row if row.is_plain else replace(row, training_rows=size) for row in report.rows))
        for size in (100, 300, 1000)
    ]
    return write_page(results, tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_section_shows_and_a_token_tells_its_probabilities(browser, report, page_file, width, scheme):
    page, wrong = opened(browser, page_file.as_uri(), width, scheme)
    expect(page.locator("h2")).to_have_text(SECTIONS)
    rows = page.locator("section").first.locator("tbody th").all_text_contents()
    assert rows == ["plain decoding", "ngram", "early_exit"] * 2
    pictures = page.get_by_role("img").all()
    assert len(pictures) >= 10 and all(picture.bounding_box()["height"] > 10 for picture in pictures)
    figures = page.locator("figure").first
    expect(figures.get_by_role("table")).to_be_hidden()
    figures.get_by_text("Figures").click()
    expect(figures.get_by_role("table")).to_be_visible()

    answer = page.locator(".answer", has_text="early_exit K=2, ours").first
    kept = next(row for row in report.rows if row.method == "early_exit").answers[0].tokens
    tokens = answer.locator(".tokens span")
    assert tokens.count() == len(kept) and {"draft", "recovered"} <= {token.origin for token in kept}
    for place, token in enumerate(kept):
        box = tokens.nth(place).bounding_box()
        assert box["width"] >= 4 and box["height"] >= 10, token.text  # a line break, too, can be pointed at
        tokens.nth(place).tap() if width == PHONE else tokens.nth(place).hover()
        told = answer.get_by_role("status")
        expect(told).to_contain_text(f"verifier {token.probability:.1%}")
        expect(told).to_contain_text(token.origin)
        if token.origin == "draft":
            expect(told).to_contain_text(f", drafter {token.draft_probability:.1%}")
        if token.origin == "recovered":
            expect(told).to_contain_text(f"{token.rejected[0]!r}, drafter {token.rejected[1]:.1%}")
    answer.locator(".tokens").press("ArrowLeft")
    expect(answer.locator(".on")).to_have_count(1)
    expect(answer.get_by_role("status")).to_contain_text(f"{kept[-2].probability:.1%}")

    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert contrasts(page) >= 4.5  # the least that WCAG 2 calls readable
    assert wrong == []
    page.close()


def contrasts(page) -> float:
    """The smallest contrast of words with what they stand on."""
    colours = page.evaluate(
        """() => [...document.querySelectorAll("h1, h2, p, th, td, li, summary, .told, .tokens *")].map((element) => {
          let below = element;
          while (below && getComputedStyle(below).backgroundColor.endsWith(", 0)")) below = below.parentElement;
          return [element, below || document.body].map((one, place) =>
            getComputedStyle(one)[place ? "backgroundColor" : "color"].match(/[0-9.]+/g).map(Number));
        })"""
    )
    return min(contrast(words, ground) for words, ground in colours if len(ground) == 3)


def contrast(first: list[float], second: list[float]) -> float:
    """Of two colours, as WCAG 2.2 defines it."""
    linear = [
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour[:3])]
        for colour in (first, second)
    ]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)
