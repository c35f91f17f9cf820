"""Events as text and in trackers."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from speculators.train.config import ConfigError
from speculators.train.events import Note, Saved, Started, StepDone, Validated, line
from speculators.train.logger import TrainingProgress, make_trackers

STEP = StepDone(3, 10, 0, 0.5, {"loss": 2.0}, 1.75, 1000.0)


def test_lines_say_what_matters():
    step = "step 3/10 epoch 0 loss 2.0000 acceptance length 1.75 lr 5.00e-01 1,000 tokens/s, 0% waiting for states"
    assert line(STEP) == step
    measured = {"waiting": 0.25, "left_s": 3725.4, "peak_bytes": 17_100_000_000}
    pace = "1,000 tokens/s, 25% waiting for states, 1:02:05 left, peak 17.1 GB"
    assert line(replace(STEP, **measured)).endswith(f" {pace}")
    counted = replace(STEP, model_tflop_per_s=306.21, mfu=0.3095)
    assert line(counted).endswith(" 1,000 tokens/s, 306 model TFLOP/s (MFU 30.9%), 0% waiting for states")
    assert "0.0123 model TFLOP/s, 0%" in line(replace(STEP, model_tflop_per_s=0.01234))
    assert line(Validated(3, 0, {"loss": 2.0}, None)) == "validation after step 3: loss 2.0000"
    assert line(Saved(Path("run/0"), 3)) == "saved run/0"


def test_a_tracker_receives_metrics_of_training_and_validation(monkeypatch):
    received = []
    module = ModuleType("trackio")

    class Run:
        def log(self, values, step):
            received.append((step, values))

    module.init = lambda **options: Run()
    monkeypatch.setitem(sys.modules, "trackio", module)
    [tracker] = make_trackers("trackio", "./logs", None, {})
    measured = {"waiting": 0.25, "left_s": 60.0, "peak_bytes": 17, "model_tflop_per_s": 306.0, "mfu": 0.31}
    for event in (Note("hello"), replace(STEP, **measured), Validated(4, 0, {"loss": 1.5}, 2.0)):
        tracker(event)
    learned = {"train/loss": 2.0, "train/acceptance_length": 1.75, "train/lr": 0.5, "train/tokens_per_s": 1000.0}
    assert received == [
        (3, learned | {f"train/{name}": value for name, value in measured.items()}),
        (4, {"val/loss": 1.5, "val/acceptance_length": 2.0}),
    ]


def test_a_missing_package_or_an_unknown_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        make_trackers("mlflow", "./logs", None, {})
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        make_trackers(["trackio_", "tensorbord"][1], "./logs", None, {})
    assert make_trackers("", "./logs", None, {}) == []


def test_what_was_learned_is_whole_on_a_terminal_of_80_columns():
    told = {"loss": 20.0611, **{f"full_acc_{depth}": 0.04 for depth in range(4)}}
    bar = TrainingProgress()
    bar(Started(12, 0, 1, 1, 1))
    bar(Validated(4, 0, {**told, "decoded_acceptance_length": 1.0312}, 1.04))
    bar(replace(STEP, metrics=told, acceptance_length=1.04))
    console = Console(width=80, file=io.StringIO(), soft_wrap=True, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(bar.get_renderable(), soft_wrap=True)
    bar.stop()
    shown = captured.get().splitlines()
    assert " ".join(line.strip() for line in shown).count("decoded 1.03") == 1 and max(map(len, shown)) <= 80


def lines_of(capsys, log_every, num_steps):
    """Of a run whose output is no terminal."""
    with TrainingProgress() as progress:
        progress(Started(num_steps, 0, 1, 1, 1))
        for step in range(1, num_steps + 1):
            is_logged = log_every is not None and step % log_every == 0
            progress(replace(STEP, step=step, num_steps=num_steps, left_s=90.0, is_logged=is_logged))
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ") and ": loss" in line]


def test_a_log_has_a_line_every_so_many_steps_and_every_30_seconds(capsys, monkeypatch):
    learned, pace = "loss 2.000, expected acceptance length 1.75", "1,000 tokens/s, 0% waiting for states, 0:01:30 left"
    assert lines_of(capsys, 2, 5) == [f"step {step}/5: {learned}, {pace}" for step in (2, 4)]
    assert lines_of(capsys, None, 5) == []
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock.append(clock[-1] + 8.0) or clock[-1])
    assert 1 <= len(lines_of(capsys, None, 9)) < 9
