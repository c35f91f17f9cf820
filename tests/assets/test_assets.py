"""The embedded verifier is small, loads with plain transformers, and writes prose that ends and does not loop."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from speculators.assets import prompts_path, tiny_verifier_path

MAX_WEIGHT_BYTES = 16_000_000
NUM_GREEDY_PROMPTS = 12


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_verifier_path(), padding_side="left")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_verifier_path(), dtype=torch.float32).eval()


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["conversations"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_weights_are_small_and_bfloat16():
    path = tiny_verifier_path() / "model.safetensors"
    assert path.stat().st_size <= MAX_WEIGHT_BYTES
    with safe_open(path, framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_the_model_is_a_llama_whose_vocabulary_is_the_tokenizers(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.mask_token == "<|mask|>"


def test_text_survives_the_tokenizer(tokenizer):
    text = "def f(x):\n    return {'é': x ** 2}  # ü 漢字 \t 1234\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_ids_and_nothing_is_added(tokenizer):
    assert len(tokenizer("<|im_start|>x<|im_end|>")["input_ids"]) == 3
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]


def test_the_template_is_chatml_written_out_by_hand(tokenizer):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_every_earlier_prompt_is_a_prefix_of_the_longer_conversation(tokenizer):
    chat = [
        {"role": "system", "content": " spaces around \n"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "\ntwo\n\n"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    for j in (2, 4):
        prompt = tokenizer.apply_chat_template(chat[:j], add_generation_prompt=True)["input_ids"]
        longer = tokenizer.apply_chat_template(chat[: j + 1])["input_ids"]
        assert longer[: len(prompt)] == prompt


def test_prompts_are_conversations_that_alternate_and_end_with_an_answer():
    for split, at_least in (("train", 2500), ("heldout", 150)):
        chats = read_chats(prompts_path(split))
        assert len(chats) >= at_least
        for chat in chats:
            roles = [message["role"] for message in chat if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(message["content"].strip() for message in chat)


def test_heldout_prompts_and_their_answers_are_not_among_the_training_prompts():
    def questions_and_answers(split: str) -> set[str]:
        return {m["content"] for chat in read_chats(prompts_path(split)) for m in chat if m["role"] == "user"}

    assert not questions_and_answers("train") & questions_and_answers("heldout")


def test_an_unknown_split_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="'train' and 'heldout'"):
        prompts_path("test")


def test_most_greedy_answers_to_heldout_prompts_end_and_do_not_loop(model, tokenizer):
    chats = read_chats(prompts_path("heldout"))[:NUM_GREEDY_PROMPTS]
    prompts = [chat[: [m["role"] for m in chat].index("assistant")] for chat in chats]
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=160, do_sample=False)
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    ended = [ids[: ids.index(tokenizer.eos_token_id)] for ids in answers if tokenizer.eos_token_id in ids]
    all_ids = [ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids for ids in answers]
    assert len(ended) >= 0.8 * len(answers)
    assert sum(map(len, ended)) / len(ended) >= 20
    # Of all answers: those that loop rarely end. The card tells how many do; the bound catches a model gone wrong.
    most_repeated = [
        max(Counter(zip(*(ids[i:] for i in range(8)), strict=False)).values(), default=0) for ids in all_ids
    ]
    assert sum(times >= 4 for times in most_repeated) <= 0.3 * len(answers)
