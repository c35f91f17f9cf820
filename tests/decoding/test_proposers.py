"""Proposers that need no training, one by one."""

from __future__ import annotations

import random

import pytest
import torch
import toys
from toys import VOCAB

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.proposers.draft_model import TokenIntersection, first_layers
from speculators.decoding.proposers.suffix import NgramIndex, NgramProposer
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal


def brute_force(context: list[int], min_n: int, max_n: int, num_tokens: int) -> list[int]:
    """Algorithm of vLLM's matcher, read literally: longest common suffix, capped; the earliest place that has it."""
    best_length, best_end = 0, None
    for end in range(len(context) - 1):
        length = 0
        while length < max_n and length <= end and context[end - length] == context[len(context) - 1 - length]:
            length += 1
        if length > best_length:
            best_length, best_end = length, end
    if best_end is None or best_length < min_n:
        return []
    return context[best_end + 1 : best_end + 1 + num_tokens]


@pytest.mark.parametrize(("min_n", "max_n"), [(1, 1), (1, 3), (2, 4), (5, 5)])
def test_the_earliest_match_is_the_brute_force_one_however_the_text_arrives(min_n, max_n):
    chooser = random.Random(0)
    for alphabet in (1, 2, 3, 5):
        index, text = NgramIndex(min_n, max_n, "earliest"), []
        for _ in range(120):
            new = [chooser.randrange(alphabet) for _ in range(chooser.randrange(1, 5))]
            index.extend(new)
            text += new
            assert index.draft(4) == brute_force(text, min_n, max_n, 4)


def test_the_latest_match_is_taken_and_copied_on_past_the_end():
    index = NgramIndex(1, 3, "latest")
    index.extend([1, 2, 9, 1, 2, 8, 1, 2])
    assert index.draft(2) == [8, 1]
    index = NgramIndex(1, 3, "latest")
    index.extend([7, 5, 6, 5, 6])
    assert index.draft(5) == [5, 6, 5, 6, 5]


def committed(rows: list[tuple[list[int], int]]) -> Committed:
    """(new tokens, length with them) of each row."""
    width = max(len(tokens) for tokens, _ in rows)
    tokens_BT = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
    return Committed(
        tokens_BT, None, torch.tensor([len(tokens) for tokens, _ in rows]), torch.tensor([total for _, total in rows])
    )


def test_a_row_of_the_ngram_proposer_forgets_the_request_before():
    proposer, sampling = NgramProposer(1, 3, max_batch_size=2), DraftSampling(torch.zeros(2))
    first = proposer.propose(committed([([5, 6, 7, 5], 4), ([8, 9], 2)]), 3, sampling)
    assert first.token_ids_BK.tolist() == [[6, 7, 5], [-1, -1, -1]]
    grown = proposer.propose(committed([([6], 5), ([8], 3)]), 2, sampling)
    assert grown.token_ids_BK.tolist() == [[7, 5], [9, 8]]
    other = proposer.propose(committed([([1, 5], 2), ([], 3)]), 3, sampling)  # row 0 is another request's
    assert other.token_ids_BK.shape == (2, 0)


def test_the_index_never_looks_at_old_text_again():
    class Counted(list):
        reads = 0

        def __getitem__(self, key):
            Counted.reads += 1
            return super().__getitem__(key)

    index = NgramIndex(2, 4)
    index.tokens = Counted()
    index.extend(list(range(1000)))
    costs = []
    for token in (5, 6, 7, 8):
        Counted.reads = 0
        index.extend([token])
        index.draft(4)
        costs.append(Counted.reads)
    assert max(costs) < 20


def test_first_layers_share_weights_and_end_like_the_verifier():
    model = toys.tiny_model("qwen2")
    short = first_layers(model, 2)
    assert short.lm_head is model.lm_head and len(model.model.layers) == 3
    token_ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        stream = model(token_ids, output_hidden_states=True).hidden_states[2]
        expected = model.lm_head(model.model.norm(stream))
        torch.testing.assert_close(short(token_ids, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match=r"early_exit_layer=3 must be in 1\.\.2"):
        first_layers(model, 3)


def test_early_exit_drafts_with_a_quarter_of_the_layers_unless_told():
    model, prompt = toys.tiny_model("llama"), committed([([5, 6, 7, 8], 4)])

    def drafts(**given):
        engine = Engine(model, {"method": "early_exit", "num_speculative_tokens": 4, **given}, max_batch_size=1)
        return engine.drafting.proposer.propose(prompt, 4, DraftSampling(torch.zeros(1))).token_ids_BK.tolist()

    assert drafts() == drafts(early_exit_layer=1) != drafts(early_exit_layer=2)  # of 4 layers


class Vocabulary:
    unk_token_id, eos_token_id = None, 1

    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def test_vocabularies_are_matched_by_what_tokens_spell():
    verifier = Vocabulary(["Ġthe", "a", "b", "only verifier"])
    draft = Vocabulary(["b", "<end>", "▁the", "only draft"])
    both = TokenIntersection(verifier, draft, num_verifier=4, num_draft=4)
    assert both.to_draft(torch.tensor([0, 1, 2, 3])).tolist() == [2, 1, 0, 1]
    logits = torch.tensor([[0.0, 9.0, 1.0, 8.0], [2.0, 0.0, 1.0, 0.0]])
    assert both.best(logits).tolist() == [0, 2]  # draft ids 2 and 0: what only the draft knows is never drafted
    with pytest.raises(ValueError, match="no token in common"):
        TokenIntersection(verifier, Vocabulary(["x"]), num_verifier=4, num_draft=1)


class GivenSeven:
    def __init__(self, config):
        self.config = config

    def propose(self, committed, num_tokens, sampling):
        return Proposal(torch.full((len(committed.num_new_B), num_tokens), 7))


class ReadsStates(GivenSeven):
    capture = CaptureSpec(aux_layer_ids=(1,))

    def propose(self, committed, num_tokens, sampling):
        assert committed.states_BTD.shape[-1] == 32
        return super().propose(committed, num_tokens, sampling)


class Unfit:
    pass


def custom(name: str) -> dict:
    return {"method": "custom_class", "model": f"{__name__}.{name}", "num_speculative_tokens": 2}


@pytest.mark.parametrize("name", ["GivenSeven", "ReadsStates"])
def test_a_custom_class_drafts(name):
    model = toys.tiny_model("llama")
    engine = Engine(model, custom(name))
    assert engine.generate([[5, 6]], SamplingParams(max_tokens=6))[0].token_ids == toys.generated(model, [5, 6], 6)
    assert engine.stats.num_drafted > 0


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (custom("Missing"), AttributeError, "no such class"),
        (custom("Unfit"), AttributeError, "no method `propose`"),
        ({**custom("x"), "model": "no_such_module.Class"}, ImportError, "no_such_module"),
        ({"method": "ngram", "num_speculative_tokens": 0}, ValueError, "greater than 0"),
        ({"method": "ngrams", "num_speculative_tokens": 2}, ValueError, "ngram"),
        ({**custom("GivenSeven"), "speculative_token_tree": "[(0,), (1,)]"}, ValueError, "drafts chains"),
        ({"model": "/nowhere", "num_speculative_tokens": 2}, ValueError, "no draft model at '/nowhere'"),
        (object(), ValueError, "speculative_config is a object"),
        (toys.ScriptedProposer(toys.at_random(0)), ValueError, "needs num_speculative_tokens"),
        (
            {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "enable_adaptive_verification": True,
                "num_speculative_tokens_per_batch_size": [(1, 8, 0)],
            },
            ValueError,
            "both choose how many tokens",
        ),
    ],
)
def test_what_cannot_draft_is_named(config, error, message):
    with pytest.raises(error, match=message):
        Engine(toys.tiny_model("llama"), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"quantization": "fp8"}, "quantization=.fp8. of the"), ({"parallel_drafting": True}, r"\(PARD\) is served")],
)
def test_what_only_a_server_does_with_a_draft_model_is_refused(tmp_path, changes, message):
    toys.tiny_model("llama_tied").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Engine(toys.tiny_model("llama"), {"model": str(tmp_path), "num_speculative_tokens": 2, **changes})


def test_a_number_of_tokens_without_a_drafter_is_refused():
    with pytest.raises(ValueError, match="num_speculative_tokens=3 but no speculative_config"):
        Engine(toys.tiny_model("llama"), num_speculative_tokens=3)


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}


def test_an_acceptance_rule_may_be_named():
    assert not Engine(toys.tiny_model("llama"), NGRAM, rule="typical").drafting.rule.lossless
    with pytest.raises(ValueError, match="'stricter' does not exist"):
        Engine(toys.tiny_model("llama"), NGRAM, rule="stricter")


@pytest.mark.parametrize(
    ("changes", "options"), [({"verifier_accept_k": 3, "accept_tolerance": 1.0}, {}), ({}, {"rule": "greedy"})]
)
def test_a_rule_that_decodes_greedily_refuses_a_temperature(changes, options):
    engine = Engine(toys.tiny_model("llama"), {**NGRAM, **changes}, **options)
    assert len(engine.generate([[5, 6, 5]], SamplingParams(max_tokens=3))[0].token_ids) == 3
    with pytest.raises(ValueError, match=r"temperature=0\.7 but the acceptance rule decodes greedily"):
        engine.generate([[5, 6, 5]], SamplingParams(temperature=0.7))


def test_a_speculators_weights_are_of_the_revision_its_config_was_read_from(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"speculators_model_type": "eagle3"}')
    asked = {}

    def loads(name, **options):
        asked.update(options)
        raise FileNotFoundError("no weights here")

    monkeypatch.setattr("speculators.decoding.proposers.build.SpeculatorModel.from_pretrained", loads)
    config = {"model": str(tmp_path), "num_speculative_tokens": 2}
    for given, expected in (({"revision": "v2"}, "v2"), ({}, "main")):
        with pytest.raises(FileNotFoundError, match="no weights here"):
            Engine(toys.tiny_model("llama"), {**config, **given})
        assert asked["revision"] == expected


def test_a_draft_model_draws_from_its_own_law(tmp_path):
    # the verifier's own weights as draft, drawn at the request's temperature: p = q, so every draft is accepted
    model = toys.tiny_model("llama", vocab_size=VOCAB)
    model.save_pretrained(tmp_path)
    config = {
        "method": "draft_model",
        "model": str(tmp_path),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
        "rejection_sample_method": "standard",
    }
    engine = Engine(model, config)
    params = [SamplingParams(max_tokens=31, temperature=t, seed=i) for i, t in enumerate((0.7, 1.0, 0.0))]
    outputs = engine.generate(toys.prompts(3), params)
    assert engine.stats.acceptance_length > 3.9  # not 4: p and q are computed in different shapes
    again = Engine(model, config).generate(toys.prompts(3), params)
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs]
