"""A built-in drafter through the whole of `train()`: it learns, in both precisions, and resumes to the same bits."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from speculators.train.config import TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.events import StepDone
from speculators.train.graceful_shutdown import TrainingInterrupted
from speculators.train.run import build, train


def config(verifier_path, data_path, save_path, **changes) -> TrainConfig:
    settings = {
        "speculator_type": "eagle3",
        "verifier_name_or_path": str(verifier_path),
        "data_path": str(data_path),
        "save_path": str(save_path),
        "total_seq_len": 128,
        "target_layer_ids": [1, 3, 5],
        "epochs": 2,
        "lr": 0.01,
        "draft_vocab_size": 32,
        "train_data_ratio": 1.0,
        "ttt_steps": 2,
    }
    return TrainConfig.from_flat({**settings, **changes})


@pytest.fixture
def data(tmp_path, data_path):
    import shutil

    shutil.copytree(data_path, tmp_path / "data")
    torch.save({token: 64 - token for token in range(64)}, tmp_path / "data" / "token_freq.pt")
    return tmp_path / "data"


def test_it_learns_what_a_confident_verifier_says(tmp_path, verifier_path, data):
    losses = []

    def listen(event):
        if isinstance(event, StepDone):
            losses.append(event.metrics["loss"])

    result = train(config(verifier_path, data, tmp_path / "run", epochs=25), on_event=listen)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert result.acceptance_length is not None and 1.0 <= result.acceptance_length <= 3.0


def test_bf16_training_measures_the_loss_of_fp32(tmp_path, verifier_path, data):
    losses = []
    for dtype in ("float32", "bfloat16"):
        settings = {"hidden_states_dtype": dtype, "total_seq_len": 512, "dry_run": True}
        trainer = build(config(verifier_path, data, tmp_path / dtype, **settings), Ranks(), lambda event: None).trainer
        batch = next(trainer.train_loader.batches())
        losses.append(trainer.forward(trainer.model, batch, trainer.config.train_call_kwargs)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_and_continued_it_ends_with_the_same_bits(tmp_path, verifier_path, data, dtype):
    train(config(verifier_path, data, tmp_path / "whole", hidden_states_dtype=dtype))

    def stop(event):
        if isinstance(event, StepDone) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    run = config(verifier_path, data, tmp_path / "parts", hidden_states_dtype=dtype)
    with pytest.raises(TrainingInterrupted):
        train(run, on_event=stop)
    train(run)
    left, right = (load_file(tmp_path / name / "1" / "master_weights.fp32") for name in ("whole", "parts"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
