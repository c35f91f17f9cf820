"""What does not exist is said at once, with the nearest that does, before torch is imported; what exit codes mean."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from speculators.assets import tiny_verifier_path
from speculators.cli import app
from speculators.cli.launch_vllm import WaitLine
from speculators.deploy.serve import Launch
from speculators.train.events import Validated
from speculators.train.logger import TrainingProgress
from speculators.utils.names import is_misspelt_path, nearest_path, refuse_missing_model
from speculators.utils.report import WorkFailedError, exit_code_of, work
from speculators.verifier.config import default_target_layer_ids

VERIFIER = str(tiny_verifier_path())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a verifier, a run, chats and no way to the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "verifier").symlink_to(VERIFIER)
    (tmp_path / "run" / "checkpoint_best").mkdir(parents=True)
    (tmp_path / "chats.jsonl").write_text('{"conversations": []}\n')
    (tmp_path / "data").mkdir()
    return tmp_path


WRONG = {
    # verb -> words with one thing that does not exist, and what is said of it
    "quickstart": (["--output", "run"], "run holds ['checkpoint_best'] and is not an earlier quickstart's"),
    "build": (["--verifier", "verifier", "--data", "chat.jsonl", "--output", "x"], "Did you mean 'chats.jsonl'?"),
    "prepare-data": (
        ["--verifier", "verifer", "--data", "chats.jsonl"],
        "no verifier at 'verifer': it does not exist. Did you mean 'verifier'?",
    ),
    "inspect-mask": (["chat.jsonl"], "data 'chat.jsonl' does not exist and is no preset. Did you mean 'chats.jsonl'?"),
    "regenerate-responses": (
        ["--verifier", "verifier", "--data", "ultrchat", "--output", "x.jsonl"],
        "data 'ultrchat' does not exist and is no preset. Did you mean 'ultrachat'?",
    ),
    "generate-offline-data": (["--data", "dat"], "the prepared dataset 'dat' does not exist. Did you mean 'data'?"),
    "train": (
        ["--verifier", "verifier", "--data", "dataa"],
        "the prepared dataset 'dataa' does not exist. Did you mean 'data'?",
    ),
    "generate": (
        ["--verifier", "verifier", "--prompt", "x", "--method", "run/checkpoint_bset"],
        "method run/checkpoint_bset: no such directory. Did you mean 'run/checkpoint_best'?",
    ),
    "store": (
        ["info", "/no/such/data"],
        "the directory of hidden states '/no/such/data' does not exist. Please write it with generate-offline-data",
    ),
    "serve": (["./runn/checkpoint_best"], "does not exist. Did you mean 'run/checkpoint_best'?"),
    "serve-local": (["./runn/checkpoint_best"], "does not exist. Did you mean 'run/checkpoint_best'?"),
    "playground": (
        ["--verifier", "./verifierr"],
        "no verifier at './verifierr': it does not exist. Did you mean 'veri",
    ),
    "launch-vllm": (["./verifierr"], "no verifier at './verifierr': it does not exist. Did you mean 'verifier'?"),
    "check": (
        ["run/checkpoint_bset"],
        "the checkpoint 'run/checkpoint_bset' does not exist. Did you mean 'run/checkpoint",
    ),
    "export": (
        ["/no/such/run", "--output", "x"],
        "the checkpoint '/no/such/run' does not exist. Please give its directory",
    ),
    "convert": (["./medusa", "--verifier", "verifier"], "the checkpoint './medusa' does not exist."),
    "stitch-mtp": (["./mtp", "verifier"], "the checkpoint './mtp' does not exist."),
    "verify": (
        ["run/checkpoint_best", "--python", "/no/python"],
        "/no/python is not a Python: give an interpreter, or the directory of its environment",
    ),
    "compare": (["chats.jsonl", "chat.jsonl"], "the result 'chat.jsonl' does not exist. Did you mean 'chats.jsonl'?"),
    "report": (["chat.jsonl"], "the result 'chat.jsonl' does not exist. Did you mean 'chats.jsonl'?"),
    "plan": (["chat.jsonl"], "the result 'chat.jsonl' does not exist. Did you mean 'chats.jsonl'?"),
    "diagnose": (
        ["run/checkpoint_bset"],
        "the checkpoint 'run/checkpoint_bset' does not exist. Did you mean 'run/checkpoint",
    ),
    "evaluate": (
        ["--verifier", "some-org/some-model", "--data", "chats.jsonl", "--method", "none"],
        "no verifier 'some-org/some-model': there is no such directory, the hub's cache has no such model, and the hub "
        "cannot be reached from here (HF_HUB_OFFLINE is set).",
    ),
}


def test_every_verb_is_asked():
    assert set(WRONG) == set(app.VERBS)


@pytest.mark.parametrize("verb", WRONG)
def test_what_does_not_exist_is_named_with_the_nearest_and_ends_with_2(verb, here, capsys):
    words, said = WRONG[verb]
    assert app.main([verb, *words]) == 2
    printed = capsys.readouterr()
    assert said in " ".join(printed.err.split())
    assert printed.out == "" and "defect" not in printed.err


WITH_METHOD = (
    ["generate", "--verifier", VERIFIER, "--prompt", "x"],
    ["evaluate", "--verifier", VERIFIER, "--data", "chats.jsonl"],
    ["regenerate-responses", "--verifier", VERIFIER, "--data", "chats.jsonl", "--output", "x.jsonl"],
)


def test_it_is_said_before_torch_is_imported(here):
    program = (
        "import json, sys; from speculators.cli.app import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    commands = [[verb, *words] for verb, (words, _) in WRONG.items()]
    commands += [[*verb, "--method", method] for verb in WITH_METHOD for method in ("ngrma", "eagl3")]
    commands += [["serve", VERIFIER, "--method", "eagl3"]]
    begun_s = computed_s()
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert computed_s() - begun_s < 10  # thirty commands; importing torch alone takes longer than one of them


def computed_s() -> float:
    """Seconds that CPUs spent on processes that this one started and that ended, however busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_hub_that_cannot_be_reached_is_not_asked_six_times(here, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    begun_s = time.perf_counter()
    with pytest.raises(ValueError, match=r"the hub cannot be reached from here \(Connection refused\)"):
        refuse_missing_model("some-org/some-model", "verifier", "a saved causal LM")
    assert time.perf_counter() - begun_s < 2


def test_a_misspelt_path_is_told_from_another_size_of_a_model(here):
    (here / "org" / "model-8b").mkdir(parents=True)
    assert is_misspelt_path("verifer") and is_misspelt_path("org/modle-8b")
    assert not is_misspelt_path("org/model-4b") and not is_misspelt_path("other/model-8b")
    assert nearest_path("rnu/checkpoint_best") == "run/checkpoint_best"
    assert nearest_path("nothing-like-it") is None


def test_an_unknown_method_is_named_with_the_nearest(capsys):
    assert app.main(["generate", "--verifier", VERIFIER, "--prompt", "x", "--method", "ngrma"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "error: 'ngrma' is no method, and no such directory exists. Did you mean 'ngram'? There are: none, " in said


def test_one_rule_for_exit_codes():
    wrong = [ValueError("x"), NotImplementedError("x"), FileNotFoundError("x"), PermissionError(13, "denied", "x")]
    failed = [
        WorkFailedError("x"),
        RuntimeError("x"),
        ConnectionError("x"),
        OSError(28, "full"),
        ZeroDivisionError("x"),
    ]
    assert [exit_code_of(error) for error in wrong] == [2] * len(wrong)
    assert [exit_code_of(error) for error in failed] == [1] * len(failed)
    for error in wrong:
        with pytest.raises(type(error)) as raised, work():
            raise error
        assert exit_code_of(raised.value) == 1


def test_layers_of_a_shallow_verifier_are_chosen():
    chosen = {num_layers: default_target_layer_ids(num_layers) for num_layers in range(1, 33)}
    assert chosen[6] == [1, 3, 5] and chosen[5] == [1, 2, 4] and chosen[4] == [1, 2, 3]
    assert chosen[3] == chosen[2] == [0, 1, 2] and chosen[1] == [0, 1]
    assert chosen[7] == [2, 3, 4] and chosen[32] == [2, 16, 29]
    for num_layers, ids in chosen.items():
        assert ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] <= num_layers


@pytest.mark.parametrize(
    ("more", "name", "key"),
    [((), "/models/my verifier", ""), (("--served-model-name", "chat", "--api-key", "k"), "chat", "-H 'Authorization")],
)
def test_a_ready_server_says_its_model_and_a_first_request(more, name, key):
    launch = Launch(("vllm", "serve", "/models/my verifier", *more), "http://127.0.0.1:8000")
    assert launch.served_model == name
    request = launch.first_request
    assert request.startswith("curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' " + key)
    body = json.loads(request.split("-d ")[1].strip("'"))
    assert body == {"model": name, "prompt": "Hello", "max_tokens": 16}


def test_the_screen_counts_epochs_as_the_directories_do(capsys):
    progress = TrainingProgress()
    progress(Validated(step=4, epoch=0, metrics={"loss": 1.0}, acceptance_length=None))
    assert "epoch 0, step 4, validation: loss 1.000" in capsys.readouterr().err


def test_ready_is_said_with_the_served_name_and_a_request(capsys):
    launch = Launch(("vllm", "serve", "org/model"), "http://127.0.0.1:8000")
    WaitLine().ready(12.0, launch)
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("ready after 12 s: http://127.0.0.1:8000/v1 serves the model org/model try it: curl http://")
