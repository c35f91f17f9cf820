"""The same question by command and by Python gives the same text, and what is no question says what to call."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from speculators.cli.app import main
from speculators.decoding import Engine, SamplingParams
from speculators.verifier import load_verifier

QUESTION = "say 3"


@pytest.fixture(scope="module")
def engine(verifier) -> Engine:
    return Engine.from_pretrained(verifier, drafter="ngram", num_speculative_tokens=3)


def test_a_question_by_command_and_by_python_gives_the_same_text(verifier, engine, capsys):
    args = ["generate", "--verifier", verifier, "--prompt", QUESTION, "--method", "ngram", "-k", "3"]
    assert main(args) == 0
    [by_command] = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    reply = engine.chat(QUESTION)
    assert reply.text == by_command["text"] != ""
    assert reply.token_ids == by_command["token_ids"]
    assert reply.finish_reason == by_command["finish_reason"]
    assert reply.stats.acceptance_length == by_command["acceptance_length"]


def test_the_template_is_applied_once(verifier, engine):
    rendered = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(verifier)(rendered, add_special_tokens=False).input_ids
    reply = engine.chat(QUESTION, max_tokens=8)
    assert reply.prompt_token_ids == ids
    assert reply.token_ids == engine.generate([ids], SamplingParams(max_tokens=8))[0].token_ids


def test_messages_are_a_conversation(engine):
    messages = [
        {"role": "user", "content": "say 3"},
        {"role": "assistant", "content": "3 it is"},
        {"role": "user", "content": "say 4"},
    ]
    assert engine.chat(messages[:1], max_tokens=8).text == engine.chat("say 3", max_tokens=8).text
    assert len(engine.chat(messages, max_tokens=8).prompt_token_ids) > 50


def test_streamed_pieces_add_up_to_the_text(engine):
    pieces = list(engine.chat(QUESTION, max_tokens=24, stream=True))
    assert len(pieces) > 1
    assert "".join(pieces) == engine.chat(QUESTION, max_tokens=24).text


def test_a_loaded_verifier_decodes_as_its_name_does(verifier):
    by_model = Engine.from_pretrained(load_verifier(verifier, dtype="float32")).chat(QUESTION, max_tokens=8)
    assert by_model.token_ids == Engine.from_pretrained(verifier, drafter="none").chat(QUESTION, max_tokens=8).token_ids


def test_settings_of_a_loaded_verifier_are_refused(verifier):
    with pytest.raises(ValueError, match="loaded already"):
        Engine.from_pretrained(load_verifier(verifier), dtype="bfloat16")


def test_a_name_where_a_model_belongs_says_what_to_call(verifier):
    with pytest.raises(ValueError, match=r"Engine\.from_pretrained"):
        Engine(verifier)


@pytest.mark.parametrize("prompts", [[{"role": "user", "content": "hi"}], [[{"role": "user", "content": "hi"}]]])
def test_messages_where_prompts_belong_say_what_to_call(engine, prompts):
    with pytest.raises(ValueError, match=r"engine\.chat"):
        engine.generate(prompts)


@pytest.mark.parametrize("question", [None, [], ["say 3"], [["say 3"]], [{"content": "say 3"}]])
def test_what_is_no_chat_shows_how_one_looks(engine, question):
    with pytest.raises(ValueError, match='"role": "user"'):
        engine.chat(question)


def test_an_unknown_sampling_setting_names_the_nearest(engine):
    with pytest.raises(ValueError, match="Did you mean 'max_tokens'"):
        engine.chat(QUESTION, max_token=3)


def test_a_tokenizer_without_a_template_is_named(base_verifier):
    with pytest.raises(ValueError, match="no chat template"):
        Engine.from_pretrained(base_verifier).chat(QUESTION)
    model = load_verifier(base_verifier)
    with pytest.raises(ValueError, match="tokenizer="):
        Engine(model).chat(QUESTION)
