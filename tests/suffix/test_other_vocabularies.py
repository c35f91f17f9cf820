"""A draft model with another vocabulary or fewer positions than its verifier, through the engine."""

from __future__ import annotations

import pytest
import torch
import toys
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from speculators.decoding import Engine, SamplingParams

V = toys.VOCAB
GREEDY = SamplingParams(max_tokens=13, ignore_eos=True)


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


@pytest.fixture(scope="module")
def verifier():
    return toys.tiny_model("qwen3"), tokenizer([f"Ġw{i}" for i in range(V)])


@pytest.fixture(scope="module")
def other_vocabulary(verifier, tmp_path_factory):
    """The verifier itself under another numbering of its tokens, spelled the other way, and one token less known."""
    folder = tmp_path_factory.mktemp("draft")
    renumbered = torch.randperm(V, generator=torch.Generator().manual_seed(0))  # draft id -> verifier id
    draft = toys.tiny_model("qwen3")
    with torch.no_grad():
        for table in (draft.get_input_embeddings(), draft.get_output_embeddings()):
            table.weight.copy_(table.weight[renumbered])
    draft.save_pretrained(folder)
    tokenizer([f"▁w{i}" for i in renumbered.tolist()]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_model_under_another_numbering_is_always_accepted(verifier, other_vocabulary, batch):
    model, own_tokenizer = verifier
    config = {"model": other_vocabulary, "num_speculative_tokens": 3, "use_heterogeneous_vocab": True}
    engine = Engine(model, config, tokenizer=own_tokenizer, max_batch_size=batch)
    prompts = toys.prompts(3)
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [toys.generated(model, prompt, 13) for prompt in prompts]
    assert engine.stats.acceptance_length == 4.0
    sampled = engine.generate(prompts, SamplingParams(max_tokens=9, temperature=1.0, seed=3))
    plain = Engine(model).generate(prompts, SamplingParams(max_tokens=9, temperature=1.0, seed=3))
    assert [output.token_ids for output in sampled] == [output.token_ids for output in plain]


def test_the_same_draft_read_as_the_verifiers_own_numbering_is_not(verifier, other_vocabulary):
    model, own_tokenizer = verifier
    engine = Engine(model, {"model": other_vocabulary, "num_speculative_tokens": 3}, tokenizer=own_tokenizer)
    prompts = toys.prompts(3)
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [toys.generated(model, prompt, 13) for prompt in prompts]
    assert engine.stats.acceptance_length < 2.0


def test_other_vocabularies_need_a_tokenizer_and_draft_chains(verifier, other_vocabulary):
    model, own_tokenizer = verifier
    config = {"model": other_vocabulary, "num_speculative_tokens": 2, "use_heterogeneous_vocab": True}
    with pytest.raises(ValueError, match="needs the verifier's tokenizer"):
        Engine(model, config)
    with pytest.raises(ValueError, match="drafts chains only"):
        Engine(model, {**config, "speculative_token_tree": "[(0,), (1,), (0, 0)]"}, tokenizer=own_tokenizer)


@pytest.mark.parametrize(("given", "most"), [({}, 32), ({"max_model_len": 20}, 20)])
def test_sequences_longer_than_the_draft_model_are_not_drafted_for(tmp_path, given, most):
    model = toys.tiny_model("llama")
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=V, n_positions=32, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    prompts = [list(range(5, 35)), [7] * 12]
    engine = Engine(model, {"model": str(tmp_path), "num_speculative_tokens": 3, **given})
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [toys.generated(model, prompt, 13) for prompt in prompts]
    for prompt, output in zip(prompts, outputs, strict=True):
        # a round begins at every committed length past the prompt: rows are drafted for up to `most` tokens
        drafted_at = [n for n in range(len(prompt) + 1, len(prompt) + 13) if n <= most]
        assert 0 < output.stats.num_drafts <= len(drafted_at) if drafted_at else output.stats.num_drafts == 0
        assert output.stats.num_drafts < output.stats.num_rounds or len(prompt) + 13 <= most
