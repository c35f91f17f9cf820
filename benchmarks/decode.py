"""Decoding speed, as ratios in one process: ours against transformers' loops, and against what the machine allows.

    python benchmarks/decode.py [--models embedded,random-512] [--batches 1,8] [--tokens 96] [--repeats 9] [--minutes 9]

Every comparison is interleaved (A B A B ...) and reported as the median of the paired ratios: machines are shared.
Prints tables; the last line is one JSON document.

    plain        our plain decoding / transformers' generate                              goal 1.3
    assisted     our ngram and draft-model speculation / transformers' assisted generation with the same draft    1.5
    efficiency   measured / ideal speedup at K = 4 with an oracle of known acceptance      goal 0.9
                 ideal = tau / (c_draft + v(K + 1)), both costs measured beside it in units of one plain forward
    proposers    n-gram and suffix proposals a second by context length: must not fall with the context
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
from decode_efficiency import K, Repeats, decode, efficiency, seconds
from decode_models import DRAFT_LAYERS, MODELS
from proposals import CONTEXTS, proposals_per_second
from transformers import PreTrainedModel

from speculators.decoding import Engine
from speculators.decoding.proposers.draft_model import DraftModelProposer, first_layers

ACCURACIES = (0.7, 1.0)


def paired(baseline: Callable[[], Any], ours: Callable[[], Any], repeats: Repeats) -> dict[str, float]:
    """Seconds of both (best) and the median of baseline / ours over interleaved runs. Both have been run before."""
    times = [(seconds(baseline), seconds(ours)) for _ in repeats]
    return {
        "baseline_s": min(a for a, _ in times),
        "ours_s": min(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
        "num_pairs": len(times),
    }


def generate(model: Any, prompts: list[list[int]], num_tokens: int, **options: Any) -> list[list[int]]:
    """transformers' own loop, left-padded."""
    longest = max(map(len, prompts))
    token_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            token_ids,
            attention_mask=mask,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return output[:, longest:].tolist()


def speculation(model: PreTrainedModel, batch: int) -> dict[str, tuple[Engine, dict[str, Any]]]:
    """Each method: our engine, and the arguments that make transformers' generate do the same."""
    # transformers ends a request at its end-of-sequence token; both sides must write every token
    draft = first_layers(model, DRAFT_LAYERS)
    draft.generation_config.num_assistant_tokens = K
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    proposer = DraftModelProposer(draft, max_batch_size=batch)
    ngram = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    return {
        "ngram": (Engine(model, ngram, max_batch_size=batch), {"prompt_lookup_num_tokens": K}),
        "draft_model": (
            Engine(model, proposer, num_speculative_tokens=K, max_batch_size=batch),
            {"assistant_model": draft},
        ),
    }


def benchmark_model(name: str, batches: list[int], num_tokens: int, repeats: Repeats) -> list[dict[str, Any]]:
    model, prompts = MODELS[name]()
    model.generation_config.eos_token_id = None
    rows = []
    for batch in batches:
        row: dict[str, Any] = {
            "model": name,
            "batch": batch,
            **compare_loops(model, prompts[:batch], num_tokens, repeats),
        }
        row["oracle"] = [efficiency(model, prompts[:batch], num_tokens, repeats, accuracy) for accuracy in ACCURACIES]
        rows.append(row)
        print_model_row(row)
    return rows


def compare_loops(
    model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, repeats: Repeats
) -> dict[str, Any]:
    """Our loops against transformers'. What is compared has run once before, which also tells whether texts agree."""
    batch, written = len(prompts), len(prompts) * num_tokens
    plain = Engine(model, max_batch_size=batch)
    text = generate(model, prompts, num_tokens)
    same = text == decode(plain, prompts, num_tokens)
    pair = paired(lambda: generate(model, prompts, num_tokens), lambda: decode(plain, prompts, num_tokens), repeats)
    row: dict[str, Any] = {
        "generate_tokens_per_s": written / pair["baseline_s"],
        "plain_tokens_per_s": written / pair["ours_s"],
        "plain_ratio": pair["ratio"],
        "plain_identical": same,
        "plain_num_pairs": pair["num_pairs"],
        "forward": plain.verifier.forward_reason,
    }
    for method, (engine, options) in speculation(model, batch).items():
        same = decode(engine, prompts, num_tokens) == text
        generate(model, prompts[:1], 2 * K, **options)
        # transformers' assisted generation takes one prompt at a time
        pair = paired(
            lambda o=options: [generate(model, [p], num_tokens, **o) for p in prompts],  # type: ignore[misc]
            lambda e=engine: decode(e, prompts, num_tokens),  # type: ignore[misc]
            repeats,
        )
        row[method] = {
            "ratio": pair["ratio"],
            "tokens_per_s": written / pair["ours_s"],
            "num_pairs": pair["num_pairs"],
            "assisted_tokens_per_s": written / pair["baseline_s"],
            "identical": same,
            "acceptance_length": engine.stats.acceptance_length,
        }
    return row


def print_model_row(row: dict[str, Any]) -> None:
    print(f"\n{row['model']}, batch {row['batch']}")
    print(
        f"  plain        {row['plain_tokens_per_s']:8.1f} tokens/s   generate {row['generate_tokens_per_s']:8.1f}"
        f"   ratio {row['plain_ratio']:.2f}   identical {row['plain_identical']}"
    )
    for method in ("ngram", "draft_model"):
        found = row[method]
        print(
            f"  {method:12} {found['tokens_per_s']:8.1f} tokens/s   assisted {found['assisted_tokens_per_s']:8.1f}"
            f"   ratio {found['ratio']:.2f}   identical {found['identical']}"
            f"   acceptance length {found['acceptance_length']:.2f}"
        )
    for oracle in row["oracle"]:
        print(
            f"  oracle {oracle['accuracy']:.1f}   acceptance length {oracle['acceptance_length']:.2f}   speedup "
            f"{oracle['speedup']:.2f}   ideal {oracle['ideal']:.2f}   measured/ideal {oracle['efficiency']:.2f}"
            f"   v({K + 1}) {oracle['verify_cost']:.2f}   c_draft {oracle['draft_cost']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=9, help="pairs a comparison, if the time allows")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all; two pairs a comparison at least")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="of the proposers; empty: skip")
    options = parser.parse_args()
    if options.tokens < 16:
        parser.error(f"--tokens {options.tokens}: below 16 there are too few rounds to time; give 16 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    contexts = [int(context) for context in options.contexts.split(",") if context]
    proposers = proposals_per_second(contexts)
    batches = [int(batch) for batch in options.batches.split(",")]
    models = [name for name in options.models.split(",") if name]
    num_comparisons = len(models) * len(batches) * (3 + len(ACCURACIES))
    repeats = Repeats(options.repeats, num_comparisons, options.minutes * 60)
    rows = [row for name in models for row in benchmark_model(name, batches, options.tokens, repeats)]
    machine = {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    print(json.dumps({"benchmark": "decode", "machine": machine, "models": rows, "proposers": proposers}))


if __name__ == "__main__":
    main()
