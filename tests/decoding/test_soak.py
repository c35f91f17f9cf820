"""One engine, many requests: random parameters, cancellations, streams that are left, callbacks that fail. Every text
is plain decoding's (or its beginning, if the request was cancelled), and memory stays where it was.

`make soak` runs 2,000 requests per method.
"""

from __future__ import annotations

import gc
import os
import random
import resource
from collections import Counter

import pytest
import torch
import toys

from speculators.decoding import Engine, RequestOutput, SamplingParams

METHODS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
    "early exit": {"method": "early_exit", "num_speculative_tokens": 3, "early_exit_layer": 2},
    "tree": {"method": "early_exit", "early_exit_layer": 2, "speculative_token_tree": "[(0,), (1,), (0, 0), (0, 1)]"},
    "suffix": {"method": "suffix", "num_speculative_tokens": 4},
}
NUM_REQUESTS = int(os.environ.get("SPECULATORS_SOAK_REQUESTS", "80"))
MOST_GROWTH_MIB = 64
"""Of the process after the first quarter; the caches of the engine are then as large as they become."""


class Letters:
    """Token i is a character."""

    eos_token_id = 2

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(33 + i) for i in token_ids if not (skip_special_tokens and i == self.eos_token_id))


class CallbackError(Exception):
    """Of a user's own code."""


def random_params(draw: random.Random) -> SamplingParams:
    """Each setting is used by some of the requests."""

    def maybe(share: float, value, otherwise):
        return value if draw.random() < share else otherwise

    temperature = draw.choice([0.0, 0.0, 0.5, 1.0, 1.6])
    return SamplingParams(
        max_tokens=draw.randint(1, 24),
        temperature=temperature,
        top_k=maybe(0.3, draw.randint(1, 20), 0),
        top_p=maybe(0.3, draw.uniform(0.3, 1.0), 1.0),
        min_p=maybe(0.2, draw.uniform(0.0, 0.3), 0.0),
        repetition_penalty=maybe(0.2, draw.uniform(0.7, 1.6), 1.0),
        presence_penalty=maybe(0.2, draw.uniform(-1.0, 1.0), 0.0),
        frequency_penalty=maybe(0.2, draw.uniform(-0.5, 1.0), 0.0),
        seed=draw.getrandbits(40),
        stop=maybe(0.2, (chr(33 + draw.randrange(97)), chr(33 + draw.randrange(97)) * 2), ()),
        stop_token_ids=maybe(0.2, (draw.randrange(97),), ()),
        ignore_eos=draw.random() < 0.3,
        logprobs=maybe(0.2, draw.randint(0, 3), None),
    )


def shown(output: RequestOutput) -> tuple:
    return output.token_ids, output.text, output.finish_reason


def is_beginning_of(output: RequestOutput, whole: RequestOutput) -> bool:
    return (
        output.token_ids == whole.token_ids[: len(output.token_ids)]
        and whole.text.startswith(output.text)
        and output.finish_reason
        == ("cancelled" if output.finish_reason != whole.finish_reason else whole.finish_reason)
    )


def live_tensors() -> Counter:
    gc.collect()
    return Counter(str(tuple(found.shape)) for found in gc.get_objects() if issubclass(type(found), torch.Tensor))


def run_in_some_way(engine: Engine, prompts, params, expected: list[RequestOutput], draw: random.Random) -> str:
    way = draw.choice(["generate", "generate", "cancel", "fail", "stream", "leave"])
    if way == "generate":
        assert [shown(output) for output in engine.generate(prompts, params)] == [shown(e) for e in expected]
    elif way == "cancel":
        victims = {i for i in range(len(prompts)) if draw.random() < 0.4}
        patience = draw.randint(0, 3)
        seen: Counter[int] = Counter()

        def on_token(event):
            seen[event.request_index] += 1
            if draw.random() < 0.1:
                engine.cancel(next(iter(victims), 0))
            return not (event.request_index in victims and seen[event.request_index] > patience)

        for index, (output, whole) in enumerate(
            zip(engine.generate(prompts, params, on_token=on_token), expected, strict=True)
        ):
            if index in victims or index == next(iter(victims), 0):
                assert is_beginning_of(output, whole)
            else:
                assert shown(output) == shown(whole)
    elif way == "fail":
        patience = draw.randint(0, 4)

        def failing(event):
            nonlocal patience
            patience -= 1
            if patience < 0:
                raise CallbackError

        try:
            engine.generate(prompts, params, on_token=failing)
        except CallbackError:
            return way
    else:
        texts: Counter[int] = Counter()
        pieces = dict.fromkeys(range(len(prompts)), "")
        stream = engine.stream(prompts, params)
        most = draw.randint(1, 12) if way == "leave" else None
        for number, event in enumerate(stream):
            texts[event.request_index] += len(event.token_ids)
            pieces[event.request_index] += event.text
            if number == most:
                break
        stream.close()
        for index, whole in enumerate(expected):
            assert whole.text.startswith(pieces[index])
            if way == "stream":
                assert (texts[index], pieces[index]) == (len(whole.token_ids), whole.text)
    return way


def soak(method: str, num_requests: int) -> None:
    draw = random.Random(method)
    model = toys.tiny_model("llama")
    plain = Engine(model, tokenizer=Letters(), max_batch_size=6, max_length=96)
    engine = Engine(model, METHODS[method], tokenizer=Letters(), max_batch_size=4, max_length=96, prefill_chunk=16)
    num_done, ways, baseline, baseline_kib = 0, Counter(), None, 0
    while num_done < num_requests:
        prompts = [[draw.randrange(97) for _ in range(draw.randint(1, 60))] for _ in range(draw.randint(1, 10))]
        if draw.random() < 0.3:  # a prompt that begins like another
            prompts[-1] = prompts[0] + prompts[-1][:5]
        params = [random_params(draw) for _ in prompts]
        expected = plain.generate(prompts, params)
        ways[run_in_some_way(engine, prompts, params, expected, draw)] += 1
        num_done += len(prompts)
        del expected
        if baseline is None and num_done > num_requests / 4:
            baseline = live_tensors()
            baseline_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert set(ways) == {"generate", "cancel", "fail", "stream", "leave"}
    assert engine.stats.num_accepted > 0 and engine.stats.num_non_finite == 0
    assert (live_tensors() - baseline).total() <= 8
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline_kib
    assert grown_kib < 1024 * MOST_GROWTH_MIB


@pytest.mark.parametrize("method", METHODS)
def test_one_engine_serves_many_requests(method):
    soak(method, NUM_REQUESTS)
