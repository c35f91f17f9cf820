"""Drafts per request: requests of one batch that say their own number of draft tokens and their own method."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.proposers.draft_model import first_layers
from speculators.decoding.request import StreamEvent
from speculators.evaluation.config import EvaluateConfig
from speculators.interfaces import CaptureSpec

NGRAM = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SUFFIX = {
    "method": "suffix",
    "num_speculative_tokens": 6,
    "suffix_decoding_min_token_prob": 0.0,
    "suffix_decoding_max_spec_factor": 4.0,
}
PROMPTS = [[5, 6, 7, 8] * 4, [9, 10, 11] * 5, [12, 13] * 6, [14, 15, 16, 17, 18] * 3, [20, 21] * 5]
SAID = [
    {"num_speculative_tokens": 0},
    {"num_speculative_tokens": 6},
    {},
    {"method": "suffix", "num_speculative_tokens": 2},
    {"method": "none"},
]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "seed": 3}])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_numbers_and_methods_share_a_batch_and_the_texts_are_those_of_plain_decoding(sampled, batch_size):
    model = toys.tiny_model("llama")
    plain = Engine(model)
    alone = [plain.generate([p], SamplingParams(max_tokens=24, **sampled))[0].token_ids for p in PROMPTS]
    engine = Engine(model, NGRAM, other_methods={"suffix": SUFFIX}, max_batch_size=batch_size)
    params = [SamplingParams(max_tokens=24, **sampled, **said) for said in SAID]
    outputs = engine.generate(PROMPTS, params)
    assert [output.token_ids for output in outputs] == alone
    none, six, default, suffix, plainly = (output.stats for output in outputs)
    assert none.num_drafted == plainly.num_drafted == 0 and none.num_rounds == plainly.num_rounds == 23
    assert len(six.drafted_per_position) == len(default.drafted_per_position) == 6
    assert len(suffix.drafted_per_position) == 2
    assert engine.stats.num_drafted == sum(output.stats.num_drafted for output in outputs)


def oracle_engine(num_methods: int, **options) -> tuple[Engine, list[list[int]]]:
    """Each method knows its own prompts' texts, and fails when it is given a row of another's."""
    model = toys.tiny_model("llama")
    prompts = toys.prompts(2 * num_methods)
    texts = [prompt + toys.generated(model, prompt, 40) for prompt in prompts]
    scripts = [toys.ScriptedProposer(toys.oracle(texts[i::num_methods])) for i in range(num_methods)]
    first, *others = scripts
    names = [f"other-{i}" for i in range(1, num_methods)]
    engine = Engine(
        model, first, num_speculative_tokens=4, other_methods=dict(zip(names, others, strict=True)), **options
    )
    return engine, prompts


def test_each_request_counts_its_own_drafts():
    engine, prompts = oracle_engine(1)
    params = [SamplingParams(max_tokens=13, num_speculative_tokens=number) for number in (3, 1)]
    first, second = engine.generate(prompts, params)
    # one token from the prompt, then rounds of K accepted drafts and a bonus
    assert first.stats.rounds == Counter({(3, 3, 3): 3}) and second.stats.rounds == Counter({(1, 1, 1): 6})


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_method_sees_its_own_requests_only(batch_size):
    engine, prompts = oracle_engine(2, max_batch_size=batch_size)
    params = [
        SamplingParams(max_tokens=30, method=method, num_speculative_tokens=number)
        for method, number in [(None, 4), ("other-1", 3), ("ScriptedProposer", None), ("other-1", None)]
    ]
    outputs = engine.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == toys.generated(MODEL, prompt, 30)
        assert output.stats.num_accepted >= 29 - output.stats.num_rounds
        assert output.stats.acceptance_rate == 1 or output.stats.num_drafted - output.stats.num_accepted < 4


MODEL = toys.tiny_model("llama")


class Reading(toys.ScriptedProposer):
    """Compares the states that it is given with those of the model's own forward over the row's text."""

    def __init__(self, draft, capture: CaptureSpec, streams):
        super().__init__(draft, capture)
        self.streams, self.num_read = streams, 0

    def propose(self, committed, num_tokens, sampling):
        proposal = super().propose(committed, num_tokens, sampling)
        assert len(committed.states_BTD) == len(committed.token_ids_BT)
        for row, new in enumerate(committed.num_new_B.tolist()):
            if new:
                text = self.text_by_row[row]
                expected_TD = torch.cat([self.streams(text)[i] for i in self.capture.aux_layer_ids or (-1,)], -1)
                expected_TD = torch.cat([torch.zeros_like(expected_TD[:1]), expected_TD[:-1]])[-new:]
                torch.testing.assert_close(committed.states_BTD[row, :new], expected_TD, rtol=1e-4, atol=1e-4)
                self.num_read += 1
        return proposal


def streams(text: list[int]) -> list[torch.Tensor]:
    """[T, H] before each decoder layer, and before the final norm."""
    seen: list[torch.Tensor] = []
    modules = [*MODEL.model.layers, MODEL.model.norm]
    hooks = [
        module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0][0]), with_kwargs=True)
        for module in modules
    ]
    MODEL(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return seen


def test_each_method_is_given_the_states_that_it_reads():
    prompts = toys.prompts(4)
    texts = [prompt + toys.generated(MODEL, prompt, 20) for prompt in prompts]
    captures = [CaptureSpec((1, 3)), CaptureSpec((2, 3)), CaptureSpec(last_hidden=True)]
    readers = [Reading(toys.oracle(texts[i : i + 1], 2), capture, streams) for i, capture in enumerate(captures)]
    blind = toys.ScriptedProposer(toys.oracle(texts[3:]))
    others = {"two": readers[1], "last": readers[2], "blind": blind}
    engine = Engine(MODEL, readers[0], num_speculative_tokens=3, other_methods=others, prefill_chunk=5)
    assert engine.drafters.capture == CaptureSpec((1, 2, 3, 4))
    params = [SamplingParams(max_tokens=16, method=method) for method in (None, "two", "last", "blind")]
    outputs = engine.generate(prompts, params)
    assert [p + o.token_ids for p, o in zip(prompts, outputs, strict=True)] == [text[:-4] for text in texts]
    assert all(reader.num_read >= 5 for reader in readers) and blind.num_calls >= 3


def test_a_tree_is_cut_at_the_depth_that_a_request_says():
    prompt = toys.prompts(1)[0]
    text = prompt + toys.generated(MODEL, prompt, 24)
    engine = Engine(MODEL, toys.TreeProposer([text], [-1, -1, 0, 1], [1, 3]), num_speculative_tokens=2)
    params = [SamplingParams(max_tokens=9, num_speculative_tokens=1), SamplingParams(max_tokens=18)]
    cut, whole = engine.generate([prompt] * 2, params)
    assert cut.token_ids == whole.token_ids[:9] == text[len(prompt) : len(prompt) + 9]
    assert set(cut.stats.rounds) == {(2, 1, 1)} and (4, 2, 2) in whole.stats.rounds


def test_rounds_in_which_a_request_says_its_number_teach_the_adaptive_length_nothing():
    engine = Engine(MODEL, {**NGRAM, "enable_adaptive_verification": True})
    expected = toys.generated(MODEL, PROMPTS[0], 20)
    said = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=20, num_speculative_tokens=3, ignore_eos=True))[0]
    adaptive = engine.drafting.adaptive
    assert said.token_ids == expected and adaptive.num_rounds == 0 and not adaptive.costs.verify_s
    assert len(said.stats.drafted_per_position) == 3
    free = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=20, ignore_eos=True))[0]
    assert free.token_ids == expected and adaptive.num_rounds == free.stats.num_rounds and adaptive.costs.verify_s


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_speculative_tokens": 7}, "num_speculative_tokens=7: this engine's 'ngram' drafts at most 6"),
        ({"method": "sufix"}, "method='sufix' is none of this engine's: .* Did you mean 'suffix'"),
        ({"method": "none", "num_speculative_tokens": 2}, "plain decoding drafts nothing"),
    ],
)
def test_what_the_engine_cannot_draft_is_named(said, message):
    engine = Engine(MODEL, NGRAM, other_methods={"suffix": SUFFIX})
    with pytest.raises(ValueError, match=message):
        engine.generate([[5]], SamplingParams(**said))


@pytest.mark.parametrize("said", [{"num_speculative_tokens": 2}, {"method": "ngram"}])
def test_an_engine_without_a_drafter_says_so(said):
    with pytest.raises(ValueError, match="this engine drafts nothing; give it a speculative_config"):
        Engine(MODEL).generate([[5]], SamplingParams(**said))
    quiet = SamplingParams(max_tokens=3, method="none", num_speculative_tokens=0)
    assert Engine(MODEL).generate([[5]], quiet)[0].token_ids == toys.generated(MODEL, [5], 3)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"ngram": SUFFIX}, "each needs a name of its own"),
        ({"none": SUFFIX}, "each needs a name of its own"),
        ({"drawn": {**SUFFIX, "rejection_sample_method": "standard"}}, "need one acceptance rule"),
    ],
)
def test_methods_that_cannot_be_told_apart_or_verified_together_are_refused(others, message):
    with pytest.raises(ValueError, match=message):
        Engine(MODEL, NGRAM, other_methods=others)


def test_a_tree_beside_another_method_drafts_for_its_own_rows():
    """In one round: the rows share the tree's shape with the chain's beside it."""
    prompts = [[5] * 8, [5], [7, 3], [5]]
    texts = [prompt + toys.generated(MODEL, prompt, 9) for prompt in prompts]
    tree = toys.TreeProposer(texts, [-1, -1, 0, 1], [1, 3])
    chain = toys.ScriptedProposer(toys.oracle(texts))
    for first, second in ((chain, tree), (tree, chain)):
        engine = Engine(MODEL, first, other_methods={"second": second}, num_speculative_tokens=2, rule="standard")
        params = [SamplingParams(max_tokens=9, ignore_eos=True, method=["second", None][i % 2]) for i in range(4)]
        outputs = engine.generate(prompts, params)
        assert [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)] == texts
        assert all(output.stats.num_accepted > 3 for output in outputs)


def test_names_open_an_engine_with_several_methods(tmp_path):
    MODEL.save_pretrained(tmp_path)
    others = ["suffix", {"method": "ngram", "num_speculative_tokens": 2}]
    engine = Engine.from_pretrained(str(tmp_path), "ngram", other_methods=others, tokenizer=Silent())
    assert engine.drafters.most_tokens == {"ngram": 4, "suffix": 24, "ngram-2": 2}


class Silent:
    eos_token_id = None

    def decode(self, token_ids, skip_special_tokens=True):
        return ""


def test_the_number_of_an_evaluations_methods_is_not_that_of_its_requests():
    config = EvaluateConfig(verifier="v", data="d", num_speculative_tokens=5)
    assert config.sampling().num_speculative_tokens is None


# -- requests that come while others are decoded


def test_requests_join_and_leave_a_running_batch():
    prompts = [toys.prompts(1, seed=1)[0], toys.prompts(1, seed=2, shortest=19)[0], *toys.prompts(3, seed=3)]
    texts = [prompt + toys.generated(MODEL, prompt, 30) for prompt in prompts]
    reader = Reading(toys.oracle(texts, 2), CaptureSpec((1, 3)), streams)
    engine = Engine(MODEL, reader, num_speculative_tokens=3, max_batch_size=3, prefill_chunk=4, rule="strict")
    penalised = {"repetition_penalty": 1.3}
    alone = Engine(MODEL).generate([prompts[4]], SamplingParams(max_tokens=20, **penalised))[0].token_ids
    said = [{}, {"num_speculative_tokens": 1}, {"num_speculative_tokens": 0}, {}, {**penalised, "method": "none"}]
    requests = [
        engine.request(i, prompt, SamplingParams(max_tokens=20, **extra))[0]
        for i, (prompt, extra) in enumerate(zip(prompts, said, strict=True))
    ]
    came = {0: [0], 2: [1], 3: [2, 3], 9: [4]}  # by round: others are decoding then
    is_idle_at = []

    def arrivals(is_idle: bool):
        number = len(is_idle_at)
        is_idle_at.append(is_idle)
        if number == 5:
            engine.cancel(2)
        if number > max(came) and is_idle:
            return None
        return [requests[i] for i in came.get(number, [])]

    finished = {event.request_index: event.finish_reason for event in engine.serve(arrivals) if event.finish_reason}
    assert finished == {0: "length", 1: "length", 2: "cancelled", 3: "length", 4: "length"}
    for i in (0, 1, 3):
        assert requests[i].output.token_ids == texts[i][len(prompts[i]) :][:20]
    assert requests[4].output.token_ids == alone
    cancelled = requests[2].output.token_ids
    assert cancelled == texts[2][len(prompts[2]) :][: len(cancelled)] and len(cancelled) < 20
    assert is_idle_at[0] and is_idle_at[-1] and not any(is_idle_at[1:9])
    assert engine.stats.num_tokens == 80 + len(cancelled)
    assert engine.stats.num_drafted == sum(request.output.stats.num_drafted for request in requests)


def test_requests_that_are_running_when_serving_ends_are_cancelled():
    engine = Engine(MODEL, NGRAM)
    request = engine.request(7, [5, 6], SamplingParams(max_tokens=50))[0]
    arrivals = iter([[request], [], None])
    events = list(engine.serve(lambda is_idle: next(arrivals)))
    assert {event.request_index for event in events} == {7}
    assert request.output.finish_reason == "cancelled" and request.output.token_ids
    assert engine.generate([[5]], SamplingParams(max_tokens=2))[0].token_ids == toys.generated(MODEL, [5], 2)


@pytest.mark.parametrize("sampled", [{"temperature": 0.0}, {"temperature": 1.5, "seed": 3}])
def test_a_round_tells_drafts_with_the_drafters_own_probabilities_where_they_are_asked_for(sampled):
    """Compared with the drafter alone: what it makes of the text up to each draft, without a temperature."""
    model = toys.tiny_model("llama")
    early = first_layers(model, 1)
    early_exit = {"method": "early_exit", "early_exit_layer": 1, "num_speculative_tokens": 3}
    engine = Engine(model, early_exit, other_methods={"ngram": NGRAM}, max_batch_size=3)
    asking = SamplingParams(max_tokens=16, logprobs=1, **sampled)
    params = [asking, replace(asking, logprobs=None), replace(asking, method="ngram")]
    events: list[StreamEvent] = []
    outputs = engine.generate(PROMPTS[:3], params, on_token=events.append)
    texts, num_compared, num_rejected = [list(prompt) for prompt in PROMPTS[:3]], 0, 0
    for event in events:
        text, drafted = texts[event.request_index], event.drafted
        assert event.token_ids[: event.num_accepted] == list(drafted.token_ids[: event.num_accepted])
        assert len(drafted.token_ids) == drafted.depth
        if event.request_index != 0 or not drafted.token_ids:
            assert drafted.own_probs is None
        else:
            whole = torch.tensor([[*text, *drafted.token_ids]])
            probs_TV = early(whole).logits[0].softmax(-1)
            own = [float(probs_TV[len(text) + k - 1, token]) for k, token in enumerate(drafted.token_ids)]
            assert drafted.own_probs == pytest.approx(own, rel=1e-4)
            num_compared += len(own)
            num_rejected += event.num_accepted < drafted.depth
        text += event.token_ids
    assert [text[len(p) :] for text, p in zip(texts, PROMPTS[:3], strict=True)] == [o.token_ids for o in outputs]
    assert num_compared >= 10 and num_rejected >= 2
    assert any(event.request_index == 2 and event.drafted.token_ids for event in events)
