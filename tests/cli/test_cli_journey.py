"""prepare-data, train, generate and evaluate through the command line, on a verifier of a few thousand parameters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speculators.cli.app import main

SHAPE = ["--target-layer-ids", "1", "3", "5", "--total-seq-len", "128"]


def result_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    code = main(list(args))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out.splitlines()[-1])


@pytest.fixture(scope="module")
def data(verifier, chats, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("prepared") / "data")
    assert main(["prepare-data", "--model", verifier, "--data", chats, "--output", path]) == 0
    return path


def train_args(verifier: str, data: str, save_path: Path, *more: str) -> list[str]:
    return [
        "train",
        "--verifier-name-or-path",
        verifier,
        "--data-path",
        data,
        "--save-path",
        str(save_path),
        *SHAPE,
        *more,
    ]


@pytest.fixture(scope="module")
def checkpoint(verifier, data, tmp_path_factory) -> str:
    save_path = tmp_path_factory.mktemp("run")
    assert main(train_args(verifier, data, save_path, "--epochs", "1")) == 0
    return str(save_path / "checkpoint_best")


def test_train_says_where_the_checkpoint_is(verifier, data, tmp_path, capsys):
    result = result_of(capsys, *train_args(verifier, data, tmp_path, "--epochs", "2"))
    assert Path(result["checkpoint"]).joinpath("config.json").is_file()
    assert result["speculator_type"] == "eagle3"
    assert result["num_steps"] > 0
    assert result["model_tflop_per_s"] > 0 and result["mfu"] is None


def test_generate_with_a_speculator_gives_the_tokens_of_plain_decoding(verifier, checkpoint, capsys):
    common = ["generate", "--verifier", verifier, "--prompt", "say 3", "--prompt", "say more", "--max-tokens", "24"]
    plain = result_of(capsys, *common)
    speculative = result_of(capsys, *common, "--method", checkpoint, "-k", "3")
    assert speculative["method"] == "eagle3"
    for before, after in zip(plain["outputs"], speculative["outputs"], strict=True):
        assert after["token_ids"] == before["token_ids"]
        assert after["num_drafted"] > 0 == before["num_drafted"]


def test_evaluate_compares_methods_and_writes_the_report(verifier, chats, checkpoint, tmp_path, capsys):
    report = tmp_path / "report.json"
    result = result_of(
        capsys,
        "evaluate",
        "--verifier",
        verifier,
        "--data",
        chats,
        "--method",
        "none",
        "--method",
        "ngram",
        "--method",
        checkpoint,
        "-k",
        "3",
        "--num-prompts",
        "4",
        "--max-tokens",
        "16",
        "--lossless",
        "--output",
        str(report),
    )
    assert [row["method"] for row in result["rows"]] == ["none", "ngram", "eagle3"]
    assert result["lossless"] is True
    for row in result["rows"]:
        assert row["num_identical"] == row["num_prompts"] == 4
        assert 1 <= row["acceptance_length"]["value"] <= 4
    assert json.loads(report.read_text())["rows"] == result["rows"]


def test_regenerated_responses_can_be_prepared(verifier, chats, tmp_path, capsys):
    responses = str(tmp_path / "responses.jsonl")
    made = result_of(
        capsys,
        "regenerate-responses",
        "--model",
        verifier,
        "--data",
        chats,
        "--output",
        responses,
        "--max-tokens",
        "8",
        "--limit",
        "5",
    )
    assert (made["num_rows"], made["num_failed"]) == (5, 0)
    row = json.loads(Path(responses).read_text().splitlines()[0])
    assert sum(row["loss_mask"]) <= 8
    prepared = result_of(
        capsys, "prepare-data", "--model", verifier, "--data", responses, "--output", str(tmp_path / "d")
    )
    assert prepared["num_rows"] == 5


def test_dump_config_shows_what_flags_and_yaml_make_together(verifier, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer:\n  lr: 0.002\ntrainer:\n  epochs: 7\n")
    args = ["train", "--verifier-name-or-path", verifier, "--config", str(recipe), "--epochs", "3", "--dump-config"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "epochs: 3" in printed and "lr: 0.002" in printed


def test_an_unknown_key_names_the_nearest(verifier, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer:\n  epoch: 7\n")
    assert main(["train", "--verifier-name-or-path", verifier, "--config", str(recipe)]) == 2
    assert "epochs" in capsys.readouterr().err


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    code = main(list(args))
    captured = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


def test_training_without_a_verifier_there_writes_nothing(data, tmp_path, capsys):
    message = error_of(capsys, *train_args(str(tmp_path / "nowhere"), data, tmp_path / "run"))
    assert "nowhere" in message
    assert not (tmp_path / "run").exists()


def test_training_without_prepared_data_says_how_to_make_it(verifier, tmp_path, capsys):
    message = error_of(capsys, *train_args(verifier, str(tmp_path / "no-data"), tmp_path / "run"))
    assert "prepare-data" in message


def test_a_drafter_for_another_hidden_size_is_refused(checkpoint, wide_verifier, capsys):
    message = error_of(capsys, "generate", "--verifier", wide_verifier, "--prompt", "x", "--method", checkpoint)
    assert "64" in message and "32" in message


def test_a_cut_off_checkpoint_is_named(verifier, checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    message = error_of(capsys, "generate", "--verifier", verifier, "--prompt", "x", "--method", str(broken))
    assert "broken" in message


def test_lossless_fails_for_answers_that_differ(verifier, chats, checkpoint, capsys, monkeypatch):
    """The check itself can fail: a rule that keeps every draft gives other tokens."""
    from speculators.decoding import round as decoding_round
    from speculators.interfaces import Verification

    def keep_everything(proposal, best_BK1):
        B, K = proposal.token_ids_BK.shape
        path_BK = torch.arange(K).expand(B, K).masked_fill(proposal.token_ids_BK < 0, -1)
        num_accepted_B = (path_BK >= 0).sum(1)
        last = best_BK1[torch.arange(B), num_accepted_B]
        return Verification(path_BK=path_BK, num_accepted_B=num_accepted_B, next_token_B=last)

    monkeypatch.setattr(decoding_round.GreedyRule, "follow", keep_everything)
    args = ["evaluate", "--verifier", verifier, "--data", chats, "--method", checkpoint, "-k", "2", "--lossless"]
    assert main([*args, "--num-prompts", "2", "--max-tokens", "12", "--num-warmup", "0"]) == 1
    assert "not lossless" in capsys.readouterr().err


def test_ctrl_c_in_training_saves_and_ends_with_130(verifier, data, tmp_path):
    command = [sys.executable, "-m", "speculators", *train_args(verifier, data, tmp_path, "--epochs", "100000")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "saved" in line:  # the first epoch is over
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert "same command" in rest
    assert list(tmp_path.glob("*/config.json"))
    assert not list(tmp_path.glob("**/*.tmp*"))
