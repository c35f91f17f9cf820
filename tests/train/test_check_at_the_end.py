"""A run ends with the contract check: in its result, in what it prints and in its exit code; it can be switched off."""

from __future__ import annotations

import shutil

import pytest

from speculators.train import events
from speculators.train.__main__ import main
from speculators.train.config import TrainConfig
from speculators.train.events import Event, Saved
from speculators.train.run import train


@pytest.fixture
def settings(tmp_path, verifier_path, data_path):
    shutil.copytree(data_path, tmp_path / "data")
    return {
        "speculator_type": "eagle3",
        "verifier_name_or_path": str(verifier_path),
        "data_path": str(tmp_path / "data"),
        "save_path": str(tmp_path / "run"),
        "total_seq_len": 64,
        "epochs": 1,
        "max_steps": 1,
        "target_layer_ids": [1, 3, 5],
        "draft_arch": "llama",
        "parity_gate": False,
    }


def leave_stray_weights(event: Event) -> None:
    """What vLLM would load over the trained weights."""
    if isinstance(event, Saved):
        shutil.copy(event.path / "model.safetensors", event.path / "more.safetensors")


def test_every_run_is_checked(settings):
    result = train(TrainConfig.from_flat(settings))
    assert result.check.ok and not result.check.findings
    assert {"tensors", "fits the verifier", "as it was trained"} <= set(result.check.done)


def test_the_check_can_be_switched_off(settings):
    assert train(TrainConfig.from_flat({**settings, "contract_check": False})).check is None


def test_what_vllm_would_not_serve_as_trained_is_found(settings):
    result = train(TrainConfig.from_flat(settings), on_event=leave_stray_weights)
    assert [found.code for found in result.check.errors] == ["stray-weights"]
    assert result.checkpoint.is_dir()


def test_errors_are_printed_with_their_fixes_and_end_in_exit_code_1(settings, monkeypatch, capsys):
    monkeypatch.setattr(events, "print_event", leave_stray_weights)
    flags = [
        [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        for key, value in settings.items()
        if key != "parity_gate"
    ]
    assert main([*(word for flag in flags for word in flag), "--no-parity-gate"]) == 1
    said = capsys.readouterr().err
    assert "error stray-weights: more.safetensors" in said and "move the file away" in said
    assert "contract check: 1 error: do not serve it" in said
