"""The command line of benchmarks/train_step.py: each route runs in a worker, which is given the options anew."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from speculators.interfaces import CaptureSpec

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
SHAPE = ["--length", "256", "--vocab", "512", "--hidden", "64", "--head-dim", "16", "--anchors", "24"]


def test_a_worker_understands_the_options_that_it_is_started_with(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    train_step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_step)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SHAPE, "--dtype", "float32", "--kv-heads", "2"])
    options = train_step.arguments()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *train_step.command_words(options), "--one", "mtp", "fast"])
    worker = vars(train_step.arguments())
    assert worker == vars(options) | {"one": ["mtp", "fast"]}
    batch = train_step.packed_row(options, SimpleNamespace(target_layer_ids=[1], capture=CaptureSpec((1,))))
    assert batch["hidden_states"].dtype == torch.float32  # without autocast a product of two dtypes fails
