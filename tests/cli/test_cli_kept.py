"""Ctrl-C loses no work: what is kept and how to go on is said, and the loss curve has each step once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.cli.app import main
from speculators.decoding import Engine
from speculators.train.events import Started, StepDone, Validated
from speculators.train.logger import CurveFile


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ctrl-C in the given call of the engine."""
    whole, num_calls = Engine.generate, 0

    def generate(self, *args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", generate)


def test_an_evaluation_that_is_stopped_reports_what_it_measured(verifier, chats, tmp_path, capsys, monkeypatch):
    stop_at(monkeypatch, 8)  # 2 methods: warm-up 1..2, then 2 calls per prompt
    report = tmp_path / "report.json"
    args = ["evaluate", "--verifier", verifier, "--data", chats, "--method", "ngram", "--num-warmup", "1"]
    assert main([*args, "--num-prompts", "5", "--max-tokens", "6", "--output", str(report)]) == 130
    printed = capsys.readouterr()
    assert [row["num_prompts"] for row in json.loads(printed.out.splitlines()[-1])["rows"]] == [2, 2]
    assert json.loads(report.read_text())["interrupted"] == "stopped after 2 of 5 prompts"
    assert "stopped after 2 of 5 prompts" in printed.err and "same command" in printed.err


def test_a_regeneration_that_is_stopped_goes_on_with_resume(verifier, chats, tmp_path, capsys, monkeypatch):
    output = tmp_path / "answers.jsonl"
    args = ["regenerate-responses", "--verifier", verifier, "--data", chats, "--output", str(output)]
    args += ["--max-tokens", "4", "--batch-size", "4"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(args) == 130
    message = " ".join(capsys.readouterr().err.split())
    assert "8 answered conversations are kept in" in message and "same command with --resume" in message
    assert main([*args, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_already_done"] == 8


def test_a_quickstart_that_is_stopped_goes_on(toy_assets, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"

    def stop(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("speculators.api.evaluate", stop)
        assert main(["quickstart", "--output", str(output)]) == 130
    assert "stopped in step 4" in capsys.readouterr().err
    weights = next(output.glob("eagle3/*/model.safetensors"))
    written_ns = weights.stat().st_mtime_ns
    assert main(["quickstart", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "going on with the build" in printed.err.replace("\n", " ")
    assert weights.stat().st_mtime_ns == written_ns  # nothing was trained again
    assert json.loads(printed.out.splitlines()[-1])["evaluation"]["lossless"] is True


def step(number: int, loss: float) -> StepDone:
    return StepDone(number, 6, 0, 0.1, {"loss": loss}, None, 10.0)


def test_the_loss_curve_has_each_step_once_after_a_continued_run(tmp_path):
    curve = CurveFile(tmp_path)
    for event in (Started(6, 0, 1, 1, 1), step(1, 3.0), step(2, 2.0), Validated(2, 0, {"loss": 2.5}, 1.5)):
        curve(event)
    curve(step(3, float("nan")))
    with curve.path.open("a") as file:
        file.write('{"step": 4, "ep')  # killed while it wrote
    curve = CurveFile(tmp_path)
    for event in (Started(6, 2, 1, 1, 1), step(3, 1.0)):
        curve(event)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"], line["loss"]) for line in lines] == [
        (1, "train", 3.0),
        (2, "train", 2.0),
        (2, "val", 2.5),
        (3, "train", 1.0),
    ]
    assert lines[2]["acceptance_length"] == 1.5 and lines[0]["lr"] == 0.1


def test_a_training_run_leaves_its_curve(verifier, chats, tmp_path):
    data, run = str(tmp_path / "data"), tmp_path / "run"
    assert main(["prepare-data", "--verifier", verifier, "--data", chats, "--output", data]) == 0
    args = ["train", "--verifier", verifier, "--data", data, "--output", str(run), "--total-seq-len", "128"]
    args += ["--target-layer-ids", "1", "3", "5", "--no-parity-gate", "--no-contract-check", "--log-freq", "1"]
    for epochs in ("1", "2"):
        assert main([*args, "--epochs", epochs, "--allow-changed-settings"]) == 0
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4
    assert [line["epoch"] for line in lines if line["split"] == "val"] == [0, 1]
