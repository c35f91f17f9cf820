"""A run ends with the parity gate: on its own data, written beside the checkpoint, and it can be switched off."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from speculators.interfaces import CaptureSpec
from speculators.model import SpeculatorModel
from speculators.train.__main__ import main
from speculators.train.config import TrainConfig
from speculators.train.events import Note
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
        "max_steps": 2,
        "target_layer_ids": [1, 3, 5],
        "draft_arch": "llama",
    }


def run(settings, on_event=lambda event: None, **changes):
    return train(TrainConfig.from_flat({**settings, **changes}), on_event=on_event)


def test_every_run_is_verified_and_says_so_beside_the_checkpoint(settings):
    result = run(settings)
    assert result.parity.passed
    written = json.loads((result.checkpoint / "parity.json").read_text())
    assert written["passed"] is True and written["num_prompts"] == 4
    assert {check["name"]: check["passed"] for check in written["checks"]}["drafts: training = engine"] is True


def test_the_gate_can_be_switched_off(settings):
    result = run(settings, parity_gate=False)
    assert result.parity is None and not (result.checkpoint / "parity.json").exists()


def test_a_drafter_that_drafts_something_else_fails_the_run_but_keeps_the_checkpoint(settings, monkeypatch, capsys):
    cls = SpeculatorModel.get_class("eagle3")
    whole = cls.make_proposer

    def other_layers(self, verifier, **sizes):
        proposer = whole(self, verifier, **sizes)
        proposer.capture = CaptureSpec(aux_layer_ids=(2, 4, 6))
        return proposer

    monkeypatch.setattr(cls, "make_proposer", other_layers)
    flags = [
        [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        for key, value in settings.items()
    ]
    assert main([word for flag in flags for word in flag]) == 1
    said = capsys.readouterr()
    assert "error: the parity gate failed: drafts: training = engine: " in said.err
    assert re.search(r"first: prompt \d, round \d+ \(after \d+ tokens\), draft \d: drafted", said.err)
    assert said.out.strip().endswith("run/0")


def test_an_algorithm_that_cannot_draft_is_not_compared(settings, monkeypatch):
    cls = SpeculatorModel.get_class("eagle3")
    monkeypatch.setattr(cls, "make_proposer", SpeculatorModel.make_proposer)
    result = run(settings)
    assert result.parity.passed and [check.passed for check in result.parity.checks] == [None, None]
    assert "make_proposer" in result.parity.checks[1].detail


def test_a_run_on_stored_states_needs_no_verifier_and_makes_no_gate(settings, tmp_path):
    run(settings, max_steps=None, cache_hidden_states=True, parity_gate=False)
    events = []
    stored = run(settings, events.append, save_path=str(tmp_path / "b"), on_missing="raise")
    assert stored.parity is None
    assert any("speculators verify" in event.text for event in events if isinstance(event, Note))


# -- asked again -------------------------------------------------------------------------------------------------------


def fail(*args, **kwargs):
    raise AssertionError("a finished run loads no verifier and repeats no check")


def test_a_finished_run_that_was_verified_says_so_without_loading_the_verifier(settings, monkeypatch, tmp_path):
    first = run(settings)
    assert json.loads((first.checkpoint / "check.json").read_text())["ok"] is True
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("load_verifier", "check_checkpoint", "run_gate"):
        monkeypatch.setattr(f"speculators.train.run.{name}", fail)
    events = []
    again = run(settings, events.append)
    assert again.finished_before and again.checkpoint == first.checkpoint and again.parity is again.check is None
    assert "finished (2 of 2 steps); nothing to do" in [event.text for event in events if isinstance(event, Note)]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("lacking", ["check.json", "parity.json", "passed"])
def test_a_run_that_ended_before_its_checks_makes_them_when_asked_again(settings, lacking):
    """Killed after its last step; or the gate failed, and what made it fail may be mended."""
    checkpoint = run(settings).checkpoint
    if lacking == "passed":
        (checkpoint / "parity.json").write_text('{"passed": false}')
    else:
        (checkpoint / lacking).unlink()
    again = run(settings)
    assert again.finished_before and again.check.ok and again.parity.passed
    assert json.loads((checkpoint / "parity.json").read_text())["passed"] is True
    assert json.loads((checkpoint / "check.json").read_text())["ok"] is True


def test_of_a_finished_run_only_what_is_asked_for_is_made(settings):
    run(settings, parity_gate=False)
    again = run(settings, parity_gate=False)
    assert again.finished_before and again.check is None
    assert run(settings).parity.passed


def test_files_that_a_killed_run_left_half_stored_are_removed_with_a_line(settings, tmp_path):
    states = tmp_path / "data" / "hidden_states"
    run(settings, cache_hidden_states=True, parity_gate=False)
    whole = {path.name for path in states.iterdir()}
    (states / ".hs_39.safetensors.partial").write_bytes(b"half")
    (states / ".hs_7.safetensors.abcdefgh").write_bytes(b"half")
    (states / ".notes.partial").write_bytes(b"of somebody else")
    events = []
    run(settings, events.append, save_path=str(tmp_path / "b"), parity_gate=False)  # reads only, and removes nothing
    assert len(list(states.iterdir())) == len(whole) + 3 and "hs_39" not in str(events)
    run(settings, events.append, save_path=str(tmp_path / "c"), cache_hidden_states=True, parity_gate=False)
    assert {path.name for path in states.iterdir()} == whole | {".notes.partial"}
    lines = [event.text for event in events if isinstance(event, Note) and event.text.startswith("removed")]
    assert [re.sub(r"/\S*/", "", line) for line in lines] == [
        "removed .hs_39.safetensors.partial: its process died while it wrote hs_39.safetensors",
        "removed .hs_7.safetensors.abcdefgh: its process died while it wrote hs_7.safetensors",
    ]
