"""Prompts that end at, before and after the end of a chunk: tokens, states, and how many forwards it takes."""

from __future__ import annotations

import pytest
import torch
import toys

from speculators.decoding import Engine, HFVerifier, SamplingParams
from speculators.interfaces import CaptureSpec

CHUNK, NUM_TOKENS = 8, 6
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK]


class Watching(HFVerifier):
    """Counts prompt forwards."""

    num_prefills = 0

    def score(self, *args, last_only=False, **kwargs):
        self.num_prefills += last_only
        return super().score(*args, last_only=last_only, **kwargs)


class Listening(toys.ScriptedProposer):
    """Keeps what it is told of each new request."""

    def __init__(self, *args):
        super().__init__(*args)
        self.told = []

    def propose(self, committed, num_tokens, sampling):
        for row, (new, total) in enumerate(
            zip(committed.num_new_B.tolist(), committed.num_committed_B.tolist(), strict=True)
        ):
            if new == total > 0:
                self.told.append((committed.token_ids_BT[row, :new].tolist(), committed.states_BTD[row, :new].clone()))
        return super().propose(committed, num_tokens, sampling)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_that_ends_at_a_chunks_end(name, length):
    model = toys.tiny_model(name)
    prompt = toys.prompts(1, seed=length, shortest=length, longest=length)[0]
    expected = toys.generated(model, prompt, NUM_TOKENS)
    capture = CaptureSpec(aux_layer_ids=(1,))
    proposer = Listening(toys.oracle([prompt + expected]), capture)
    verifier = Watching(model, 1, capture)
    engine = Engine(verifier, proposer, num_speculative_tokens=2, max_batch_size=1, prefill_chunk=CHUNK)
    assert engine.generate([prompt], SamplingParams(max_tokens=NUM_TOKENS))[0].token_ids == expected
    assert verifier.num_prefills == -(-length // CHUNK)  # no forward over an empty chunk
    (tokens, states_TD), *others = proposer.told
    assert not others
    assert tokens == [*prompt, expected[0]]
    with torch.inference_mode():
        hidden = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states[1][0]
    assert states_TD[0].eq(0).all()  # row i holds the state that predicted token i
    torch.testing.assert_close(states_TD[1:], hidden, rtol=1e-5, atol=1e-5 * hidden.abs().max().item())


def test_prompts_of_all_these_lengths_together():
    model = toys.tiny_model("mistral_sliding")
    prompts = [toys.prompts(1, seed=n, shortest=n, longest=n)[0] for n in LENGTHS]
    engine = Engine(model, max_batch_size=3, prefill_chunk=CHUNK)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=NUM_TOKENS))
    assert [o.token_ids for o in outputs] == [toys.generated(model, prompt, NUM_TOKENS) for prompt in prompts]
