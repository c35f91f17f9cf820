"""The documentation: the site builds without a warning, and every command in it is one that exists.

`python scripts/run_docs.py` runs the commands too (minutes).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from speculators.cli import app
from speculators.train.drafters import resolve_all

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from run_docs import Command, commands_of, pages, why_skipped  # noqa: E402


def read(command: Command) -> None:
    """Parses the flags of a command, and runs nothing. Raises where the command line would."""
    words = [word for word in command.flags if not re.fullmatch(r"\[?--python|PATH\]", word)]
    verb = command.verb
    assert verb is not None
    if verb == "train":
        resolve_all([*words, *([] if "--data" in words else ["--data", "data"])])
    elif verb not in ("--version", "--install-completion") and not app.asks_for_help(words):
        words, _ = app.split_common(words[: words.index("--")] if "--" in words else words)  # behind it: vLLM's own
        app.shown_command_of(verb, words, all_names=True).make_context(verb, list(words))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    silent = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=silent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    interface = (tmp_path / "site" / "api.html").read_text()
    assert "acceptance, speed, losslessness" in interface  # the docstring of `evaluate`
    fetched = re.findall(r'(?:src|<link rel="(?!canonical)[^>]*href)="(?:https?:)?//[^"]*', interface)
    assert not fetched, "a page asks nobody else for anything"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_flags(page):
    for command in commands_of(page):
        if command.verb is not None and why_skipped(command) != "runs in tests/conformance/test_ninth_algorithm.py":
            read(command)


def test_the_guides_have_commands():
    assert sum(command.verb is not None for page in pages() for command in commands_of(page)) > 50


@pytest.mark.parametrize("text", ["speculators check run --no-such-flag", "speculators train --verifier M --lrr 1e-3"])
def test_a_command_that_does_not_exist_is_seen(text):
    with pytest.raises((ValueError, app.UsageError)):
        read(Command("", text))


def cells_by_name(page: str, columns: tuple[int, ...]) -> dict[str, list[str]]:
    """Method -> the numbers in these columns, of a page's tables; intervals left out."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / page).read_text().splitlines() if "|" in line]
    rows = [[cell.split(" (")[0].strip() for cell in line] for line in lines if len(line) > max(columns)]
    return {row[0].split(",")[0]: [row[column] for column in columns] for row in rows}


def test_the_figures_for_choosing_are_those_of_the_results():
    chosen, measured = cells_by_name("choosing.md", (1, 2, 3)), cells_by_name("results.md", (2, 4, 6))
    named = [name for name in chosen if name in measured]
    assert len(named) == 10
    assert {name: chosen[name] for name in named} == {name: measured[name] for name in named}


def test_the_figures_of_the_real_model_are_those_of_its_page():
    measured = (ROOT / "docs" / "results-smollm2.md").read_text()
    chosen = (ROOT / "docs" / "choosing.md").read_text()
    amounts = re.findall(r"([\d,]+)(?: conversations)? give\s+(\d\.\d\d)", chosen)
    assert [number for number, _ in amounts] == ["100", "300", "1,000", "2,900"]
    for number, length in amounts:
        assert re.search(rf"^\| {number} \|.*\| {length} \(", measured, re.MULTILINE), number
    drafters = re.findall(r"(\w+)\s\((\d\.\d\d)(x?)\)", chosen[chosen.index("On [a real chat model]") :])
    assert len(drafters) == 7
    for name, value, times in drafters:
        before = r"[^|]*\|" if times else ""  # a speedup stands behind the acceptance length
        assert re.search(rf"^\| {name} \|{before} {value} \(", measured, re.MULTILINE), (name, value)
