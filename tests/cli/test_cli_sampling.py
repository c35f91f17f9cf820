"""Sampling settings on the command line reach the engine: the same text as the library's, with drafts and without."""

from __future__ import annotations

import json

import pytest

from speculators.cli.app import main, run
from speculators.decoding import Engine, SamplingParams
from speculators.evaluation.config import ServerConfig
from speculators.evaluation.server_client import completion_request
from speculators.utils.chat_template import chat_prompt

FLAGS = {
    "min_p": ("--min-p", 0.95),
    "repetition_penalty": ("--repetition-penalty", 1.7),
    "presence_penalty": ("--presence-penalty", 1.5),
    "frequency_penalty": ("--frequency-penalty", -1.5),
}


@pytest.mark.parametrize("method", ["none", "ngram"])
@pytest.mark.parametrize("name", FLAGS)
def test_generate_says_what_the_engine_says_with_the_same_settings(verifier, name, method):
    flag, value = FLAGS[name]
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--method", method, "--max-tokens", "24"]
    found = run([*words, "--temperature", "1.5", "--seed", "3", flag, str(value)])["outputs"][0]
    engine = Engine.from_pretrained(verifier)
    prompt = chat_prompt(engine.tokenizer, "say 3")
    settings = {"max_tokens": 24, "temperature": 1.5, "seed": 3}
    expected = engine.generate([prompt], SamplingParams(**settings, **{name: value}))[0].token_ids
    assert found["token_ids"] == expected
    assert expected != engine.generate([prompt], SamplingParams(**settings))[0].token_ids


def test_a_stop_ends_the_text_and_is_left_out_of_it(verifier):
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--max-tokens", "24"]
    whole = run(words)["outputs"][0]["text"]
    stop = whole[3:5]
    for method in ("none", "ngram"):
        found = run([*words, "--method", method, "--stop", "never said", "--stop", stop])["outputs"][0]
        assert (found["text"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_are_in_the_json(verifier, capsys):
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--max-tokens", "3"]
    assert main([*words, "--logprobs", "2"]) == 0
    output = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"][0]
    assert [len(position["top"]) for position in output["logprobs"]] == [2, 2, 2]
    for token_id, position in zip(output["token_ids"], output["logprobs"], strict=True):
        assert max(position["top"].values()) == position["logprob"] == position["top"][str(token_id)]  # greedy
    assert "logprobs" not in run(words)["outputs"][0]


def test_evaluate_measures_the_settings_that_it_names(verifier, chats):
    words = ["evaluate", "--verifier", verifier, "--data", chats, "--method", "ngram", "--num-prompts", "2"]
    words += ["--max-tokens", "12", "--num-warmup", "0", "--presence-penalty", "1.5", "--stop", "zz"]
    report = run(words)
    assert report["lossless"] is True
    assert report["settings"]["presence_penalty"] == 1.5 and list(report["settings"]["stop"]) == ["zz"]


def test_a_server_is_sent_the_settings_that_are_asked_for():
    sampling = ServerConfig(
        server="x", data="y", temperature=0.7, top_k=5, min_p=0.1, presence_penalty=1.5, stop=("zz",), seed=3
    ).sampling()
    request = completion_request("m", [1, 2], sampling)
    sent = {name: request[name] for name in ("temperature", "top_k", "min_p", "presence_penalty", "stop")}
    assert sent == {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "presence_penalty": 1.5, "stop": ("zz",)}
    assert request["repetition_penalty"] == 1.0 and "logit_bias" not in request  # else the server's default holds
    plain = completion_request("m", [1, 2], ServerConfig(server="x", data="y").sampling())
    assert "seed" not in plain and plain["top_k"] == -1
    with pytest.raises(ValueError, match=r"logit_bias=\{3: 150.0\}: a server moves biases"):
        ServerConfig(server="x", data="y", logit_bias={3: 150.0}).sampling()


def test_a_regenerated_answer_that_a_stop_string_ended_says_so(verifier, chats, tmp_path):
    words = ["regenerate-responses", "--verifier", verifier, "--data", chats, "--limit", "1", "--max-tokens", "24"]
    run([*words, "--output", str(tmp_path / "whole.jsonl")])
    whole = json.loads((tmp_path / "whole.jsonl").read_text().splitlines()[0])
    stop = whole["text"][3:5]
    report = run([*words, "--output", str(tmp_path / "stopped.jsonl"), "--stop", stop])
    row = json.loads((tmp_path / "stopped.jsonl").read_text().splitlines()[0])
    assert (row["metadata"]["finish_reason"], report["num_cut"]) == ("stop", 0)
    assert stop in row["text"] and len(row["text"]) < len(whole["text"])


def test_regenerated_answers_follow_the_penalties_and_record_them(verifier, chats, tmp_path):
    rows = {}
    for name, more in (("plain", []), ("penalised", ["--presence-penalty", "2", "--repetition-penalty", "1.8"])):
        path = tmp_path / f"{name}.jsonl"
        words = ["regenerate-responses", "--model", verifier, "--data", chats, "--output", str(path), "--limit", "1"]
        run([*words, "--max-tokens", "24", *more])
        rows[name] = json.loads(path.read_text().splitlines()[0])
    assert rows["plain"]["input_ids"] != rows["penalised"]["input_ids"]
    recorded = rows["penalised"]["metadata"]["sampling_params"]
    assert (recorded["presence_penalty"], recorded["repetition_penalty"]) == (2.0, 1.8)
