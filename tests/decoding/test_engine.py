"""What the engine does around the loop: stops, streams, admission, chunked prefill, cancellation, seeds, statistics."""

from __future__ import annotations

import pytest
import torch
import toys

from speculators.decoding import DecodeStats, Engine, HFVerifier, SamplingParams
from speculators.decoding.request_builder import end_of_sequence_ids
from speculators.interfaces import CaptureSpec

V = toys.VOCAB


class LetterTokenizer:
    """Token i is a letter, so that what a stop string means can be read off. Id 2 ends a sequence."""

    eos_token_id = 2

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(letter(i) for i in token_ids if not (skip_special_tokens and i == 2))

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [next(i for i in range(V) if letter(i) == c) for c in text]})


def letter(token_id: int) -> str:
    return chr(ord("0") + token_id)


def cycle(*token_ids: int) -> torch.Tensor:
    """A table that walks the given tokens forever."""
    probs_VV = torch.full((V, V), 1e-9)
    for here, there in zip(token_ids, (*token_ids[1:], token_ids[0]), strict=True):
        probs_VV[here, there] = 1.0
    return probs_VV / probs_VV.sum(-1, keepdim=True)


def engine_on(token_ids, drafts=None, **options):
    """A verifier that walks a cycle, and drafts that are right `drafts` tokens deep (None: plain decoding)."""
    walk = list(token_ids) * 50
    proposer = None
    if drafts is not None:
        options["num_speculative_tokens"] = 5
        proposer = toys.ScriptedProposer(toys.oracle([walk], drafts))
    return Engine(toys.MarkovVerifier(cycle(*token_ids)), proposer, tokenizer=LetterTokenizer(), **options)


ABC = [50, 51, 52, 53, 54, 55]  # b c d e f g
TEXT = "".join(letter(i) for i in ABC)


@pytest.mark.parametrize("drafts", [None, 0, 3, 5])
@pytest.mark.parametrize(
    ("params", "tokens", "text", "reason"),
    [
        ({"max_tokens": 7}, [51, 52, 53, 54, 55, 50, 51], TEXT[1:] + TEXT[:2], "length"),
        ({"stop_token_ids": [53]}, [51, 52, 53], TEXT[1:3], "stop"),  # as in vLLM: its text is left out
        ({"stop_token_ids": [53], "include_stop_str_in_output": True}, [51, 52, 53], TEXT[1:4], "stop"),
        ({"stop": TEXT[3:5]}, [51, 52, 53, 54], TEXT[1:3], "stop"),
        ({"stop": TEXT[3:5], "include_stop_str_in_output": True}, [51, 52, 53, 54], TEXT[1:5], "stop"),
        ({"stop": ["zz", TEXT[4]]}, [51, 52, 53, 54], TEXT[1:4], "stop"),
        # the stop string begins inside one run and may end in the next
        ({"stop": TEXT[2:] + TEXT[:3]}, [51, 52, 53, 54, 55, 50, 51, 52], TEXT[1:2], "stop"),
    ],
)
def test_stops_apply_inside_an_accepted_run(drafts, params, tokens, text, reason):
    output = engine_on(ABC, drafts).generate([ABC[:1]], SamplingParams(**params))[0]
    assert (output.token_ids, output.text, output.finish_reason) == (tokens, text, reason)
    assert output.stats.num_tokens == len(tokens)


def test_of_stop_strings_that_end_together_the_text_is_cut_before_the_first():
    for stop in ([TEXT[2:5], TEXT[3:5]], [TEXT[3:5], TEXT[2:5]]):
        assert engine_on(ABC).generate([ABC[:1]], SamplingParams(stop=stop))[0].text == TEXT[1:2]


def test_one_stop_may_be_given_without_a_list_and_none_means_none():
    params = SamplingParams(stop="ab", stop_token_ids=5)
    assert (params.stop, params.stop_token_ids) == (("ab",), (5,))
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


@pytest.mark.parametrize("drafts", [None, 5])
def test_the_end_of_sequence_token_ends_a_request_unless_ignored(drafts):
    engine = engine_on([50, 51, 2, 52], drafts)
    assert engine.generate([[50]])[0].token_ids == [51, 2]
    assert engine.generate([[50]])[0].text == letter(51)
    ignoring = engine.generate([[50]], SamplingParams(max_tokens=4, ignore_eos=True))[0]
    assert ignoring.token_ids == [51, 2, 52, 50]


@pytest.mark.parametrize(
    ("generation", "config", "of_tokenizer", "expected"),
    [
        ([2, 7], 5, 9, {2, 7, 9}),  # the generation config goes before the config
        (None, 5, None, {5}),
        (None, None, 9, {9}),
        (None, None, None, set()),
    ],
)
def test_a_model_says_which_tokens_end_its_sequences(generation, config, of_tokenizer, expected):
    model = toys.tiny_model("llama")
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = of_tokenizer
    assert end_of_sequence_ids(model, tokenizer) == expected
    prompt = [5, 6, 7]
    plain = toys.generated(model, prompt, 30)
    num_taken = next((i + 1 for i, token in enumerate(plain) if token in expected), 30)
    output = Engine(model, tokenizer=tokenizer).generate([prompt], SamplingParams(max_tokens=30))[0]
    assert output.token_ids == plain[:num_taken]


def test_requests_end_at_max_length():
    engine = engine_on(ABC, 5, max_length=10)
    output = engine.generate([ABC[:4]], SamplingParams(max_tokens=100))[0]
    assert len(output.prompt_token_ids) + len(output.token_ids) == 10
    assert output.finish_reason == "length"


def test_streamed_pieces_make_up_the_output():
    params = SamplingParams(max_tokens=11)
    whole = engine_on(ABC, 3).generate([ABC[:1], ABC[:2]], params)
    events = list(engine_on(ABC, 3).stream([ABC[:1], ABC[:2]], params))
    for index, output in enumerate(whole):
        mine = [event for event in events if event.request_index == index]
        assert [t for event in mine for t in event.token_ids] == output.token_ids
        assert "".join(event.text for event in mine) == output.text
        assert [event.finish_reason for event in mine][-1] == "length"
        assert not any(event.finish_reason for event in mine[:-1])


@pytest.mark.parametrize("drafts", [None, 0, 2, 5])
@pytest.mark.parametrize("stop", [[TEXT[3:5]], [TEXT[2:] + TEXT[:3]], ["zz", TEXT[1:3] + "z", TEXT[4:] + TEXT[0]]])
def test_streamed_pieces_never_show_the_beginning_of_a_stop_string(drafts, stop):
    params = SamplingParams(max_tokens=15, stop=stop)
    whole = engine_on(ABC, drafts).generate([ABC[:1]], params)[0]
    pieces = [event.text for event in engine_on(ABC, drafts).stream([ABC[:1]], params)]
    assert "".join(pieces) == whole.text
    assert whole.finish_reason == "stop"


def test_what_waited_for_a_stop_string_is_shown_when_it_does_not_come():
    almost = SamplingParams(max_tokens=3, stop=TEXT[2:4] + "z")  # c, d, e of which "de" may begin it
    assert [event.text for event in engine_on(ABC).stream([ABC[:1]], almost)] == [TEXT[1], "", TEXT[2:4]]
    engine = engine_on(ABC)
    pieces = []
    for event in engine.stream([ABC[:1]], SamplingParams(max_tokens=9, stop=TEXT[2] + "z")):
        pieces.append((event.text, event.finish_reason))
        if len(pieces) == 2:
            engine.cancel(0)
    assert pieces == [(TEXT[1], None), ("", None), (TEXT[2], "cancelled")]


def test_closing_a_stream_leaves_the_engine_usable():
    engine = engine_on(ABC, 3)
    stream = engine.stream([ABC[:1]], SamplingParams(max_tokens=50))
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert engine.generate([ABC[:1]], SamplingParams(max_tokens=2))[0].token_ids == ABC[1:3]


def test_an_unfinished_stream_holds_the_engine():
    engine, params = engine_on(ABC, 3), SamplingParams(max_tokens=9)
    stream = engine.stream([ABC[:1]], params)
    tokens = next(stream).token_ids
    with pytest.raises(ValueError, match="their stream has not ended"):
        engine.generate([ABC[:1]], params)
    for event in stream:
        tokens = tokens + event.token_ids
    assert tokens == engine.generate([ABC[:1]], params)[0].token_ids == (ABC * 2)[1:10]


def test_a_callback_cancels_its_request_alone():
    outputs = engine_on(ABC, 3).generate(
        [ABC[:1], ABC[:1]], SamplingParams(max_tokens=30), on_token=lambda event: event.request_index != 1
    )
    assert [output.finish_reason for output in outputs] == ["length", "cancelled"]
    assert len(outputs[1].token_ids) < 30


def test_a_callback_may_cancel_a_request_that_waits():
    engine = engine_on(ABC, max_batch_size=1)
    outputs = engine.generate(
        [ABC[:1], ABC[:1]], SamplingParams(max_tokens=4), on_token=lambda event: engine.cancel(1) or True
    )
    assert outputs[1].token_ids == [] and outputs[1].finish_reason == "cancelled"


def test_rows_are_refilled_as_requests_end():
    # 12 requests of different lengths through 3 rows equal each one alone
    model = toys.tiny_model("llama")
    prompts = toys.prompts(12, longest=40)
    params = [SamplingParams(max_tokens=3 + 4 * (i % 5)) for i in range(12)]
    expected = [toys.generated(model, p, q.max_tokens) for p, q in zip(prompts, params, strict=True)]
    texts = [p + e for p, e in zip(prompts, expected, strict=True)]
    for proposer in (None, toys.ScriptedProposer(toys.oracle(texts, 2))):
        engine = Engine(model, proposer, num_speculative_tokens=4 if proposer else None, max_batch_size=3)
        outputs = engine.generate(prompts, params)
        assert [output.token_ids for output in outputs] == expected


def test_progress_counts_finished_requests():
    seen = []
    engine = engine_on(ABC, 2, max_batch_size=2)
    engine.generate(
        [ABC[:1]] * 5, SamplingParams(max_tokens=4), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 5) for done in range(1, 6)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_prompts_in_chunks_equal_prompts_at_once(name):
    model = toys.tiny_model(name)
    prompts = toys.prompts(5, longest=60)
    expected = [toys.generated(model, prompt, 10) for prompt in prompts]
    texts = [p + e for p, e in zip(prompts, expected, strict=True)]
    engine = Engine(
        model, toys.ScriptedProposer(toys.oracle(texts)), num_speculative_tokens=3, max_batch_size=2, prefill_chunk=7
    )
    outputs = engine.generate(prompts, SamplingParams(max_tokens=10))
    assert [output.token_ids for output in outputs] == expected


@pytest.mark.parametrize("name", ["llama", "mistral_sliding"])
def test_a_shared_prompt_start_is_computed_once(name):
    model = toys.tiny_model(name)
    start = toys.prompts(1, shortest=40, longest=40)[0]
    prompts = [start + own for own in toys.prompts(5, seed=1, longest=9)] + [start]
    scored = []

    class Counting(HFVerifier):
        def score(self, token_ids_BT, num_valid_B, parents_K=None, *, first_row=0, last_only=False):
            scored.append(int(num_valid_B.sum()) if last_only else 0)
            return super().score(token_ids_BT, num_valid_B, parents_K, first_row=first_row, last_only=last_only)

    engine = Engine(Counting(model, 3), max_batch_size=3)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=8))
    assert [output.token_ids for output in outputs] == [toys.generated(model, prompt, 8) for prompt in prompts]
    assert sum(scored) == sum(map(len, prompts)) - 5 * 40 + 1  # the last prompt is all prefix: one token is scored


def test_the_proposer_is_given_the_states_that_predicted_each_token():
    model = toys.tiny_model("qwen3")
    spec = CaptureSpec(aux_layer_ids=(1, 2))
    prompts = toys.prompts(4, longest=30)
    expected = [toys.generated(model, prompt, 12) for prompt in prompts]
    texts = [p + e for p, e in zip(prompts, expected, strict=True)]
    rows: dict[int, list[torch.Tensor]] = {}
    done: list[tuple[list[int], torch.Tensor]] = []

    class Recorder(toys.ScriptedProposer):
        def propose(self, committed, num_tokens, sampling):
            for row, (new, total) in enumerate(
                zip(committed.num_new_B.tolist(), committed.num_committed_B.tolist(), strict=True)
            ):
                if new == total > 0:
                    rows[row] = []
                if new:
                    rows[row].append(committed.states_BTD[row, :new].clone())
            proposal = super().propose(committed, num_tokens, sampling)
            done[:] = done + [(list(self.text_by_row[r]), torch.cat(states)) for r, states in rows.items()]
            return proposal

    for tree in (False, True):
        proposer: object = Recorder(toys.oracle(texts, 2), spec)
        if tree:
            inner = toys.TreeProposer(texts, [-1, -1, 1, 1], [1, 3])
            inner.capture, recorder = spec, Recorder(toys.oracle(texts), spec)
            inner._scripted, proposer = recorder, inner
        engine = Engine(model, proposer, num_speculative_tokens=4, max_batch_size=2, prefill_chunk=8)
        engine.generate(prompts, SamplingParams(max_tokens=12))
        assert len(done) > 10
        for text, states_TD in done:
            with torch.inference_mode():
                hidden = model(torch.tensor([text]), output_hidden_states=True, use_cache=False).hidden_states
            expected_TD = torch.cat([hidden[1], hidden[2]], -1)[0]
            assert len(states_TD) == len(text)
            torch.testing.assert_close(states_TD[1:], expected_TD[:-1], rtol=1e-4, atol=1e-4)
        rows.clear(), done.clear()


def test_a_seed_gives_the_same_text_whatever_the_batch_and_the_drafts():
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(0)).pow(4)
    verifier = toys.MarkovVerifier(table / table.sum(-1, keepdim=True))
    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=seed) for seed in (7, 8, 9)]
    alone = [Engine(verifier).generate([[5]], p)[0].token_ids for p in params]
    together = Engine(verifier, seed=3).generate([[5]] * 3, params)
    drafted = Engine(verifier, toys.ScriptedProposer(toys.at_random(1)), num_speculative_tokens=3)
    assert [o.token_ids for o in together] == alone
    assert [o.token_ids for o in drafted.generate([[5]] * 3, params)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


@pytest.mark.parametrize("drafted", [False, True])
def test_greedy_and_sampled_requests_share_a_batch(drafted):
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(0)).pow(2)
    verifier = toys.MarkovVerifier(table / table.sum(-1, keepdim=True))
    kinds = [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}, {"temperature": 0.6, "top_k": 9}, {"min_p": 0.1}]
    params = [SamplingParams(max_tokens=20, seed=i, **kind) for i, kind in enumerate(kinds)]
    alone = [Engine(verifier).generate([[5]], p)[0].token_ids for p in params]
    proposer = toys.ScriptedProposer(toys.at_random(1)) if drafted else None
    engine = Engine(verifier, proposer, num_speculative_tokens=3 if drafted else None)
    assert [o.token_ids for o in engine.generate([[5]] * 5, params)] == alone
    greedy = [5]
    for _ in range(20):
        greedy.append(int(table[greedy[-1]].argmax()))
    assert alone[0] == greedy[1:] != alone[1]


def test_a_row_that_a_prompt_left_at_once_gets_the_next_ones_parameters():
    # row 0's request ends with its first token; row 1 decodes beside a free row; then row 0 is taken again
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(0)).pow(2)
    verifier = toys.MarkovVerifier(table / table.sum(-1, keepdim=True))
    params = [SamplingParams(max_tokens=n, temperature=1.0, seed=n) for n in (1, 30, 20)]
    alone = [Engine(verifier).generate([[5]], p)[0].token_ids for p in params]
    together = Engine(verifier, max_batch_size=2).generate([[5]] * 3, params)
    assert [o.token_ids for o in together] == alone


def test_unseeded_requests_differ():
    verifier = toys.MarkovVerifier(torch.full((V, V), 1 / V))
    outputs = Engine(verifier).generate([[5], [5]], SamplingParams(max_tokens=10, temperature=1.0))
    assert outputs[0].token_ids != outputs[1].token_ids


@pytest.mark.parametrize("drafts", [None, 3, "tree"])
def test_logprobs_are_the_verifiers_own(drafts):
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(0)).pow(9)
    table /= table.sum(-1, keepdim=True)
    verifier = toys.MarkovVerifier(table)
    reference = Engine(verifier).generate([[5]], SamplingParams(max_tokens=9))[0]
    text = [5, *reference.token_ids]
    proposer = toys.ScriptedProposer(toys.oracle([text], drafts)) if drafts == 3 else None
    if drafts == "tree":  # the right path is columns 2 and 4
        proposer = toys.TreeProposer([text], [-1, -1, 0, 1], [1, 3])
    engine = Engine(verifier, proposer, num_speculative_tokens=4 if drafts else None)
    output = engine.generate([[5]], SamplingParams(max_tokens=9, logprobs=2))[0]
    assert output.token_ids == reference.token_ids and len(output.logprobs) == 9
    for before, token, entry in zip([5, *output.token_ids], output.token_ids, output.logprobs, strict=False):
        assert entry.logprob == pytest.approx(table[before, token].log().item(), abs=1e-4)
        assert list(entry.top) == table[before].topk(2).indices.tolist()


def test_stats_count_what_was_offered_and_accepted():
    engine = engine_on(ABC, 3)
    stats = engine.generate([ABC[:1]], SamplingParams(max_tokens=9))[0].stats
    # one token from the prompt, then rounds of 3 accepted + 1: 1 + 4 + 4
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted, stats.num_tokens) == (2, 10, 6, 9)
    assert stats.accepted_histogram == [0, 0, 0, 2, 0, 0]
    assert stats.accepted_per_position == [2, 2, 2, 0, 0] and stats.drafted_per_position == [2] * 5
    assert stats.conditional_rates == [1, 1, 1, 0, 0]
    assert (stats.acceptance_length, stats.acceptance_rate) == (4.0, 0.6)
    assert (stats + DecodeStats() + stats).num_accepted == 12
    assert engine.stats.num_accepted == 6


def test_a_schedule_by_batch_size_may_turn_drafting_off():
    table = [(1, 1, 4), (2, 8, 0)]
    model = toys.tiny_model("llama")
    config = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
        "num_speculative_tokens_per_batch_size": table,
    }
    prompts = [[5, 6, 7, 8] * 6, [9, 10, 11, 12] * 6]
    params = [SamplingParams(max_tokens=30), SamplingParams(max_tokens=6)]
    outputs = Engine(model, config, max_batch_size=2).generate(prompts, params)
    assert outputs[1].stats.num_drafted == 0
    assert outputs[0].stats.num_drafted > 0  # alone once the other is done; what it missed was committed meanwhile
    assert outputs[0].token_ids == toys.generated(model, prompts[0], 30)


@pytest.mark.parametrize("name", ["max_batch_size", "prefill_chunk"])
def test_sizes_that_would_never_end_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        Engine(toys.MarkovVerifier(cycle(5, 6)), **{name: 0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text",), "no tokenizer|one string"),
        (([[]],), "prompt 0 has 0 tokens"),
        (([[1], [5, V]],), f"token id {V}"),
        (([[1]], [SamplingParams()] * 2), "1 prompts but 2"),
        (([[1]], SamplingParams(stop="x")), "no tokenizer"),
        (([["a"]],), "invalid literal"),
        (([[1]], SamplingParams(logprobs=V + 1)), f"logprobs={V + 1}"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(toys.MarkovVerifier(cycle(5, 6))).generate(*arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 0), ("top_k", -2), ("min_p", 2), ("max_tokens", 0), ("repetition_penalty", 0)],
)
def test_bad_sampling_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"max_tokens": 1.5}, "max_tokens=1.5 must be an integer"),
        ({"max_tokens": "4"}, "max_tokens='4' must be an integer"),
        ({"temperature": "1"}, "temperature='1' must be 0"),
        ({"temperature": float("inf")}, "temperature=inf must be 0"),
        ({"top_p": None}, r"top_p=None must be in \(0, 1\]"),
        ({"top_k": 1.5}, "top_k=1.5 must be a positive number"),
        ({"presence_penalty": None}, "presence_penalty=None must be in"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf must be more than 0"),
        ({"logprobs": 1.5}, "logprobs=1.5 must be an integer"),
        ({"stop": ["a", 3]}, r"stop=\('a', 3\) must be made of non-empty strings"),
        ({"stop_token_ids": ["a"]}, r"stop_token_ids=\('a',\) must be made of token ids"),
        ({"seed": "a"}, "seed='a' must be an integer of 64 bits"),
        ({"seed": 2**63}, f"seed={2**63} must be an integer of 64 bits"),
    ],
)
def test_sampling_parameters_of_another_kind_are_refused(values, rule):
    with pytest.raises(ValueError, match=rule):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("drafts", "rounds"),
    [
        (None, [([4], 0, 0), ([5], 0, 0), ([6], 0, 0)]),
        (2, [([4], 0, 0), ([5, 6, 7], 2, 5), ([3, 4, 5], 2, 5)]),  # two of five are right: 7 and 5 are recovered
        (5, [([4], 0, 0), ([5, 6, 7, 3, 4, 5], 5, 5), ([6, 7], 2, 5)]),  # 5 is the bonus; max_tokens cuts drafts
    ],
)
def test_an_event_says_which_tokens_are_accepted_drafts(drafts, rounds):
    events = engine_on([3, 4, 5, 6, 7], drafts).stream([[3]], SamplingParams(max_tokens=9))
    assert [(event.token_ids, event.num_accepted, event.draft_depth) for event in events][:3] == rounds
