"""Trees drafted by whole language models: the verifier's own first layers, on many architectures, and its copy."""

from __future__ import annotations

import pytest
import toys

from speculators.decoding import Engine, SamplingParams

TREE = "[(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]"
NUM_TOKENS = 12


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["llama_tied", "mistral_sliding", "gemma2", "gemma3", "phi", "gpt_oss"])
def test_greedy_text_is_transformers_own(name, batch):
    model, prompts = toys.tiny_model(name), toys.prompts(8, longest=18)
    prompts = prompts if batch == 8 else prompts[:2]
    engine = Engine(
        model, {"method": "early_exit", "early_exit_layer": 1, "speculative_token_tree": TREE}, max_batch_size=batch
    )
    outputs = engine.generate(prompts, SamplingParams(max_tokens=NUM_TOKENS))
    assert [o.token_ids for o in outputs] == [toys.generated(model, prompt, NUM_TOKENS) for prompt in prompts]
    assert engine.stats.num_drafted > 3 * engine.stats.num_drafts


@pytest.mark.parametrize("name", ["qwen3", "mistral_sliding"])
def test_a_draft_with_the_verifiers_own_law_is_accepted_at_its_first_sibling(name, tmp_path):
    """q = p: min(1, p / q) is 1 all the way down, so every round emits the longest first-sibling path and one more."""
    model = toys.tiny_model(name)
    model.save_pretrained(tmp_path)
    config = {
        "method": "draft_model",
        "model": str(tmp_path),
        "num_speculative_tokens": 3,
        "speculative_token_tree": TREE,
        "rejection_sample_method": "standard",
        "draft_sample_method": "probabilistic",
    }
    engine = Engine(model, config, max_batch_size=3)
    params = SamplingParams(max_tokens=1 + 4 * 4, temperature=1.5, seed=1)
    engine.generate(toys.prompts(6, longest=30), params)
    assert engine.stats.acceptance_length > 3.95  # not 4: p and q are computed in different shapes
