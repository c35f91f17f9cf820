"""The adaptive draft length in the engine, on a clock of the test's own: what it asks of drafters, and losslessness."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
import toys

from speculators.decoding import Engine, SamplingParams
from speculators.decoding import engine as engine_module
from speculators.interfaces import CaptureSpec, Proposal

V, MOST, NUM_TOKENS = 5, 4, 300
CYCLE = torch.full((V, V), 0.0).scatter(1, (torch.arange(V)[:, None] + 1) % V, 1.0)
"""A verifier that counts: after t comes t + 1."""


class Clock:
    now = 0.0


class Drafter:
    """Counts on from the last token, right in the first `num_right` slots; a draft costs 0.1."""

    capture = CaptureSpec()
    num_right, is_lost_after_2, says_so, asked = 0, False, False, []
    confidences = (0.02, 0.98)
    """Where it is lost, and elsewhere."""
    share_offered = 1.0

    def __init__(self, config):
        Drafter.asked = []

    def propose(self, committed, num_tokens, sampling):
        Drafter.asked.append(num_tokens)
        Clock.now += 0.1 * num_tokens
        last_B1 = committed.token_ids_BT.gather(1, (committed.num_new_B - 1).clamp_min(0)[:, None])
        slot_K = torch.arange(1, num_tokens + 1)
        tokens_BK = (last_B1 + slot_K + (slot_K > self.num_right)) % V
        confidence_BK = None
        is_lost_B1 = (last_B1 == 2) & self.is_lost_after_2
        tokens_BK = (tokens_BK + is_lost_B1) % V
        if self.says_so and sampling.wants_confidence:
            confidence_BK = torch.where(is_lost_B1, *self.confidences).expand(tokens_BK.shape)
        # as if by chance, but a function of the row and its length
        mixed_B = (committed.num_committed_B * 7919 + torch.arange(len(tokens_BK)) * 104729) * 2654435761 % 2**32
        chance_B = (mixed_B ^ (mixed_B >> 15)) * 2246822519 % 2**32 / 2**32
        is_absent_B = (committed.num_new_B == 0) | (chance_B >= self.share_offered)
        if bool(is_absent_B.all()):
            tokens_BK = tokens_BK[:, :0]
        return Proposal(tokens_BK.masked_fill(is_absent_B[:, None], -1), confidence_BK=confidence_BK)


class TimedVerifier(toys.MarkovVerifier):
    def score(self, token_ids_BT, *args, **kwargs):
        Clock.now += 1.0 + 0.05 * token_ids_BT.numel()
        return super().score(token_ids_BT, *args, **kwargs)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    Clock.now = 0.0
    monkeypatch.setattr(engine_module, "perf_counter", lambda: Clock.now)


def decode(table, prompts, params, batch=1, **fields):
    config = {
        "method": "custom_class",
        "model": "test_adaptive_engine.Drafter",
        "num_speculative_tokens": MOST,
        "enable_adaptive_verification": True,
        **fields,
    }
    engine = Engine(TimedVerifier(table), config, max_batch_size=batch)
    return engine.generate(prompts, params), engine.stats


@pytest.mark.parametrize(("num_right", "best"), [(0, 0), (2, 2), (4, 4)])
def test_the_length_that_pays_is_asked_for(num_right, best, monkeypatch):
    monkeypatch.setattr(Drafter, "num_right", num_right)
    outputs, stats = decode(CYCLE + 1e-9, [[0]], SamplingParams(max_tokens=NUM_TOKENS))
    assert outputs[0].token_ids == [(i + 1) % V for i in range(NUM_TOKENS)]
    warm_up = MOST + 1
    assert Drafter.asked[:MOST] == [4, 3, 2, 1]  # then a round of none
    later = Drafter.asked[MOST:]
    if best == 0:  # a drafter that is of no use is not called, but for a rare probe
        assert len(later) <= 0.06 * (stats.num_rounds - warm_up)
        assert Clock.now < 1.03 * 1.05 * NUM_TOKENS
    else:
        assert later.count(best) > 0.9 * len(later)
        assert len(later) >= stats.num_rounds - warm_up - 1
        assert stats.acceptance_length > 0.9 * (1 + best)


def test_drafts_that_the_drafter_doubts_are_not_verified(monkeypatch):
    monkeypatch.setattr(Drafter, "num_right", 3)  # rounds of 4 tokens begin at every token of the cycle of 5
    monkeypatch.setattr(Drafter, "is_lost_after_2", True)
    params = SamplingParams(max_tokens=2 * NUM_TOKENS)
    num_wasted = []
    for says_so in (False, True):
        monkeypatch.setattr(Drafter, "says_so", says_so)
        outputs, stats = decode(CYCLE + 1e-9, [[0]], params)
        assert outputs[0].token_ids == [(i + 1) % V for i in range(2 * NUM_TOKENS)]
        num_wasted.append(stats.num_drafted - stats.num_accepted)
    assert num_wasted[1] < 0.4 * num_wasted[0]


def test_confidence_is_read_by_what_was_accepted_and_not_by_its_face(monkeypatch):
    """A drafter that is the surer where it is lost: at its word, all its lost drafts would be verified."""
    monkeypatch.setattr(Drafter, "num_right", 3)
    monkeypatch.setattr(Drafter, "is_lost_after_2", True)
    monkeypatch.setattr(Drafter, "confidences", (0.98, 0.6))
    params = SamplingParams(max_tokens=6 * NUM_TOKENS)
    num_wasted = []
    for says_so in (False, True):
        monkeypatch.setattr(Drafter, "says_so", says_so)
        _, stats = decode(CYCLE + 1e-9, [[0]], params)
        num_wasted.append(stats.num_drafted - stats.num_accepted)
    assert num_wasted[1] < 0.5 * num_wasted[0]


@pytest.mark.parametrize("batch", [1, 8])
def test_rows_that_seldom_have_drafts_are_decoded_plainly(batch, monkeypatch):
    """N-gram lookup on text without repetitions: drafting takes its time, and one row's draft widens all rows."""
    monkeypatch.setattr(Drafter, "num_right", 4)
    monkeypatch.setattr(Drafter, "share_offered", 0.05)
    outputs, _ = decode(CYCLE + 1e-9, [[0]] * batch, SamplingParams(max_tokens=NUM_TOKENS), batch=batch)
    assert all(output.token_ids == [(i + 1) % V for i in range(NUM_TOKENS)] for output in outputs)
    plain_s = (1.0 + 0.05 * batch) * NUM_TOKENS
    assert Clock.now < 1.06 * plain_s


def test_the_law_of_sampled_output_stays_the_verifiers(monkeypatch):
    """Chi-squared of the joint of three tokens; drafts depend on the text alone, their number on earlier rounds."""
    monkeypatch.setattr(Drafter, "num_right", 2)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(V, V, generator=generator) + 0.05 + 2 * CYCLE
    table = table / table.sum(-1, keepdim=True)
    num_requests, length = 1200, 3
    outputs, stats = decode(table, [[1]] * num_requests, SamplingParams(max_tokens=length, temperature=1.0), batch=100)
    assert stats.num_accepted > 0 and len(set(Drafter.asked)) > 1
    counts = Counter(tuple(output.token_ids) for output in outputs)
    cells, rare = [], [0.0, 0.0]
    for tokens in itertools.product(range(V), repeat=length):
        expected, last = float(num_requests), 1
        for token in tokens:
            expected, last = expected * float(table[last, token]), token
        if expected < 8:
            rare = [rare[0] + counts[tokens], rare[1] + expected]
        else:
            cells.append((counts[tokens], expected))
    statistic = sum((o - e) ** 2 / e for o, e in [*cells, rare])
    p_value = float(torch.special.gammaincc(torch.tensor(len(cells) / 2.0), torch.tensor(statistic / 2)))
    assert p_value > 1e-5
