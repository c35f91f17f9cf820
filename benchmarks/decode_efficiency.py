"""Measured against ideal speedup with an oracle of known acceptance: what is missing is overhead that we own.

    ideal = tau / (c_draft + v(K + 1)), both costs measured around each pair of runs, in units of one plain forward

A part of `decode.py`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from speculators.decoding import Engine, HFVerifier, SamplingParams
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal
from speculators.nn.device import read_on_host, to_device

K = 4


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Repeats:
    """How often a comparison is repeated: as asked, or less when its share of the time is over; twice at least."""

    def __init__(self, num_repeats: int, num_comparisons: int, budget_s: float):
        self.num_repeats, self.num_left = num_repeats, num_comparisons
        self.end_s = time.perf_counter() + budget_s

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        share_s = (self.end_s - start) / max(self.num_left, 1)
        self.num_left -= 1
        for i in range(self.num_repeats):
            if i >= 2 and time.perf_counter() - start > share_s:
                return
            yield i


def decode(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    outputs = engine.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    return [output.token_ids for output in outputs]


class Oracle:
    """Drafts the known continuation; each draft is right with the given probability. Costs next to nothing."""

    def __init__(self, texts: list[list[int]], accuracy: float):
        self.capture = CaptureSpec()
        self.texts, self.accuracy, self.chooser = texts, accuracy, random.Random(0)
        self.text_by_row: dict[int, list[int]] = {}
        self.marks: list[tuple[float, int]] = []
        """(clock, tokens committed so far) at the start of each round in which every row takes part."""
        self.num_calls = 0

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        self.num_calls += 1
        token_ids, num_new, totals = read_on_host(committed)
        if len(num_new) == len(self.texts) and all(num_new):
            self.marks.append((time.perf_counter(), sum(totals)))
        drafts = []
        for row, new in enumerate(num_new):
            if new and new == totals[row]:
                self.text_by_row[row] = next(t for t in self.texts if t[:new] == token_ids[row][:new])
            right = self.text_by_row[row][totals[row] : totals[row] + num_tokens]
            right += [0] * (num_tokens - len(right))
            drafts.append([t if self.chooser.random() < self.accuracy else t ^ 1 for t in right])
        return Proposal(to_device(drafts, committed.token_ids_BT.device))


class Forwards:
    """Scores 1 or K + 1 tokens for every row, behind texts as long as they are early, halfway and late in a run."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], num_tokens: int):
        self.stages = []
        for sixths in (1, 3, 5):
            verifier = HFVerifier(model, len(prompts))
            lengths_B = torch.tensor([len(p) + sixths * num_tokens // 6 for p in prompts])
            tokens_BT = torch.full((len(prompts), int(lengths_B.max())), 7)
            with verifier:
                verifier.score(tokens_BT, lengths_B, last_only=True)
                verifier.keep(torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape), lengths_B)
            self.stages.append(verifier)

    def seconds(self, *widths: int, num_calls: int = 7) -> list[float]:
        """Means over the stages of their medians, the widths taking turns."""
        by_stage = [self._at(verifier, widths, num_calls) for verifier in self.stages]
        return [statistics.mean(times) for times in zip(*by_stage, strict=True)]

    @staticmethod
    def _at(verifier: HFVerifier, widths: tuple[int, ...], num_calls: int) -> list[float]:
        times: list[list[float]] = [[] for _ in widths]
        with verifier:
            for _ in range(num_calls + 2):
                for i, width in enumerate(widths):
                    tokens_BT = torch.full((verifier.num_rows, width), 7)
                    valid_B = torch.full((verifier.num_rows,), width)
                    times[i].append(seconds(lambda t=tokens_BT, n=valid_B: verifier.score(t, n)))  # type: ignore[misc]
        return [statistics.median(t[2:]) for t in times]


def efficiency(
    model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, repeats: Repeats, accuracy: float
) -> dict[str, float]:
    plain = Engine(model, max_batch_size=len(prompts))
    texts = [p + o for p, o in zip(prompts, decode(plain, prompts, num_tokens + K), strict=True)]
    drafted = Engine(model, Oracle(texts, accuracy), num_speculative_tokens=K, max_batch_size=len(prompts))
    decode(drafted, prompts, 2 * K)
    forwards = Forwards(model, prompts, num_tokens)
    measured = [one_efficiency(plain, drafted, forwards, prompts, num_tokens) for _ in repeats]
    names = ("acceptance_length", "speedup", "ideal", "efficiency", "verify_cost", "draft_cost")
    medians = {name: statistics.median(row[name] for row in measured) for name in names}
    return {"accuracy": accuracy, **medians, "num_pairs": len(measured)}


def one_efficiency(
    plain: Engine, drafted: Engine, forwards: Forwards, prompts: list[list[int]], num_tokens: int
) -> dict[str, float]:
    """The speedup of one pair of runs and, from costs measured around it, what it could have been.

    Rounds in which every row takes part count: rows that wait for the longest one say nothing about a round's cost.
    """
    oracle = drafted.drafting.proposer  # type: ignore[union-attr]
    assert isinstance(oracle, Oracle)
    oracle.marks.clear()
    oracle.num_calls = 0
    before = forwards.seconds(1, K + 1)
    plain_s = rounds_seconds(plain, prompts, num_tokens) / (num_tokens - 1)
    rounds_seconds(drafted, prompts, num_tokens)
    after = forwards.seconds(1, K + 1)
    one_s, all_s = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    (start_s, start_tokens), (end_s, end_tokens) = oracle.marks[0], oracle.marks[-1]
    num_rounds, num_kept = len(oracle.marks) - 1, (end_tokens - start_tokens) / len(prompts)
    speedup = plain_s / ((end_s - start_s) / num_kept)
    tau = num_kept / num_rounds
    c_draft = drafted.stats.draft_s / oracle.num_calls / one_s
    ideal = tau / (c_draft + all_s / one_s)
    return {
        "acceptance_length": tau,
        "speedup": speedup,
        "ideal": ideal,
        "efficiency": speedup / ideal,
        "verify_cost": all_s / one_s,
        "draft_cost": c_draft,
    }


def rounds_seconds(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds of a run without the forwards of its prompts."""
    engine.reset_stats()
    return seconds(lambda: decode(engine, prompts, num_tokens)) - engine.stats.prefill_s
