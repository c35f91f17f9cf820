"""Events as text and in trackers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from speculators.train.config import ConfigError
from speculators.train.events import Note, Saved, StepDone, Validated, line
from speculators.train.logger import make_trackers

STEP = StepDone(3, 10, 0, 0.5, {"loss": 2.0}, 1.75, 1000.0)


def test_lines_say_what_matters():
    assert line(STEP) == "step 3/10 epoch 0 loss 2.0000 acceptance length 1.75 lr 5.00e-01 1,000 tokens/s"
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
    for event in (Note("hello"), STEP, Validated(4, 0, {"loss": 1.5}, 2.0)):
        tracker(event)
    assert received == [
        (3, {"train/loss": 2.0, "train/acceptance_length": 1.75, "train/lr": 0.5, "train/tokens_per_s": 1000.0}),
        (4, {"val/loss": 1.5, "val/acceptance_length": 2.0}),
    ]


def test_a_missing_package_or_an_unknown_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        make_trackers("mlflow", "./logs", None, {})
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        make_trackers(["trackio_", "tensorbord"][1], "./logs", None, {})
    assert make_trackers("", "./logs", None, {}) == []
