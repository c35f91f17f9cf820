"""The adaptive draft length against plain decoding and a fixed K, with drafters that pay and drafters that do not.

    python benchmarks/decode_adaptive.py [--models embedded,random-512] [--batches 1,8] [--tokens 96] [--repeats 5]

    ngram        text lookup: cheap, with drafts now and then
    early_exit   the verifier's first layers: dear
    right, wrong a custom class that costs nothing; right seven times in ten, or never

Routes take turns (plain, fixed, settled, cold, again, plain, ...); figures are medians of the paired ratios to plain
decoding. *settled* has decoded the same prompts before, *cold* is a new engine that must find out, *again* is plain
decoding once more: the noise. The goal: never below 1 beyond noise, whatever the drafter. Prints a table; the last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from decode_efficiency import K, Oracle, decode, seconds
from decode_models import DRAFT_LAYERS, MODELS, Prompts
from transformers import PreTrainedModel

from speculators.decoding import Engine
from speculators.decoding.config import SpeculativeConfig

TEXTS: Prompts = []
"""Prompts with their greedy answers: what the oracles below know."""


class RightSevenInTen(Oracle):
    accuracy = 0.7

    def __init__(self, config: SpeculativeConfig):
        super().__init__(TEXTS, self.accuracy)


class AlwaysWrong(RightSevenInTen):
    accuracy = 0.0


METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2},
    "early_exit": {"method": "early_exit", "early_exit_layer": DRAFT_LAYERS},
    "right 7 in 10": {"method": "custom_class", "model": f"{__name__}.RightSevenInTen"},
    "always wrong": {"method": "custom_class", "model": f"{__name__}.AlwaysWrong"},
}
WAVES = 3
"""Prompts a row, one after the other: with one, a run would be as long as its unluckiest row."""
ROUTES = ("fixed", "settled", "cold", "again")


def engine_for(model: PreTrainedModel, method: str, batch: int, *, is_adaptive: bool) -> Engine:
    config = {**METHODS[method], "num_speculative_tokens": K, "enable_adaptive_verification": is_adaptive}
    return Engine(model, config, max_batch_size=batch)


def benchmark_adaptive(
    model: PreTrainedModel, prompts: Prompts, batch: int, num_tokens: int, repeats: Iterable[int]
) -> dict[str, Any]:
    """By method: how fast a fixed and an adaptive K are, in units of plain decoding beside them."""
    plain = Engine(model, max_batch_size=batch)
    TEXTS[:] = [p + text for p, text in zip(prompts, decode(plain, prompts, num_tokens + K), strict=True)]
    expected = [text[len(p) : len(p) + num_tokens] for p, text in zip(prompts, TEXTS, strict=True)]
    found = {}
    for method in METHODS:
        fixed = engine_for(model, method, batch, is_adaptive=False)
        settled = engine_for(model, method, batch, is_adaptive=True)
        assert all(decode(engine, prompts, num_tokens) == expected for engine in (fixed, settled))
        settled.reset_stats()
        runs = []
        for _ in repeats:
            cold = engine_for(model, method, batch, is_adaptive=True)
            routes = {"plain": plain, "fixed": fixed, "settled": settled, "cold": cold, "again": plain}
            runs.append({name: seconds(lambda e=e: decode(e, prompts, num_tokens)) for name, e in routes.items()})  # type: ignore[misc]
        ratios = {route: [times["plain"] / times[route] for times in runs] for route in ROUTES}
        found[method] = {
            **{route: statistics.median(values) for route, values in ratios.items()},
            **{f"{route}_range": (min(values), max(values)) for route, values in ratios.items()},
            "drafted_per_round": settled.stats.num_drafted / settled.stats.num_rounds,
            "acceptance_length": fixed.stats.acceptance_length,
            "num_runs": len(runs),
        }
    return found


def print_adaptive(found: dict[str, Any]) -> None:
    titles = "".join(f"{route:>20}" for route in ROUTES)
    print(f"  times plain decoding's speed{titles}   drafts a round (settled)")
    for method, row in found.items():
        cells = ""
        for route in ROUTES:
            least, most = row[f"{route}_range"]
            cells += f"{row[route]:8.2f} ({least:.2f}-{most:.2f})"
        print(f"  {method:14} tau {row['acceptance_length']:5.2f}     {cells}{row['drafted_per_round']:17.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for name in options.models.split(","):
        model, prompts = MODELS[name]()
        for batch in map(int, options.batches.split(",")):
            some = [prompts[i % len(prompts)] for i in range(WAVES * batch)]
            found = benchmark_adaptive(model, some, batch, options.tokens, range(options.repeats))
            print(f"\n{name}, batch {batch}")
            print_adaptive(found)
            rows.append({"model": name, "batch": batch, "methods": found})
    print(json.dumps({"benchmark": "decode_adaptive", "threads": torch.get_num_threads(), "models": rows}))


if __name__ == "__main__":
    main()
