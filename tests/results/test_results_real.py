"""The results on a real model: steps run once and within a budget, and the page tells what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import results_real
from results_real_page import Page

DRAFTER = "eagle3-1000/3"


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def report(methods, length=2.7, speedup=1.8, identical=20, counts=(4,), batch_sizes=(1,)):
    rows = [
        {
            "method": "eagle3" if "/" in method else method,
            "speculative_config": {"model": f"/elsewhere/{method}"} if "/" in method else None,
            "num_speculative_tokens": count,
            "batch_size": batch_size,
            "dataset": "gsm8k",
            "task": task,
            "acceptance_length": estimate(1.0 if method == "none" else length),
            "speedup": estimate(1.0 if method == "none" else speedup),
            "tokens_per_s": 50.0,
            "plain_tokens_per_s": 30.0,
            "num_identical": identical,
            "num_prompts": 20,
        }
        for method in methods
        for count in counts
        for batch_size in batch_sizes
        for task in (None, "translation")
    ]
    facts = {"versions": dict.fromkeys(("python", "torch", "transformers"), "1"), "uncommitted_changes": False}
    facts |= {"commit": "a" * 40, "device": "x86_64", "num_cpus": 2, "num_threads": 2}
    return {"rows": rows, "settings": {"max_tokens": 96, "dtype": "float32"}, "environment": facts}


def page_of(work, measurements):
    """A page whose measurements are {step: (methods, changed figures)}; a text instead says why it was left out."""
    state = {}
    for name, measured in measurements.items():
        if isinstance(measured, str):
            state[name] = {"command": "speculators evaluate", "left_out": measured}
            continue
        methods, changes = measured
        (work / f"{name}.json").write_text(json.dumps(report(methods, **changes)))
        command = "speculators evaluate --verifier /elsewhere/smollm2"
        state[name] = {"command": command, "time_s": 60.0, "load": 0.1, "record": {}}
    return Page(work, state).text()


@pytest.mark.parametrize(("length", "speedup", "identical", "met"), [(2.7, 1.8, 20, "yes"), (2.5, 1.5, 19, "no")])
def test_the_page_says_whether_the_aims_were_met(tmp_path, length, speedup, identical, met):
    changes = {"length": length, "speedup": speedup, "identical": identical}
    methods = ["none", "ngram", DRAFTER]
    text = page_of(tmp_path, {"measure-k": (methods, changes), "measure-speed": (methods, changes)})
    aims = text[text.index("## Aims") : text.index("## Speed")]
    assert f"eagle3-1000: {length:.2f} ({length - 0.1:.2f} to {length + 0.1:.2f}) | {met} |" in aims
    assert f": {speedup:.2f} ({speedup - 0.1:.2f} to {speedup + 0.1:.2f})x | {met} |" in aims
    assert f"| {4 * identical} of 80 | {met} |" in aims  # two methods in each of two measurements


def test_what_was_not_measured_says_why_and_has_no_figure(tmp_path):
    measured = {"measure-k": (["none", DRAFTER], {}), "measure-speed": "it takes about 9 minutes"}
    text = page_of(tmp_path, measured | {"measure-tasks": (["none", DRAFTER], {"length": 1.25})})
    assert "## Speed\n\nHeld-out questions, K = 4.\n\nnot measured: it takes about 9 minutes.\n" in text
    assert "| translation | eagle3-1000 | 1.25 (1.15 to 1.35) | 20 of 20 |" in text
    for heading in ("All drafters", "Learning curve", "The verifier's own", "The draft vocabulary", "One turn"):
        section = text[text.index(f"## {heading}") :]
        assert "not measured" in section[: section.index("\n## ", 3)]
    assert "/elsewhere" not in text  # the reader's places are others


def test_figures_of_several_k_and_batch_sizes_stand_beside_one_another(tmp_path):
    drafters = ["none", "drafters-100/mtp/2"]
    measured = {"measure-tasks": (["none", "ngram", DRAFTER], {"length": 1.25, "counts": (2, 4)})}
    text = page_of(tmp_path, measured | {"measure-drafters": (drafters, {"speedup": 1.3, "batch_sizes": (1, 8)})})
    assert "| task | method | K = 2 | K = 4 | same text |" in text
    assert "| translation | ngram | 1.25 (1.15 to 1.35) | 1.25 (1.15 to 1.35) | 40 of 40 |" in text
    assert "| drafter | acceptance length | speedup, batch 1 | speedup, batch 8 | same text |" in text
    assert "| mtp | 2.70 (2.60 to 2.80) | 1.30 (1.20 to 1.40) | 1.30 (1.20 to 1.40) | 40 of 40 |" in text
    assert "| eagle3 | not measured: the run ended before its turn |  |  |  |" in text


def test_a_step_runs_once_and_one_beyond_the_budget_is_left_out_until_it_fits(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command[3:])  # behind `python -m speculators`
        return SimpleNamespace(returncode=0, stdout='notes\n{"num_tokens": 7}\n')

    monkeypatch.setattr(results_real.subprocess, "run", run)
    assert results_real.Steps(tmp_path, 100.0).run("data", ["prepare-data"], about_s=50)
    again = results_real.Steps(tmp_path, 100.0)
    assert again.run("data", ["prepare-data"]) and commands == [["prepare-data", "--json"]]
    assert not again.run("train", ["train"], about_s=500) and "8 minutes" in again.state["train"]["left_out"]
    richer = results_real.Steps(tmp_path, 1000.0)
    assert richer.run("train", ["train"], about_s=500) and richer.state["train"]["record"] == {"num_tokens": 7}
    only = results_real.Steps(tmp_path, 0.0, only=frozenset({"data"}))
    assert only.run("data", ["prepare-data", "again"]) and not only.run("other", ["evaluate"])
    assert commands[-1] == ["prepare-data", "again", "--json"]


def test_a_measurement_that_fails_again_keeps_the_earlier_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(
        results_real.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout='{"rows": []}')
    )
    results_real.Steps(tmp_path, 100.0).run("measure-speed", ["evaluate"])
    monkeypatch.setattr(
        results_real.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2, stdout="full disk")
    )
    again = results_real.Steps(tmp_path, 100.0, only=frozenset({"measure-speed"}))
    assert not again.run("measure-speed", ["evaluate"])
    assert results_real.Steps(tmp_path, 100.0).is_done("measure-speed")


def test_the_last_hundred_prompts_are_held_out(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": str(number)}) + "\n" for number in range(250)))
    results_real.split(prompts, tmp_path)
    assert len((tmp_path / "train_prompts.jsonl").read_text().splitlines()) == 150
    assert json.loads((tmp_path / "heldout_prompts.jsonl").read_text().splitlines()[0]) == {"question": "150"}
    (tmp_path / "few").mkdir()
    prompts.write_text('{"question": "1"}\n' * 200)
    with pytest.raises(ValueError, match="more than 200"):
        results_real.split(prompts, tmp_path / "few")


def test_spec_bench_takes_turns_between_the_categories_of_a_task(tmp_path):
    rows = [{"category": name, "turns": [f"{name} {n}"]} for name in ("writing", "coding", "qa") for n in range(2)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = results_real.of_categories(tmp_path / "question.jsonl", ("coding", "writing"), tmp_path, most=3)
    taken = [json.loads(line)["turns"][0] for line in (tmp_path / name).read_text().splitlines()]
    assert taken == ["coding 0", "writing 0", "coding 1"]


def test_a_model_that_was_half_made_is_made_again(tmp_path, monkeypatch):
    def stopped(command, **_):
        if "pip" not in command:
            Path(command[-1]).mkdir(exist_ok=True)
            raise KeyboardInterrupt

    monkeypatch.setattr(results_real.subprocess, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        results_real.make_verifier(tmp_path)
    monkeypatch.setattr(results_real.subprocess, "run", lambda command, **_: None)
    assert results_real.make_verifier(tmp_path) == str(tmp_path / "smollm2")
    monkeypatch.setattr(results_real.subprocess, "run", lambda *_, **__: pytest.fail("it is made already"))
    assert results_real.make_verifier(tmp_path) == str(tmp_path / "smollm2")
