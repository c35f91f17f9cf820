"""A verifier whose scores are no numbers passes no verb: exit code 1, and the reason is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators.api import regenerate
from speculators.cli.app import main, run
from speculators.decoding import Engine
from speculators.decoding.request import NonFiniteScoresError


def damage(directory: str | Path, tensor: str, row: int | None = None, value: float = float("nan")) -> None:
    path = Path(directory) / "model.safetensors"
    tensors = load_file(path)
    tensors[tensor][slice(None) if row is None else row] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def broken(verifier, tmp_path) -> str:
    shutil.copytree(verifier, tmp_path / "broken")
    damage(tmp_path / "broken", "model.layers.3.mlp.down_proj.weight", 0)
    return str(tmp_path / "broken")


@pytest.fixture(scope="module")
def checkpoint(verifier, chats, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("drafter")
    run(["prepare-data", "--model", verifier, "--data", chats, "--output", str(folder / "data")])
    trained = run(
        f"train --verifier-name-or-path {verifier} --data-path {folder / 'data'} --save-path {folder / 'run'} "
        "--max-steps 1 --total-seq-len 128 --target-layer-ids 1 3 5 --no-parity-gate".split()
    )
    return trained["checkpoint"]


def test_generate_prints_what_there_is_and_fails(broken, capsys):
    assert main(["generate", "--verifier", broken, "--prompt", "hi", "--max-tokens", "4"]) == 1
    printed = capsys.readouterr()
    output = json.loads(printed.out.splitlines()[-1])["outputs"][0]
    assert output["finish_reason"] == "error" and output["token_ids"] == []
    assert "scores are not finite" in printed.err and "defect" not in printed.err


@pytest.mark.parametrize("more", [[], ["--temperature", "1"]])
def test_evaluate_certifies_nothing(broken, chats, more, capsys):
    command = ["evaluate", "--verifier", broken, "--data", chats, "--method", "ngram", "--max-tokens", "4", *more]
    assert main([*command, "--num-prompts", "3"]) == 1
    printed = capsys.readouterr()
    assert "none: prompt 0: after" in printed.err and "scores are not finite" in printed.err
    assert "3/3" not in printed.out


def test_regenerated_rows_are_not_made_of_nothing(broken, chats, tmp_path, capsys):
    command = ["regenerate-responses", "--model", broken, "--data", chats, "--output", str(tmp_path / "out.jsonl")]
    assert main([*command, "--max-tokens", "4"]) == 1
    assert "scores are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_of_a_verifier_that_fails_at_one_token_are_kept_and_the_verb_fails(verifier, tmp_path, capsys):
    """Only prompts with a `Z` reach the damaged embedding."""
    shutil.copytree(verifier, tmp_path / "partly")
    vocab = json.loads((Path(verifier) / "tokenizer.json").read_text())["model"]["vocab"]
    damage(tmp_path / "partly", "model.embed_tokens.weight", vocab["Z"])
    rows = [{"conversations": [{"role": "user", "content": f"say {word}"}]} for word in ("a", "Z", "b", "ZZ", "c")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["regenerate-responses", "--model", str(tmp_path / "partly"), "--data", str(tmp_path / "in.jsonl")]
    assert main([*command, "--output", str(tmp_path / "out.jsonl"), "--max-tokens", "3"]) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert (result["num_rows"], result["num_failed"], result["num_non_finite"]) == (3, 2, 2)
    assert "not finite in 2 answers" in printed.err
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [error["idx"] for error in errors] == [1, 3] and "NaN" in errors[0]["error"]
    report = regenerate(str(tmp_path / "partly"), rows[:1], output=tmp_path / "good.jsonl", max_tokens=3)
    report.raise_for_errors()


def test_verify_names_the_verifier(broken, checkpoint, chats, capsys):
    command = ["verify", checkpoint, "--verifier", broken, "--prompts", chats, "--num-prompts", "2", "--no-vllm"]
    assert main([*command, "--max-tokens", "6"]) == 1
    assert "the verifier's scores are finite: " in " ".join(capsys.readouterr().err.split())


def test_the_deep_check_passes_a_sound_checkpoint(checkpoint, capsys):
    assert main(["check", checkpoint, "--deep"]) == 0
    assert "forwards of verifier and drafter" in json.loads(capsys.readouterr().out.splitlines()[-1])["checked"]


def codes(capsys) -> dict[str, str]:
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    return {finding["code"]: finding["where"] for finding in findings if finding["severity"] == "error"}


def test_the_deep_check_finds_a_verifier_without_numbers(broken, checkpoint, capsys):
    assert main(["check", checkpoint, "--deep", "--verifier", broken, "--json"]) == 1
    found = codes(capsys)
    assert found["weight-not-finite"] == "the verifier's model.layers.3.mlp.down_proj.weight"
    assert found["scores-not-finite"] == "the verifier's scores"


def test_the_deep_check_finds_a_drafter_whose_scores_overflow(checkpoint, tmp_path, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "training_record.json").unlink()
    damage(copy, "norm.weight", None, 3e38)  # each weight is a number
    main(["check", str(copy), "--json"])
    assert not codes(capsys).keys() & {"weight-not-finite", "drafts-not-finite"}
    assert main(["check", str(copy), "--deep", "--json"]) == 1
    assert codes(capsys)["drafts-not-finite"] == "the drafter's scores"


def test_scores_that_overflow_are_found_by_the_forward(verifier, checkpoint, tmp_path, capsys):
    shutil.copytree(verifier, tmp_path / "huge")
    damage(tmp_path / "huge", "lm_head.weight", 7, 3e38)  # each weight is a number, their sum is not
    assert main(["check", checkpoint, "--deep", "--verifier", str(tmp_path / "huge"), "--json"]) == 1
    assert "scores-not-finite" in codes(capsys)


def test_a_streamed_answer_ends_with_the_error(broken):
    engine = Engine.from_pretrained(broken)
    assert engine.chat("hi", max_tokens=4).finish_reason == "error"
    with pytest.raises(NonFiniteScoresError, match="scores are not finite"):
        list(engine.chat("hi", max_tokens=4, stream=True))
    assert torch.isfinite(torch.tensor(engine.stats.num_non_finite)) and engine.stats.num_non_finite == 2
