"""Proposals a second of the proposers that match text: n-gram, and suffix by our reference and by arctic-inference.

    python benchmarks/proposals.py [--contexts 1000,8000,64000]

One row, rounds of 3 new tokens behind a context that repeats itself as text does (phrases drawn by a power law). The
contexts and proposers take turns, round by round. Also a part of `decode.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from speculators.decoding import SpeculativeConfig
from speculators.decoding.proposers.suffix import NgramProposer, SuffixProposer
from speculators.interfaces import Committed, DraftSampling

NUM_DRAFTED = 4
NUM_NEW = 3
NUM_ROUNDS = 300
CONTEXTS = (1000, 8000, 64000)


def makers() -> dict[str, Callable[[], Any]]:
    config = SpeculativeConfig(method="suffix", num_speculative_tokens=NUM_DRAFTED)
    return {
        "ngram": lambda: NgramProposer(2, 5, max_batch_size=1),
        "suffix (reference)": lambda: SuffixProposer(config, max_batch_size=1, backend="reference"),
        "suffix (arctic-inference)": lambda: SuffixProposer(config, max_batch_size=1, backend="arctic"),
    }


class Runner:
    """One proposer behind one context."""

    def __init__(self, name: str, make: Callable[[], Any], stream: list[int], context: int):
        self.name, self.context, self.length, self.stream = name, context, context, stream
        self.proposer = make()
        start = time.perf_counter()
        self._propose(stream[:context])
        self.prompt_s = time.perf_counter() - start
        self.times: list[float] = []

    def round(self) -> None:
        new = self.stream[self.length : self.length + NUM_NEW]
        self.length += NUM_NEW
        start = time.perf_counter()
        self._propose(new)
        self.times.append(time.perf_counter() - start)

    def _propose(self, tokens: list[int]) -> None:
        committed = Committed(torch.tensor([tokens]), None, torch.tensor([len(tokens)]), torch.tensor([self.length]))
        self.proposer.propose(committed, NUM_DRAFTED, DraftSampling(torch.zeros(1)))

    def row(self) -> dict[str, Any]:
        rate = 1 / statistics.median(self.times)
        return {"proposer": self.name, "context": self.context, "proposals_per_s": rate, "prompt_s": self.prompt_s}


def repetitive(num_tokens: int) -> list[int]:
    chooser = random.Random(0)
    phrases = [[chooser.randrange(4096) for _ in range(chooser.randrange(2, 9))] for _ in range(400)]
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens += phrases[int(chooser.paretovariate(1.0)) % 400]
    return tokens


def proposals_per_second(contexts: list[int]) -> list[dict[str, Any]]:
    """A row for each proposer and context; suffix by arctic-inference only where it is installed."""
    if not contexts:
        return []
    stream = repetitive(max(contexts) + NUM_ROUNDS * NUM_NEW)
    runners = []
    for name, make in makers().items():
        try:
            make()
        except ImportError:
            print(f"{name}: not installed")
            continue
        runners += [Runner(name, make, stream, context) for context in contexts]
    for _ in range(NUM_ROUNDS):
        for runner in runners:
            runner.round()
    rows = [runner.row() for runner in runners]
    for row in rows:
        print(
            f"{row['proposer']:26} context {row['context']:6}   {row['proposals_per_s']:9.0f} proposals/s"
            f"   prompt {row['prompt_s'] * 1e3:8.1f} ms"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    options = parser.parse_args()
    contexts = [int(context) for context in options.contexts.split(",") if context]
    print(json.dumps({"benchmark": "proposals", "proposers": proposals_per_second(contexts)}))


if __name__ == "__main__":
    main()
