"""The functions of `import speculators`: lazy, by path or by object, silent, and clear about what they do not know."""

from __future__ import annotations

import inspect
import json

import pytest
import yaml
from transformers import AutoTokenizer

import speculators as sp
from speculators import assets
from speculators.cli.app import main
from speculators.train.config import ConfigError

VERIFIER = str(assets.tiny_verifier_path())
SMALL = {"max_steps": 2, "total_seq_len": 128, "draft_vocab_size": 256}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("chats") / "chat.jsonl"
    path.write_text("\n".join(assets.prompts_path("train").read_text().splitlines()[:40]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def verifier():
    return sp.load_verifier(VERIFIER, dtype="float32")


@pytest.fixture(scope="module")
def data(chats, verifier, tmp_path_factory):
    return sp.prepare_data(verifier, chats, output=tmp_path_factory.mktemp("door") / "data", seq_length=128)


@pytest.fixture(scope="module")
def run(data, verifier, tmp_path_factory):
    return sp.train_drafter("eagle3", verifier=verifier, data=data, output=tmp_path_factory.mktemp("run"), **SMALL)


def test_every_name_is_there():
    assert sorted(sp.__all__) == sorted(sp.HOME)
    assert all(getattr(sp, name) is not None for name in sp.__all__)
    for name in ("check", "evaluate", "export", "prepare_data", "regenerate", "train_drafter", "verify"):
        assert inspect.isfunction(getattr(sp, name)) and getattr(sp, name).__doc__


def test_data_prepared_by_object_is_what_its_name_gives(chats, data):
    again = sp.prepare_data(VERIFIER, chats, output=data, seq_length=128)
    assert again.reused and again.manifest == data.manifest


def test_a_run_by_object_is_checked_and_notes_the_command_that_means_the_same(run, tmp_path):
    run.raise_for_errors()
    assert run.parity.passed and run.check.ok
    command = (run.checkpoint.parent / "train_command.txt").read_text()
    for words in ("speculators train --speculator-type eagle3", f"--verifier {VERIFIER}", "--max-steps 2"):
        assert words in command
    recipe = yaml.safe_load((run.checkpoint.parent / "run.yaml").read_text())
    assert recipe["draft"]["draft_vocab_size"] == 256


def test_results_stand_where_paths_are_asked_for(run, verifier, tmp_path):
    assert sp.check(run, verifier=verifier).ok
    exported = sp.export(run, tmp_path / "served")
    sp.check(exported).raise_for_errors()
    by_result = sp.Engine.from_pretrained(verifier, run).chat("What does zip do?", max_tokens=8)
    by_path = sp.Engine.from_pretrained(VERIFIER, str(run.checkpoint)).chat("What does zip do?", max_tokens=8)
    assert by_result.token_ids == by_path.token_ids
    assert by_result.stats.num_drafted > 0


def test_an_evaluation_by_objects_is_the_one_by_names(run, verifier):
    rows = [json.loads(line) for line in assets.prompts_path("heldout").read_text().splitlines()[:2]]
    asked = {"num_prompts": 2, "max_tokens": 12, "num_warmup": 0}
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    by_object = sp.evaluate(verifier, rows, methods=["ngram", run], tokenizer=tokenizer, **asked)
    by_name = sp.evaluate(VERIFIER, assets.prompts_path("heldout"), methods=["ngram", str(run.checkpoint)], **asked)
    for method in ("ngram", "eagle3"):
        assert by_object.row(method).acceptance_length == by_name.row(method).acceptance_length
        assert by_object.row(method).lossless is True
    assert by_object.dataset == "2 given rows" and by_object.settings["dtype"] == "float32"
    json.dumps(by_object.to_dict())


def test_what_python_prints_is_what_the_command_prints(run, capsys):
    assert main(["check", str(run.checkpoint)]) == 0
    assert str(sp.check(run)) in "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())


def test_regenerated_answers_are_the_verifiers_and_can_be_prepared(chats, verifier, tmp_path):
    made = sp.regenerate(verifier, chats, output=tmp_path / "a.jsonl", limit=3, max_tokens=8, drafter="ngram")
    again = sp.regenerate(VERIFIER, chats, output=tmp_path / "b.jsonl", limit=3, max_tokens=8)
    assert made.num_conversations == 3 and made.num_failed == 0
    rows = [[json.loads(line) for line in report.path.read_text().splitlines()] for report in (made, again)]
    assert [row["input_ids"] for row in rows[0]] == [row["input_ids"] for row in rows[1]]
    assert sp.prepare_data(verifier, made, output=tmp_path / "data").manifest.num_rows == made.num_rows


def test_progress_is_told_to_a_function_and_drawn_when_asked(chats, tmp_path, capsys):
    told = []
    sp.prepare_data(VERIFIER, chats, output=tmp_path / "a", progress=lambda what, done, total: told.append(done))
    assert told and told[-1] == 40
    assert capsys.readouterr().err == ""
    sp.prepare_data(VERIFIER, chats, output=tmp_path / "b", progress=True)
    assert "40/40" in capsys.readouterr().err


def test_settings_that_do_not_exist_name_the_nearest(run, data, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        sp.train_drafter("eagle3", verifier=VERIFIER, data=data, output=tmp_path, epoch=2)
    with pytest.raises(ValueError, match="Did you mean 'num_prompts'"):
        sp.evaluate(VERIFIER, "heldout.jsonl", num_promts=2)
    with pytest.raises(ValueError, match="Did you mean 'max_tokens'"):
        sp.verify(run, max_token=2)
    with pytest.raises(ValueError, match="Did you mean 'max_batch_size'"):
        sp.Engine.from_pretrained(VERIFIER, max_batch=2)
    with pytest.raises(ValueError, match="Did you mean 'temperature'"):
        sp.regenerate(VERIFIER, "chat.jsonl", output=tmp_path / "a.jsonl", temprature=2)
    with pytest.raises(ValueError, match="Did you mean 'num_samples'"):
        sp.regenerate(VERIFIER, "chat.jsonl", output=tmp_path / "a.jsonl", num_sample=2)


def test_a_model_without_a_name_is_refused_where_its_name_is_recorded(verifier, data, tmp_path):
    nameless = type(verifier)(verifier.config)
    nameless.config.name_or_path = nameless.name_or_path = ""
    with pytest.raises(ValueError, match="was not loaded from a directory or hub id"):
        sp.train_drafter("eagle3", verifier=nameless, data=data, output=tmp_path)
