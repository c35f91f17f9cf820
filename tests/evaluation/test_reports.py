"""Every report prints as its tables: by `print`, in a notebook, and (with rich) on a terminal."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from row_toys import ROW

from speculators.checkpoint.findings import error
from speculators.convert import ConvertedCheckpoint
from speculators.data_generation.prepared import PreparedData
from speculators.data_generation.regenerate import RegenerationReport
from speculators.deploy.engine import choose_engine
from speculators.deploy.export import Exported
from speculators.deploy.report import CheckError, CheckReport
from speculators.evaluation.parity import ParityError, ParityReport
from speculators.evaluation.parity_checks import Check
from speculators.evaluation.report import EvaluationReport, NotLosslessError
from speculators.train.records import TrainResult

WRONG = error(
    "key-missing", "block_size", "not in config.json", "without it vLLM guesses", "write [8] into config.json"
)
CHECKED = CheckReport(
    Path("run"), choose_engine("vllm-0.33"), "speculators", "dflash", "org/verifier", [WRONG], ["config.json"]
)
PARITY = ParityReport("run", "org/verifier", 2, 16, 4, 1.5, (Check("drafts", False, "3 of 9 drafts differ"),), 0.1)
REPORTS = {
    "prepared": (PreparedData(Path("data"), None, reused=True), ["Prepared", "data", "made from the same recipe"]),
    "regenerated": (
        RegenerationReport(Path("a.jsonl"), Path("a.errors.jsonl"), num_rows=1200, dropped=Counter({"no user": 2})),
        ["Regenerated", "1,200 of 0 tokens", "2 x no user"],
    ),
    "trained": (
        TrainResult(Path("run"), {"loss": 1.25, "full_acc_0": 0.5}, 1.5, 7, PARITY, CHECKED),
        ["Trained", "loss 1.250, accuracy 0.50, expected acceptance length 1.50", "3 of 9 drafts differ", "block_size"],
    ),
    "evaluated": (EvaluationReport("v", "heldout", (ROW,)), ["20 prompts of heldout, greedy", "2.50 ±0.50", "19/20"]),
    "parity": (PARITY, ["Parity of 2 prompts x 16 tokens, K = 4,", "FAIL: 3 of 9 drafts"]),
    "checked": (CHECKED, ["block_size", "write [8] into config.json", "1 error: do not serve it", "org/verifier"]),
    "exported": (
        Exported(Path("out"), "dflash", "speculators", choose_engine("vllm-0.33"), None, ("a note",)),
        ["exported", "not by vllm-0.33", "a note"],
    ),
    "converted": (ConvertedCheckpoint(Path("out"), "eagle3", "eagle3-vllm"), ["converted", "speculators check out"]),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_says_what_it_holds_in_every_place_it_is_shown(name):
    report, said = REPORTS[name]
    printed = str(report)
    console = Console(width=120, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(report)
    html = report._repr_html_()
    for words in said:
        assert words in printed
        assert words in captured.get()
        assert words.replace("'", "&#x27;") in html
    assert html.startswith("<pre")


def test_what_was_written_is_a_path_where_one_is_asked_for():
    paths = {name: os.fspath(report) for name, (report, _) in REPORTS.items() if isinstance(report, os.PathLike)}
    assert paths == {
        "prepared": "data",
        "regenerated": "a.jsonl",
        "trained": "run",
        "exported": "out",
        "converted": "out",
    }


def test_what_failed_is_raised_when_asked():
    with pytest.raises(CheckError, match="block_size"):
        CHECKED.raise_for_errors()
    with pytest.raises(ParityError, match="3 of 9"):
        PARITY.raise_for_errors()
    with pytest.raises(NotLosslessError, match="19 of 20"):
        EvaluationReport("v", "heldout", (ROW,), {"dtype": "float32"}).raise_for_errors()
    with pytest.raises(ParityError):
        TrainResult(Path("run"), {}, None, 7, PARITY, CHECKED).raise_for_errors()
    with pytest.raises(CheckError):
        TrainResult(Path("run"), {}, None, 7, None, CHECKED).raise_for_errors()
    TrainResult(Path("run"), {}, None, 7).raise_for_errors()
