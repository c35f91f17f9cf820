"""Sampling settings on the command line reach the engine: the same text as the library's, with drafts and without."""

from __future__ import annotations

import json
import re

import pytest

from speculators.cli.app import command_of, main, run
from speculators.decoding import Engine, SamplingParams
from speculators.evaluation.config import ServerConfig
from speculators.evaluation.server_client import completion_request
from speculators.utils.chat_template import chat_prompt

FLAGS = {
    "min_p": ("--min-p", 0.95),
    "repetition_penalty": ("--repetition-penalty", 1.7),
    "presence_penalty": ("--presence-penalty", 1.5),
    "frequency_penalty": ("--frequency-penalty", -1.5),
    "logit_bias": ("--logit-bias", '{"40": 6.5, "41": 6.5}'),
    "min_tokens": ("--min-tokens", 20),
}
EVERYWHERE = {"--min-tokens", "--logit-bias", "--bad-words", "--stop", "--min-p", "--presence-penalty"}
TEXTS = {"--no-skip-special-tokens"}
ONE_ANSWER = {"--n", "--logprobs", "--prompt-logprobs", "--include-stop-str-in-output"}
"""Flags of all three verbs, of those whose stop strings may stand in special tokens, and of `generate` alone."""
PENALTIES = ["--presence-penalty", "2", "--repetition-penalty", "1.8"]
END_BIAS = '{"2": 3.5}'
"""Of the end of sequence, so that some answers would end early."""


@pytest.mark.parametrize("method", ["none", "ngram"])
@pytest.mark.parametrize("name", FLAGS)
def test_generate_says_what_the_engine_says_with_the_same_settings(verifier, name, method):
    flag, value = FLAGS[name]
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--method", method, "--max-tokens", "24"]
    words += ["--temperature", "1.5", "--seed", "3"]
    settings = {"max_tokens": 24, "temperature": 1.5, "seed": 3}
    if name == "min_tokens":
        words += ["--logit-bias", END_BIAS]
        settings["logit_bias"] = json.loads(END_BIAS)
    found = run([*words, flag, str(value)])["outputs"][0]
    engine = Engine.from_pretrained(verifier)
    prompt = chat_prompt(engine.tokenizer, "say 3")
    given = json.loads(value) if isinstance(value, str) else value
    expected = engine.generate([prompt], SamplingParams(**settings, **{name: given}))[0].token_ids
    assert found["token_ids"] == expected
    assert expected != engine.generate([prompt], SamplingParams(**settings))[0].token_ids


def test_a_stop_ends_the_text_and_is_left_out_of_it(verifier):
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--max-tokens", "24"]
    whole = run(words)["outputs"][0]["text"]
    stop = whole[3:5]
    for method in ("none", "ngram"):
        found = run([*words, "--method", method, "--stop", "never said", "--stop", stop])["outputs"][0]
        assert (found["text"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("method", ["none", "ngram"])
def test_several_answers_have_the_seeds_that_follow_one_another(verifier, method, capsys):
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--prompt", "say 4", "--method", method]
    found = run([*words, "--max-tokens", "12", "--temperature", "1.5", "--seed", "3", "--n", "2"])["outputs"]
    engine = Engine.from_pretrained(verifier)
    prompts = [chat_prompt(engine.tokenizer, text) for text in ("say 3", "say 4")]
    expected = [
        engine.generate([prompt], SamplingParams(max_tokens=12, temperature=1.5, seed=seed))[0].token_ids
        for prompt in prompts
        for seed in (3, 4)
    ]
    assert [output["token_ids"] for output in found] == expected
    assert main([*words, "--n", "2"]) == 2
    assert "n=2 at temperature 0 gives equal samples" in capsys.readouterr().err


def test_samples_of_several_prompts_are_told_apart_on_a_terminal(verifier, terminal):
    words = ["--prompt", "say 3", "--prompt", "say 4", "--max-tokens", "4", "--temperature", "1", "--n", "2"]
    code, shown = terminal.run("generate", "--verifier", verifier, *words)
    titles = re.findall(r"prompt \d, sample \d", shown)
    assert (code, titles) == (0, [f"prompt {prompt}, sample {sample}" for prompt in (1, 2) for sample in (1, 2)])


@pytest.mark.parametrize("method", ["none", "ngram"])
def test_a_bad_word_is_not_in_the_text_of_either(verifier, method):
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--method", method, "--max-tokens", "24"]
    whole = run(words)["outputs"][0]["text"]
    word = next(piece for piece in (whole[i : i + 2] for i in range(len(whole))) if piece.isascii() and piece.strip())
    found = run([*words, "--bad-words", word, "--bad-words", "never said"])["outputs"][0]
    engine = Engine.from_pretrained(verifier)
    params = SamplingParams(max_tokens=24, bad_words=(word, "never said"))
    expected = engine.generate([chat_prompt(engine.tokenizer, "say 3")], params)[0]
    assert (found["text"], found["token_ids"]) == (expected.text, expected.token_ids)
    assert word in whole and word not in found["text"]


def test_the_text_keeps_the_stop_and_special_tokens_that_are_asked_for(verifier):
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--max-tokens", "24"]
    whole = run(words)["outputs"][0]["text"]
    stop = whole[3:5]
    kept = run([*words, "--stop", stop, "--include-stop-str-in-output"])["outputs"][0]["text"]
    assert kept == whole[: whole.index(stop) + len(stop)]
    many = [*words, "--logit-bias", '{"1": 100}']  # <|im_start|>, a special token
    assert run(many)["outputs"][0]["text"] == ""
    assert run([*many, "--no-skip-special-tokens"])["outputs"][0]["text"] == "<|im_start|>" * 24


def test_log_probabilities_of_the_prompt_are_in_the_json(verifier):
    words = ["generate", "--verifier", verifier, "--prompt", "say 3", "--max-tokens", "3", "--prompt-logprobs", "1"]
    found = run(words)["outputs"][0]["prompt_logprobs"]
    engine = Engine.from_pretrained(verifier)
    prompt = chat_prompt(engine.tokenizer, "say 3")
    expected = engine.generate([prompt], SamplingParams(max_tokens=3, prompt_logprobs=1))[0].prompt_logprobs
    assert found[0] is None and len(found) == len(prompt)
    assert [position["logprob"] for position in found[1:]] == [position.logprob for position in expected[1:]]


@pytest.mark.parametrize(
    ("verb", "offered"),
    [
        ("generate", EVERYWHERE | TEXTS | ONE_ANSWER),
        ("evaluate", EVERYWHERE | TEXTS),
        ("regenerate-responses", EVERYWHERE),
    ],
)
def test_a_verb_offers_the_flags_that_mean_something_to_it(verb, offered, capsys):
    known = {flag for parameter in command_of(verb).params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert known & (EVERYWHERE | TEXTS | ONE_ANSWER) == offered


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ('{"40": }', "Invalid value: --logit-bias is not JSON: Expecting value: line 1 column 8 (char 7)"),
        ("[1]", 'Invalid value: --logit-bias must be a JSON object such as {"42": -100}'),
        ('{"a": 1}', "logit_bias={'a': 1} must map token ids to numbers"),
    ],
)
def test_a_bias_that_is_none_is_refused(verifier, bias, message, capsys):
    assert main(["generate", "--verifier", verifier, "--prompt", "x", "--logit-bias", bias]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


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
    words += ["--min-tokens", "12", "--logit-bias", END_BIAS, "--bad-words", "ab", "--no-skip-special-tokens"]
    report = run(words)
    settings = {name: report["settings"][name] for name in ("min_tokens", "logit_bias", "skip_special_tokens")}
    assert settings == {"min_tokens": 12, "logit_bias": {"2": 3.5}, "skip_special_tokens": False}
    assert list(report["settings"]["bad_words"]) == ["ab"] and report["rows"][0]["num_tokens"] == 24
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
    for name, more in (("plain", []), ("penalised", [*PENALTIES, "--min-tokens", "24", "--logit-bias", END_BIAS])):
        path = tmp_path / f"{name}.jsonl"
        words = ["regenerate-responses", "--model", verifier, "--data", chats, "--output", str(path), "--limit", "1"]
        run([*words, "--max-tokens", "24", *more])
        rows[name] = json.loads(path.read_text().splitlines()[0])
    assert rows["plain"]["input_ids"] != rows["penalised"]["input_ids"]
    recorded = rows["penalised"]["metadata"]["sampling_params"]
    assert (recorded["presence_penalty"], recorded["repetition_penalty"]) == (2.0, 1.8)
    assert (recorded["min_tokens"], recorded["logit_bias"]) == (24, {"2": 3.5})
    assert rows["penalised"]["metadata"]["usage"]["completion_tokens"] == 24
    more = ["--resume", "--min-tokens", "24", "--logit-bias", END_BIAS, "--output", str(tmp_path / "penalised.jsonl")]
    resumed = run(
        [
            "regenerate-responses",
            "--model",
            verifier,
            "--data",
            chats,
            *more,
            "--limit",
            "1",
            *PENALTIES,
            "--max-tokens",
            "24",
        ]
    )
    assert (resumed["num_already_done"], resumed["num_conversations"]) == (1, 0)


def test_a_bias_that_a_server_would_weaken_is_refused_before_one_is_asked(verifier, chats, tmp_path, capsys):
    words = ["regenerate-responses", "--verifier", verifier, "--data", chats, "--output", str(tmp_path / "o.jsonl")]
    assert main([*words, "--endpoint", "http://127.0.0.1:9/v1", "--logit-bias", '{"3": 150}']) == 2
    assert "logit_bias={3: 150.0}: a server moves biases into [-100, 100]" in capsys.readouterr().err
