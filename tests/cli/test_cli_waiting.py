"""Slow steps say what they do: a spinner on a terminal, a line elsewhere, nothing where nobody listens."""

from __future__ import annotations

import threading
import time

import pytest
from transformers import AutoModelForCausalLM

from speculators.cli.app import main
from speculators.data_generation.rollout import Answer
from speculators.train.events import Started, StepDone
from speculators.train.logger import TrainingProgress
from speculators.utils import progress
from speculators.utils.progress import Waiting, WorkProgress, counting, doing, listening


@pytest.fixture
def impatient(monkeypatch):
    for name in ("FIRST_LINE_S", "NEXT_LINES_S", "SPINNER_AFTER_S", "REDRAWN_S"):
        monkeypatch.setattr(progress, name, 0.01)


def test_a_slow_step_is_a_line_every_so_often_and_silent_where_nobody_listens(impatient, capsys):
    with doing("loading m (270 MB)"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    with listening(), doing("loading m (270 MB)"):
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and set(lines) == {"loading m (270 MB) ... (0 s)"}
    assert Waiting.listener is None and threading.active_count() >= 1


def test_a_quick_step_says_nothing(capsys):
    with listening(), doing("loading m"):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_what_is_loaded_with_its_size(verifier, terminal, impatient, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **options: time.sleep(0.1) or load(*args, **options)
    )
    code, shown = terminal.run("generate", "--verifier", verifier, "--prompt", "x", "--max-tokens", "2")
    assert code == 0
    assert f"loading {verifier}"[:40] in shown and " KB)" in shown.replace("\n", "")


def test_the_answers_of_servers_are_counted_by_the_bar():
    bars = WorkProgress()
    bars("regenerate", 0, 2)
    answers = counting(lambda questions: [Answer([7] * 16), ValueError("no")], bars)
    answers([None, None])
    assert bars.num_tokens == 16 and bars.bars.tasks[0].fields["tokens"] == 16
    bars("another", 0, 2)
    assert bars.num_tokens == 0  # each bar has its own


def test_a_bar_without_a_terminal_is_a_line_every_so_often(impatient, capsys):
    bars = WorkProgress()
    time.sleep(0.02)
    bars("decode", 3, 20)
    assert "decode: 3 of 20" in capsys.readouterr().err


@pytest.mark.parametrize(("compiles", "said"), [(False, ""), (True, ": compiling the attention kernels")])
def test_the_first_step_is_a_line_until_it_is_done(impatient, capsys, compiles, said):
    with listening(), TrainingProgress() as bar:
        bar(Started(2, 0, 1, 1, 1, compiles))
        time.sleep(0.1)
        bar(StepDone(1, 2, 0, 1e-3, {}, None, 1.0))
        assert f"first step{said} ... (0 s)" in capsys.readouterr().err.splitlines()
        time.sleep(0.05)
        assert "first step" not in capsys.readouterr().err
    with pytest.raises(RuntimeError), listening(), TrainingProgress() as bar:
        bar(Started(2, 0, 1, 1, 1, compiles))
        raise RuntimeError
    capsys.readouterr()
    time.sleep(0.05)
    assert "first step" not in capsys.readouterr().err


def test_help_says_nothing_of_it(capsys):
    assert main(["generate", "--help"]) == 0
    assert capsys.readouterr().err == ""
