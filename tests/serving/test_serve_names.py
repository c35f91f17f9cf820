"""What `serve` makes of names: drafters that are missing, paths that lead nowhere, ids of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import speculative_config

from speculators.checkpoint.io import hub_config
from speculators.cli.app import run
from speculators.deploy.report import CheckError


@pytest.fixture
def hub(monkeypatch):
    """The hub gives what the returned dict holds for a name: a directory, or the error it answers with."""
    from speculators.checkpoint import io
    from speculators.utils import names

    answers: dict[str, Path | Exception] = {}

    def download(name: str, file: str) -> str:
        answer = answers[name]
        if isinstance(answer, Exception):
            raise answer
        return str(answer / file)

    monkeypatch.setattr(io, "hf_hub_download", download)
    for module in (io, names):
        monkeypatch.setattr(module, "why_hub_is_unreachable", lambda: None)
    io.hub_config.cache_clear()
    yield answers
    io.hub_config.cache_clear()


NEEDS_A_DRAFT = {
    "eagle": "weights of its own, and none are named; name them with --draft",
    "eagle3": "weights of its own, and none are named; name them with --draft",
    "medusa": "weights of its own, and none are named; name them with --draft",
    "dflash": "weights of its own, and none are named; name them with --draft",
    "draft_model": "weights of its own, and none are named; name them with --draft",
    "dspark": "unless the verifier is of type deepseek_v4 or .* is a 'llama'; name them with --draft",
    "mtp": "tiny_verifier is no such drafter; name one with --draft",
    "custom_class": "a class of yours; name it with --draft module.Class",
    "peagle": "a type of speculator, not a method of vLLM.*speculators serve CHECKPOINT",
    "eagel": "is unknown; vLLM has ngram, .*Did you mean 'eagle'",
}


@pytest.mark.parametrize("method", NEEDS_A_DRAFT)
def test_a_method_without_its_drafter_is_refused_before_vllm_is_looked_for(method, verifier, monkeypatch):
    monkeypatch.setenv("SPECULATORS_VLLM_PYTHON", "/no/where")  # looking there is an error of its own
    with pytest.raises(ValueError, match=f"--method {method}.*{NEEDS_A_DRAFT[method]}"):
        run(["serve", verifier, "--method", method, "-k", "2"])


OWN_LAYERS = {
    "mtp": {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1},
    "dspark": {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"]},
}


@pytest.mark.parametrize("method", OWN_LAYERS)
def test_a_verifier_that_holds_the_drafter_needs_no_other(method, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OWN_LAYERS[method]))
    result = run(["serve", str(tmp_path), "--method", method, "-k", "2", "--dry-run"])
    drafting = speculative_config(result)
    assert (result["verifier"], drafting["method"], drafting["num_speculative_tokens"]) == (str(tmp_path), method, 2)
    assert drafting.get("model", str(tmp_path)) == str(tmp_path)


def test_settings_that_draft_nothing_and_a_missing_k_are_answered_with_the_flag(verifier):
    with pytest.raises(ValueError, match=r"num_speculative_tokens=2 was given but nothing that drafts; .*--draft"):
        run(["serve", verifier, "-k", "2", "--dry-run"])
    for drafter in (["--method", "ngram"], ["--draft", verifier]):
        with pytest.raises(ValueError, match="how many tokens to draft per round: give -k N"):
            run(["serve", verifier, *drafter, "--dry-run"])
    with pytest.raises(ValueError, match=r"ngram drafts without a model.*speculators serve org/other --method ngram"):
        run(["serve", verifier, "--verifier", "org/other", "--method", "ngram", "-k", "2", "--dry-run"])


def test_a_path_that_leads_nowhere_is_no_hub_id(verifier, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in (("nowhere", "does not exist"), ("empty", "has no config.json"), ("file", "is a file")):
        path = str(tmp_path / name)
        for command in (["serve", path], ["serve", verifier, "--draft", path, "-k", "2"]):
            with pytest.raises(ValueError, match=f"{path}'? {words}"):
                run([*command, "--dry-run"])
        for command in (["serve", verifier, "--verifier", path], ["launch-vllm", path]):
            with pytest.raises(ValueError, match=f"no verifier at '{path}'"):
                run([*command, "--dry-run"])


def test_a_name_that_the_hub_does_not_know_is_refused_and_one_that_cannot_be_asked_for_is_passed_on(
    verifier, hub, tmp_path, capsys
):
    from httpx import Request, Response
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError

    answer = Response(404, request=Request("HEAD", "https://hub/org/typo"))
    hub["org/typo"] = RepositoryNotFoundError("404: no such repository", response=answer)
    with pytest.raises(ValueError, match=r"org/typo is not a directory here, and the hub gives no .*404: no such"):
        run(["serve", "org/typo", "--dry-run"])
    hub["org/model"] = Path(verifier)
    assert run(["serve", "org/model", "--dry-run"])["command"][1:] == ["serve", "org/model"]
    hub["org/without-config"] = RemoteEntryNotFoundError("404: no config.json", response=answer)
    assert run(["serve", "org/without-config", "--dry-run"])["verifier"] == "org/without-config"
    assert "taken for" not in capsys.readouterr().err
    hub["org/far"] = LocalEntryNotFoundError("no network")
    assert run(["serve", "org/far", "--dry-run"])["verifier"] == "org/far"
    assert "org/far is no directory here and the hub cannot be asked: it is taken for a ver" in capsys.readouterr().err


def test_a_draft_on_the_hub_says_what_it_is_and_one_out_of_reach_is_not_guessed(verifier, hub, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import PretrainedConfig

    medusa = {"model_type": "medusa", "hidden_size": 256, "num_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(medusa))
    hub["org/heads"] = tmp_path
    read = PretrainedConfig.get_config_dict

    def of_the_hub(cls, pretrained_model_name_or_path, **more):
        name = pretrained_model_name_or_path
        return (dict(medusa), {}) if name == "org/heads" else read(name, **more)

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", classmethod(of_the_hub))
    result = run(["serve", verifier, "--draft", "org/heads", "-k", "3", "--dry-run", "--engine", "vllm-0.32"])
    assert speculative_config(result) == {"method": "medusa", "num_speculative_tokens": 3, "model": "org/heads"}
    hub["org/far"] = LocalEntryNotFoundError("no network")
    with pytest.raises(ValueError, match=r"of org/far cannot be read here, and what kind .* say it with --method"):
        run(["serve", verifier, "--draft", "org/far", "-k", "3", "--dry-run"])
    result = run(["serve", verifier, "--draft", "org/far", "--method", "eagle", "-k", "3", "--dry-run"])
    assert speculative_config(result)["method"] == "eagle"


def test_a_speculator_given_as_the_draft_is_one_too(speculator, verifier, fake_environment):
    result = run(["serve", verifier, "--draft", speculator, "--dry-run"])
    assert speculative_config(result) == {"method": "eagle3", "num_speculative_tokens": 5, "model": speculator}
    with pytest.raises(CheckError):  # and checked like one
        run(["serve", verifier, "--draft", speculator, "--python", str(fake_environment)])
    with pytest.raises(ValueError, match="is the drafter already"):
        run(["serve", speculator, "--draft", speculator, "--dry-run"])


def test_a_speculator_on_the_hub_is_one_too(speculator, verifier, hub):
    hub["org/speculator"] = Path(speculator)
    values = json.loads((Path(speculator) / "config.json").read_text())
    result = run(["serve", "org/speculator", "--verifier", "org/verifier", "-k", "2", "--dry-run"])
    assert result["command"][1:3] == ["serve", "org/verifier"]
    expected = {"method": "eagle3", "num_speculative_tokens": 2, "model": "org/speculator"}
    assert speculative_config(result) == expected
    del values["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    (Path(speculator) / "config.json").write_text(json.dumps(values))
    hub_config.cache_clear()
    with pytest.raises(ValueError, match="how many tokens to draft per round: give -k N"):
        run(["serve", "org/speculator", "--verifier", "org/verifier", "--dry-run"])
    without_k = run(["serve", "org/speculator", "--verifier", "org/verifier", "-k", "3", "--dry-run"])
    assert speculative_config(without_k)["num_speculative_tokens"] == 3
