"""The verifier at fixed shapes, which a GPU records as graphs: the text of the dynamic forward, token for token."""

import pytest
import torch
import toys
from second_device import DEVICE, SecondDevice

from speculators.decoding import Engine, HFVerifier, SamplingParams
from speculators.decoding.proposers.draft_model import DraftModelProposer, first_layers
from speculators.nn.graphs import launch_by_launch

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
PROMPTS = toys.prompts(5, longest=30)


def decode(model, drafts, graphs, **settings):
    """Five prompts in four rows: one takes a row that another leaves."""
    is_model = drafts == "draft_model"
    proposer = DraftModelProposer(first_layers(model, 1), max_batch_size=4) if is_model else drafts
    engine = Engine(
        model, proposer, num_speculative_tokens=3 if is_model else None, max_batch_size=4, graphs=graphs, max_length=256
    )
    assert engine.verifier.is_lean
    params = [SamplingParams(max_tokens=12 + 3 * i, ignore_eos=True, seed=i, **settings) for i in range(len(PROMPTS))]
    return [output.token_ids for output in engine.generate(PROMPTS, params)]


@pytest.mark.parametrize("drafts", [None, NGRAM, "draft_model"], ids=["plain", "ngram", "draft_model"])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "qwen3"])
def test_fixed_shapes_have_the_text_of_the_dynamic_forward(name, drafts):
    model = toys.tiny_model(name)
    for settings in ({}, {"temperature": 0.9, "top_k": 30}):
        assert decode(model, drafts, "static", **settings) == decode(model, drafts, "off", **settings)


def test_logits_and_states_are_those_of_the_dynamic_forward_also_after_the_cache_grows():
    model = toys.tiny_model("llama", max_position_embeddings=1024)
    capture = toys.CaptureSpec(aux_layer_ids=(1, 4))
    dynamic, static = (HFVerifier(model, 3, capture) for _ in range(2))
    static.use_graphs(launch_by_launch)
    generator = torch.Generator().manual_seed(0)
    with dynamic, static:
        for num_tokens, kept in [(3, [3, 1, 2]), (1, [1, 1, 1]), (4, [0, 2, 4]), (300, [300, 20, 290]), (2, [2, 1, 1])]:
            tokens_BT = torch.randint(3, toys.VOCAB, (3, num_tokens), generator=generator)
            valid_B = torch.full((3,), num_tokens)
            expected, found = dynamic.score(tokens_BT, valid_B), static.score(tokens_BT, valid_B)
            torch.testing.assert_close(found.logits_BTV, expected.logits_BTV, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.states_BTD, expected.states_BTD, atol=1e-4, rtol=1e-4)
            for verifier in (dynamic, static):
                verifier.keep(torch.arange(num_tokens).expand(3, -1), torch.tensor(kept))
    assert dynamic.length_by_row == static.length_by_row == [306, 25, 298]


def test_a_recorded_round_is_a_few_launches_and_one_wait():
    """A record counts as one launch here, and may not read or copy."""
    device, rounds = SecondDevice(), []

    def record(run):
        run()  # makes the tables

        def replay():
            with device.as_one_launch():
                return run()

        return replay

    model = toys.tiny_model("llama")
    with device:
        model = model.to(DEVICE)
        verifier = HFVerifier(model, 4)
        verifier.use_graphs(record)
        keep = verifier.keep

        def counted(*args):
            rounds.append(dict(device.counts))
            device.start_counting()
            return keep(*args)

        verifier.keep = counted
        engine = Engine(verifier, NGRAM, max_batch_size=4, max_length=256)
        engine.generate(PROMPTS[:4], SamplingParams(max_tokens=24, ignore_eos=True))
    steady = rounds[len(rounds) // 2 : -1]
    assert len(steady) > 3
    assert all(counts["reads"] == 1 and counts.get("waits", 0) == 0 for counts in steady)
    assert max(counts["launches"] for counts in steady) <= 50


@pytest.mark.parametrize(("route", "match"), [("fast", "none of"), ("cuda", "use 'auto', or 'static'")])
def test_a_route_that_is_unknown_or_not_there_is_refused(route, match):
    with pytest.raises(ValueError, match=match):
        Engine(toys.tiny_model("llama"), graphs=route)


@pytest.mark.gpu
def test_recorded_graphs_have_the_text_of_their_slow_twin():
    model = toys.tiny_model("llama").cuda()
    for drafts in (None, NGRAM):
        assert decode(model, drafts, "cuda") == decode(model, drafts, "static")
