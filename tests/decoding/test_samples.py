"""Several samples of a prompt, log-probabilities of prompts, and which text the ends of a request leave."""

from __future__ import annotations

import random

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.request import raise_for_failed
from speculators.decoding.text import IncrementalText

V = toys.VOCAB


def table(seed: int = 0) -> torch.Tensor:
    probs_VV = torch.rand(V, V, generator=torch.Generator().manual_seed(seed)).pow(3)
    return probs_VV / probs_VV.sum(-1, keepdim=True)


def engine_of(kind: str, **options) -> Engine:
    """Plain, a chain of random drafts (K = 1 or 3), or a tree of them."""
    verifier = toys.MarkovVerifier(table())
    if kind == "plain":
        return Engine(verifier, **options)
    num_tokens = 1 if kind == "K = 1" else 3

    class Tree(toys.ScriptedProposer):
        def propose(self, committed, num_tokens, sampling):
            chain = super().propose(committed, 3, sampling).token_ids_BK
            return toys.Proposal(chain, parents_K=torch.tensor([-1, -1, 0]))

    proposer = (Tree if kind == "tree" else toys.ScriptedProposer)(
        lambda text, k: [(text[-1] + i) % V for i in range(k)]
    )
    return Engine(verifier, proposer, num_speculative_tokens=num_tokens, **options)


@pytest.mark.parametrize("kind", ["plain", "K = 1", "K = 3", "tree"])
@pytest.mark.parametrize("batch", [1, 8])
def test_sample_i_is_the_request_with_seed_plus_i(kind, batch):
    settings = {"max_tokens": 9, "temperature": 1.0, "logprobs": 1}
    outputs = engine_of(kind, max_batch_size=batch).generate(
        [[5], [6, 7]], [SamplingParams(n=3, seed=40, **settings), SamplingParams(n=2, seed=7, **settings)]
    )
    for prompt, first_seed, output, n in (([5], 40, outputs[0], 3), ([6, 7], 7, outputs[1], 2)):
        assert len(output.outputs) == n and output.outputs[0] is output
        for i, sample in enumerate(output.outputs):
            alone = engine_of("plain").generate([prompt], SamplingParams(seed=first_seed + i, **settings))[0]
            assert (sample.prompt_token_ids, sample.token_ids) == (prompt, alone.token_ids)
            assert sample.finish_reason == "length" and len(sample.logprobs) == 9
    assert len({tuple(sample.token_ids) for sample in outputs[0].outputs}) == 3


def test_samples_without_a_seed_differ():
    output = Engine(toys.MarkovVerifier(table())).generate([[5]], SamplingParams(n=4, max_tokens=12, temperature=1.0))[
        0
    ]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4


def test_samples_are_streamed_counted_and_cancelled_one_by_one():
    params = SamplingParams(n=3, max_tokens=8, temperature=1.0, seed=1)
    expected = engine_of("K = 3").generate([[5], [6]], params)
    streamed: dict[tuple[int, int], list[int]] = {}
    for event in engine_of("K = 3").stream([[5], [6]], params):
        streamed.setdefault((event.request_index, event.sample_index), []).extend(event.token_ids)
    assert streamed == {(p, i): o.token_ids for p, output in enumerate(expected) for i, o in enumerate(output.outputs)}
    seen = []
    outputs = engine_of("K = 3").generate(
        [[5], [6]],
        params,
        on_token=lambda event: (event.request_index, event.sample_index) != (0, 1),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]
    reasons = [[sample.finish_reason for sample in output.outputs] for output in outputs]
    assert reasons == [["length", "cancelled", "length"], ["length"] * 3]
    engine = engine_of("plain")
    whole = engine.generate([[5], [6]], params, on_token=lambda event: engine.cancel(0) or True)
    assert [sample.finish_reason for sample in whole[0].outputs] == ["cancelled"] * 3
    assert whole[1].finish_reason == "length"


def test_a_sample_that_failed_is_found():
    verifier = toys.MarkovVerifier(table())
    good, bad = Engine(verifier).generate([[5]] * 2, [SamplingParams(max_tokens=2), SamplingParams(max_tokens=2)])
    bad.error, good.other_samples = "the scores are no numbers", [bad]
    with pytest.raises(ValueError, match=r"prompt 1: the scores are no numbers \(2 of 4"):
        raise_for_failed([Engine(verifier).generate([[5]], SamplingParams(max_tokens=2))[0], good, bad])


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding"])
def test_prompt_logprobs_are_the_log_softmax_of_the_plain_forward(name, chunk):
    model = toys.tiny_model(name)
    start = toys.prompts(1, shortest=20, longest=20)[0]  # long enough to be shared
    prompts = [[*start, 9, 8], [*start, 4], [7], toys.prompts(1, seed=3, shortest=13, longest=13)[0], start]
    params = [
        SamplingParams(max_tokens=6, prompt_logprobs=number, temperature=temperature, n=n, seed=1)
        for number, temperature, n in ((2, 0.0, 1), (None, 0.0, 1), (1, 0.0, 1), (-1, 1.0, 2), (0, 0.0, 1))
    ]
    config = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    for drafting in (None, config):
        engine = Engine(model, drafting, max_batch_size=3, prefill_chunk=chunk)
        outputs = engine.generate(prompts, params)
        for prompt, own, output in zip(prompts, params, outputs, strict=True):
            if own.temperature == 0:
                assert output.token_ids == toys.generated(model, prompt, 6)
            assert all(sample.prompt_logprobs is None for sample in output.other_samples)
            if own.prompt_logprobs is None:
                assert output.prompt_logprobs is None
                continue
            with torch.inference_mode():
                logprobs_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
            num_top = V if own.prompt_logprobs == -1 else own.prompt_logprobs
            for position, entry in enumerate(output.prompt_logprobs[1:]):
                expected_V = logprobs_TV[position]
                assert entry.logprob == pytest.approx(expected_V[prompt[position + 1]].item(), abs=1e-4)
                assert list(entry.top.values()) == pytest.approx(expected_V.topk(num_top).values.tolist(), abs=1e-4)
                assert all(expected_V[i].item() == pytest.approx(value, abs=1e-4) for i, value in entry.top.items())


def test_prompt_logprobs_come_with_the_first_event():
    engine = engine_of("K = 3", prefill_chunk=2)
    events = list(engine.stream([[5, 6, 7, 8, 9]], SamplingParams(max_tokens=7, prompt_logprobs=1)))
    assert len(events) > 1 and all(event.prompt_logprobs is None for event in events[1:])
    found = [entry.logprob for entry in events[0].prompt_logprobs[1:]]
    assert found == pytest.approx([table()[a, a + 1].log().item() for a in (5, 6, 7, 8)], abs=1e-5)


def test_all_log_probabilities_are_reported_for_minus_one():
    output = engine_of("K = 3").generate([[5]], SamplingParams(max_tokens=3, logprobs=-1))[0]
    assert [len(entry.top) for entry in output.logprobs] == [V] * 3


# -- text


class Tokens:
    """Token i is the i-th of some texts; the last one is special."""

    def __init__(self, *texts: str):
        self.texts = texts

    def decode(self, token_ids, skip_special_tokens=True):
        special = len(self.texts) - 1
        return "".join(self.texts[i] for i in token_ids if not (skip_special_tokens and i == special))


def texts_of(tokenizer: Tokens, token_ids: list[int], **settings) -> tuple[str, list[str]]:
    """The text up to the first stop, and its pieces."""
    text, pieces = IncrementalText(tokenizer, SamplingParams(**settings)), []
    for token_id in token_ids:
        is_end = text.add(token_id)
        pieces.append(text.take(is_final=is_end))
        if is_end:
            break
    text.finish()
    return text.text, pieces


@pytest.mark.parametrize(
    ("settings", "text", "pieces"),
    [
        ({"stop": "cd"}, "ab", ["a", "b", ""]),
        ({"stop": "cd", "include_stop_str_in_output": True}, "abcd", ["a", "bc", "d"]),
        # two stops in one token's text: the one that ends first, as if characters came one by one
        ({"stop": ["ef", "cde", "d"]}, "abc", ["a", "b", "c"]),
        ({"stop": ["efg", "de"], "include_stop_str_in_output": True}, "abcde", ["a", "bc", "de"]),
        # a stop counts where it ends after the first min_tokens tokens
        ({"stop": "b", "min_tokens": 2}, "abcdefg", ["a", "bc", "defg", "", ""]),
        ({"stop": "cd", "min_tokens": 2}, "ab", ["a", "b", ""]),
        ({"stop": "cd", "min_tokens": 3}, "abcdefgbx", ["a", "b", "cdefg", "", "bx"]),
        ({"stop": "<end>"}, "abcdefgbx", ["a", "bc", "defg", "", "bx"]),
        ({"stop": "<end>", "skip_special_tokens": False}, "abcdefg", ["a", "bc", "defg", ""]),
        ({"skip_special_tokens": False}, "abcdefg<end>bx", ["a", "bc", "defg", "<end>", "bx"]),
    ],
)
def test_text_by_hand(settings, text, pieces):
    assert texts_of(Tokens("a", "bc", "defg", "bx", "<end>"), [0, 1, 2, 4, 3], **settings) == (text, pieces)


class Bytes:
    """A token is a byte; counts the tokens that it decodes."""

    num_decoded = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return bytes(token_ids).decode(errors="replace")


@pytest.mark.parametrize("seed", range(40))
def test_bytes_that_are_no_text_are_streamed_and_keep_nobody_waiting(seed):
    """Whole characters, starts of characters and stray bytes: the text is that of the whole, and grows as it comes."""
    chosen, whole = random.Random(seed), b""
    while len(whole) < 200:
        text = chosen.choice("aé€😀").encode()
        stray = bytes(chosen.randrange(0x80, 0x100) for _ in range(chosen.randrange(30)))
        whole += chosen.choice([text, text[: chosen.randrange(1, 4)], stray])
    tokenizer = Bytes()
    text, pieces = texts_of(tokenizer, list(whole))
    assert text == whole.decode(errors="replace") and "".join(pieces) == text[: len("".join(pieces))]
    assert tokenizer.num_decoded < 40 * len(whole)
    text, pieces = texts_of(tokenizer, [0xFF] * 2000)
    assert len("".join(pieces)) > 1990 and len(text) == 2000
    assert tokenizer.num_decoded < 40 * (len(whole) + 2000)
