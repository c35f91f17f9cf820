"""The results script: what is kept, what is made again, and the table it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import results
from results_table import BEGIN, END, Trained, results_table, write_between_markers

from speculators.evaluation import Estimate, EvaluationReport, MethodRow


def row(method, **changes):
    values = {
        "method": method,
        "num_speculative_tokens": 4,
        "temperature": 0.0,
        "num_prompts": 50,
        "num_tokens": 900,
        "acceptance_length": Estimate(2.5, 2.4, 2.625),
        "acceptance_rate": 0.4,
        "conditional_acceptance": (0.7, 0.8),
        "tokens_per_s": 321.4,
        "plain_tokens_per_s": 200.0,
        "speedup": Estimate(1.6, 1.5, 1.7),
        "speedup_per_token": 0.64,
        "num_identical": 50,
        "draft_share": 0.2,
        "draft_cost": 0.5,
        "verify_cost": 1.1,
    }
    return MethodRow(**{**values, **changes})


def test_the_table_is_sorted_by_acceptance_length_and_says_what_was_trained():
    rows = (row("none"), row("ngram", acceptance_length=Estimate(1.2, 1.1, 1.3)), row("toy"))
    trained = {"toy": Trained("run", 1_250_000, 61.4, False, "")}
    lines = results_table(EvaluationReport("v", "d", rows), trained).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["plain decoding", "toy", "ngram"]
    assert {line.count("|") for line in lines} == {12}
    # 0.5 steps of drafting over 4 drafts
    assert lines[3] == (
        "| toy | 4 | 2.50 (2.40 to 2.62) | 321 | 1.60 (1.50 to 1.70) | 0.64 | 0.50 | 0.12 | 1.25 M | 61 s | 50 of 50 |"
    )


def test_a_time_that_leaves_something_out_says_so():
    resumed = {"toy": Trained("run", 1, 61.4, True, "")}
    assert "| more than 61 s |" in results_table(EvaluationReport("v", "d", (row("toy"),)), resumed)


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    path = tmp_path / "results.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(path, "new")
    assert path.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    path.write_text("no markers\n")
    with pytest.raises(ValueError, match="once each"):
        write_between_markers(path, "new")
    assert path.read_text() == "no markers\n"


@pytest.fixture
def calls(monkeypatch):
    """Command lines that were run in place of the verbs."""
    made: list[list[str]] = []

    def run(command):
        made.append(command)
        if "fails" in command:
            raise RuntimeError("no")
        return {"n": len(made)}

    monkeypatch.setattr(results, "run_verb", run)
    return made


def test_a_finished_step_is_kept_and_one_made_otherwise_is_made_again(tmp_path, calls):
    step = results.Step("toy", ("--a", "1"), tmp_path / "toy", inputs="x")
    assert step.run()["result"] == step.run()["result"] == {"n": 1}
    assert len(calls) == 1
    (tmp_path / "toy" / "left-over").touch()
    again = results.Step("toy", ("--a", "1"), tmp_path / "toy", inputs="y").run()
    assert again["result"] == {"n": 2} and again["num_starts"] == 1
    assert not (tmp_path / "toy" / "left-over").exists()


def test_an_interrupted_step_goes_on_where_it_stopped(tmp_path, calls):
    step = results.Step("toy", ("fails",), tmp_path / "toy")
    with pytest.raises(RuntimeError):
        step.run(resume=["--resume"])
    (tmp_path / "toy" / "half").touch()
    with pytest.raises(RuntimeError):
        step.run(resume=["--resume"])
    assert calls == [["toy", "fails"], ["toy", "fails", "--resume"]]
    assert (tmp_path / "toy" / "half").exists()
    assert json.loads((tmp_path / "toy" / results.STAMP).read_text())["num_starts"] == 2


def test_a_directory_of_someone_else_is_left_alone(tmp_path, calls):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="not made by this script"):
        results.Step("toy", (), tmp_path).run()
    assert (tmp_path / "mine").exists() and not calls


def test_a_drafter_that_fails_does_not_cost_the_others_their_row(tmp_path, monkeypatch):
    def train(name, *_):
        if name == "broken":
            raise ValueError("bad shape")
        return Trained(name, 1, 1.0, False, "")

    monkeypatch.setattr(results, "train", train)
    trained, failed = results.train_all(["broken", "toy"], tmp_path, None, 1)
    assert list(trained) == ["toy"] and failed == {"broken": "ValueError: bad shape"}
