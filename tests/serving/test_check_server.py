"""`check --server`: what a running server does not share with a checkpoint is named before the first request."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from speculators.cli.app import main
from speculators.data_generation.vllm_client import ServerUnavailableError
from speculators.evaluation.server_check import PROBE, may_be, server_findings
from speculators.evaluation.server_client import MeasuredServer, ServerCounters

pytestmark = pytest.mark.usefixtures("fast_retries")


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    from speculators import assets

    return AutoTokenizer.from_pretrained(assets.tiny_verifier_path()).encode(PROBE, add_special_tokens=False)


def codes(server, speculator: str, verifier: str | None) -> list[str]:
    return [f"{found.severity} {found.code}" for found in server_findings(server.endpoint, speculator, verifier)]


def test_the_server_of_the_checkpoint_has_no_finding(start_fake, speculator, verifier, tokens):
    for number, served in enumerate((verifier, speculator)):  # vLLM's explicit form, and `vllm serve DIRECTORY`
        server = start_fake("--model", served, "--drafts", "--tokens", json.dumps(tokens), name=f"fake{number}")
        assert codes(server, speculator, verifier) == []


def test_what_differs_is_named(start_fake, speculator, verifier, tokens):
    other = start_fake("--model", "some-org/Other-8B", "--tokens", json.dumps([*tokens[:-1], 1]), name="other")
    wrong = ["error server-other-model", "error server-other-tokenizer", "error server-drafts-nothing"]
    assert codes(other, speculator, verifier) == wrong
    silent = start_fake("--model", verifier, "--drafts", name="silent")  # no /tokenize
    assert codes(silent, speculator, verifier) == ["warning server-not-compared"]
    broken = start_fake("--model", verifier, "--drafts", "--tokens", "words", name="broken")
    assert codes(broken, speculator, verifier) == ["warning server-not-compared"]
    longer = start_fake("--model", verifier, "--drafts", "--tokens", json.dumps([*tokens, 1]), name="longer")
    (found,) = server_findings(longer.endpoint, speculator, verifier)
    assert found.found == f"{len(tokens) + 1} tokens, another at {len(tokens)}"
    assert codes(silent, speculator, None) == ["warning server-not-compared"]


def test_drafts_that_are_never_accepted_are_an_error(start_fake, speculator, verifier, tokens, monkeypatch):
    server = start_fake("--model", verifier, "--drafts", "--tokens", json.dumps(tokens))
    for accepted, expected in ((0, ["error server-accepts-nothing"]), (1, [])):
        counters = ServerCounters(12, 36, accepted, (accepted, 0, 0), 30, 0)
        monkeypatch.setattr(MeasuredServer, "counters", lambda self, counters=counters: counters)
        assert codes(server, speculator, verifier) == expected


def test_the_command_says_it_and_fails(start_fake, speculator, verifier, capsys):
    server = start_fake("--model", "some-org/Other-8B", "--drafts")
    assert main(["check", speculator, "--verifier", verifier, "--server", server.endpoint, "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert "server-other-model" in {finding["code"] for finding in found}
    server.end()
    with pytest.raises(ServerUnavailableError):
        list(server_findings(server.endpoint, speculator, verifier))


def test_a_model_is_the_same_under_another_path_only_by_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "a").mkdir(parents=True)
    assert may_be(str(tmp_path / "a"), str(tmp_path / "link"))
    assert not may_be(str(tmp_path / "a"), str(tmp_path / "b" / "a"))  # both are here and differ
    assert may_be("/models/Llama-3.1-8B", "meta-llama/Llama-3.1-8B")
    assert not may_be("/models/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct")
