"""`speculators verify`: a table, a report, one JSON line; exit code 1 and the first differing round when it fails."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from speculators.api import vllm_target
from speculators.cli.app import main, run
from speculators.evaluation import parity
from speculators.evaluation.config import ParityConfig, VllmTarget
from speculators.interfaces import CaptureSpec
from speculators.model import SpeculatorModel
from speculators.utils import progress
from speculators.utils.progress import listening


@pytest.fixture(scope="session")
def checkpoint(verifier, chats, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("verify")
    run(["prepare-data", "--model", verifier, "--data", chats, "--output", str(folder / "data")])
    trained = run(
        [
            "train",
            "--verifier-name-or-path",
            verifier,
            "--data-path",
            str(folder / "data"),
            "--save-path",
            str(folder / "run"),
            "--max-steps",
            "1",
            "--total-seq-len",
            "128",
            "--target-layer-ids",
            "1",
            "3",
            "5",
        ]
    )
    assert trained["parity"]["passed"] is True
    assert trained["check"]["ok"] is True and trained["check"]["findings"] == []
    return trained["checkpoint"]


def command(checkpoint, chats, *more):
    return ["verify", checkpoint, "--prompts", chats, "--num-prompts", "3", "--max-tokens", "10", "-k", "3", *more]


def test_a_checkpoint_is_verified_and_the_report_written(checkpoint, chats, tmp_path, capsys):
    assert main(command(checkpoint, chats, "--no-vllm", "--output", str(tmp_path / "report.json"))) == 0
    printed = capsys.readouterr().out
    assert "drafts: training = engine" in printed and "pass: " in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["passed"] is True and result["num_speculative_tokens"] == 3
    assert json.loads((tmp_path / "report.json").read_text())["checks"] == result["checks"]


def test_replaying_says_what_it_does(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.001)
    monkeypatch.setattr(parity, "vllm_checks", lambda *_: time.sleep(0.1) or [])
    config = ParityConfig(checkpoint=checkpoint, max_tokens=4, vllm=VllmTarget("python", checkpoint, {}))
    with listening():
        parity.check_parity(config, [[5, 6, 7], [8, 9]])
    lines = capsys.readouterr().err.splitlines()
    assert "replaying 2 prompts in the engine ... (0 s)" in lines
    assert "replaying 2 prompts in vLLM, plainly and with drafts ... (0 s)" in lines


@pytest.mark.parametrize("verb", ["verify", "check", "serve"])
def test_a_run_is_not_taken_for_a_checkpoint(verb, checkpoint, capsys):
    assert main([verb, str(Path(checkpoint).parent)]) == 2
    assert re.search("is a training run, not a checkpoint; .*/checkpoint_best", capsys.readouterr().err)


def test_a_model_that_is_no_speculator_is_refused_without_blaming_the_program(verifier, capsys):
    assert main(["verify", verifier, "--no-vllm"]) == 2
    said = capsys.readouterr().err
    assert "has no 'speculators_model_type'" in said and "defect" not in said


def test_a_drafter_that_drafts_something_else_fails_by_exit_code(checkpoint, chats, monkeypatch, capsys):
    cls = SpeculatorModel.get_class("eagle3")
    whole = cls.make_proposer

    def other_layers(self, verifier, **sizes):
        proposer = whole(self, verifier, **sizes)
        proposer.capture = CaptureSpec(aux_layer_ids=(0, 4, 6))
        return proposer

    monkeypatch.setattr(cls, "make_proposer", other_layers)
    assert main(command(checkpoint, chats, "--no-vllm")) == 1
    printed = capsys.readouterr()
    assert "FAIL: " in printed.out and "first: prompt " in printed.err


def test_without_vllm_the_report_says_that_it_was_not_asked(checkpoint, chats, monkeypatch, capsys):
    monkeypatch.setattr("speculators.api.find_vllm", refuse)
    assert main(command(checkpoint, chats)) == 0
    assert "not checked: no vLLM here" in capsys.readouterr().out


def refuse(python):
    raise ValueError("no vLLM here")


def test_a_python_that_has_no_vllm_is_refused(checkpoint, chats, capsys):
    assert main(command(checkpoint, chats, "--vllm-python", "/bin/false")) == 2
    assert "has no vllm" in capsys.readouterr().err


def test_our_own_directory_is_what_vllm_gets_where_it_reads_it(checkpoint, verifier, tmp_path, monkeypatch):
    class Here:
        python = "/env/bin/python"
        version = "0.33.0"

    monkeypatch.setattr("speculators.api.find_vllm", lambda python: Here)
    target = vllm_target(checkpoint, None, None, tmp_path)
    assert (target.python, target.model) == ("/env/bin/python", verifier)
    assert target.speculative_config == {"method": "eagle3", "model": checkpoint, "num_speculative_tokens": 3}
    assert list(tmp_path.iterdir()) == []
