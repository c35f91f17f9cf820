"""Decoding speed, as ratios in one process: ours against transformers' loops, and against what the machine allows.

    python benchmarks/decode.py [--models embedded,random-512] [--batches 1,8] [--tokens 96] [--repeats 5] [--threads 1]

Every comparison is interleaved (A B A B ...) and reported as the median of the paired ratios: machines are shared.
Prints tables; the last line is one JSON document.

    plain        our plain decoding / transformers' generate                              goal 1.3
    assisted     our ngram and draft-model speculation / transformers' assisted generation with the same draft    1.5
    efficiency   measured / ideal speedup at K = 4 with an oracle of known acceptance      goal 0.9
                 ideal = tau / (c_draft + v(K + 1)), both costs measured here in units of one plain step
    proposers    n-gram and suffix proposals a second by context length: must not fall with the context
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from speculators.assets import prompts_path, tiny_verifier_path
from speculators.decoding import Engine, HFVerifier, SamplingParams, SpeculativeConfig
from speculators.decoding.proposers.draft_model import DraftModelProposer
from speculators.decoding.proposers.early_exit import first_layers
from speculators.decoding.proposers.ngram import NgramProposer
from speculators.decoding.proposers.suffix import SuffixProposer
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal
from speculators.verifier import load_verifier

K = 4
DRAFT_LAYERS = 3
PROMPT_TOKENS = 64


def embedded() -> tuple[PreTrainedModel, list[list[int]]]:
    path = str(tiny_verifier_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = []
    with open(prompts_path("heldout")) as lines:
        for line in lines:
            turns = [turn for turn in json.loads(line)["conversations"] if turn["role"] != "assistant"][:1]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
            prompts.append(list(ids))
    return load_verifier(path, dtype=torch.float32), prompts


def random_512() -> tuple[PreTrainedModel, list[list[int]]]:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(5, 8192, (16, PROMPT_TOKENS), generator=generator).tolist()


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, list[list[int]]]]] = {
    "embedded": embedded,
    "random-512": random_512,
}


class Oracle:
    """Drafts the known continuation; each draft is right with the given probability. Costs next to nothing."""

    def __init__(self, texts: list[list[int]], accuracy: float):
        self.capture = CaptureSpec()
        self.texts, self.accuracy, self.chooser = texts, accuracy, random.Random(0)
        self.text_by_row: dict[int, list[int]] = {}

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        token_ids = committed.token_ids_BT.tolist()
        drafts = []
        totals = committed.num_committed_B.tolist()
        for row, new in enumerate(committed.num_new_B.tolist()):
            if new and new == totals[row]:
                self.text_by_row[row] = next(t for t in self.texts if t[:new] == token_ids[row][:new])
            right = self.text_by_row[row][totals[row] : totals[row] + num_tokens]
            right += [0] * (num_tokens - len(right))
            drafts.append([t if self.chooser.random() < self.accuracy else t ^ 1 for t in right])
        return Proposal(torch.tensor(drafts))


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(baseline: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of both (best) and the median of baseline / ours over interleaved runs, after one run to warm up."""
    baseline(), ours()
    times = [(seconds(baseline), seconds(ours)) for _ in range(repeats)]
    return {
        "baseline_s": min(a for a, _ in times),
        "ours_s": min(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }


def generate(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, **options: Any) -> list[list[int]]:
    """transformers' own loop, left-padded."""
    longest = max(map(len, prompts))
    token_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        output = model.generate(
            token_ids, attention_mask=mask, min_new_tokens=num_tokens, max_new_tokens=num_tokens, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip
    return output[:, longest:].tolist()


def decode(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    outputs = engine.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    return [output.token_ids for output in outputs]


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


def forward_seconds(model: PreTrainedModel, prompts: list[list[int]], widths: list[int], repeats: int) -> list[float]:
    """Median seconds of scoring each of `widths` tokens for every row behind the prompts, interleaved."""
    lengths = torch.tensor([len(p) for p in prompts])
    T = int(lengths.max())
    padded = torch.tensor([p + [0] * (T - len(p)) for p in prompts])
    with HFVerifier(model, len(prompts)) as verifier:
        verifier.score(padded, lengths, last_only=True)
        verifier.keep(torch.arange(T).expand(padded.shape), lengths)
        times: list[list[float]] = [[] for _ in widths]
        for _ in range(repeats * 20):
            for i, width in enumerate(widths):
                tokens = padded[:, :width].contiguous()
                times[i].append(seconds(lambda t=tokens: verifier.score(t, lengths)))  # type: ignore[misc]
    return [statistics.median(t[5:]) for t in times]


def efficiency(
    model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, repeats: int, accuracy: float
) -> dict:
    plain = Engine(model, max_batch_size=len(prompts))
    texts = [p + o for p, o in zip(prompts, decode(plain, prompts, num_tokens + K), strict=True)]
    oracle = Oracle(texts, accuracy)
    drafted = Engine(model, oracle, num_speculative_tokens=K, max_batch_size=len(prompts))
    speedups = [
        round_seconds(plain, prompts, num_tokens) / round_seconds(drafted, prompts, num_tokens)
        for _ in range(repeats + 1)
    ]
    speedup = statistics.median(speedups[1:])
    one_s, all_s = forward_seconds(model, prompts, [1, K + 1], repeats)
    stats = drafted.stats
    c_draft = stats.draft_s / (stats.num_rounds / len(prompts)) / one_s
    # tokens kept a round: the last round of a request is cut at its limit, the first token comes from the prompt
    tau = (stats.num_tokens - len(prompts)) / stats.num_rounds
    ideal = tau / (c_draft + all_s / one_s)
    return {
        "accuracy": accuracy, "acceptance_length": tau, "speedup": speedup, "ideal": ideal,
        "efficiency": speedup / ideal, "verify_cost": all_s / one_s, "draft_cost": c_draft,
    }  # fmt: skip


def round_seconds(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds of a run, prompts aside."""
    engine.reset_stats()
    decode(engine, prompts, num_tokens)
    return engine.stats.draft_s + engine.stats.verify_s + engine.stats.overhead_s


def benchmark_model(name: str, batches: list[int], num_tokens: int, repeats: int) -> list[dict[str, Any]]:
    model, prompts = MODELS[name]()
    model.generation_config.eos_token_id = None
    rows = []
    for batch in batches:
        chosen = prompts[:batch]
        plain = Engine(model, max_batch_size=batch)
        same = generate(model, chosen, num_tokens) == decode(plain, chosen, num_tokens)
        pair = paired(
            lambda c=chosen: generate(model, c, num_tokens),  # type: ignore[misc]
            lambda e=plain, c=chosen: decode(e, c, num_tokens),  # type: ignore[misc]
            repeats,
        )
        written = batch * num_tokens
        row: dict[str, Any] = {
            "model": name, "batch": batch, "generate_tokens_per_s": written / pair["baseline_s"],
            "plain_tokens_per_s": written / pair["ours_s"], "plain_ratio": pair["ratio"], "plain_identical": same,
        }  # fmt: skip
        for method, (engine, options) in speculation(model, batch).items():
            # transformers' assisted generation takes one prompt at a time
            pair = paired(
                lambda c=chosen, o=options: [generate(model, [p], num_tokens, **o) for p in c],  # type: ignore[misc]
                lambda e=engine, c=chosen: decode(e, c, num_tokens),  # type: ignore[misc]
                repeats,
            )
            row[f"{method}_ratio"] = pair["ratio"]
            row[f"{method}_tokens_per_s"] = written / pair["ours_s"]
            row[f"{method}_acceptance_length"] = engine.stats.acceptance_length
            row[f"{method}_identical"] = decode(engine, chosen, num_tokens) == decode(plain, chosen, num_tokens)
        row["oracle"] = [efficiency(model, chosen, num_tokens, repeats, accuracy) for accuracy in (0.7, 1.0)]
        rows.append(row)
        print_model_row(row)
    return rows


def proposals_per_second(contexts: list[int]) -> list[dict[str, Any]]:
    """Rounds of 3 new tokens behind a context of natural repetitiveness, one row."""
    rows = []
    config = SpeculativeConfig(method="suffix", num_speculative_tokens=K)
    makers: dict[str, Callable[[], Any]] = {
        "ngram": lambda: NgramProposer(2, 5, max_batch_size=1),
        "suffix (reference)": lambda: SuffixProposer(config, max_batch_size=1, backend="reference"),
        "suffix (arctic-inference)": lambda: SuffixProposer(config, max_batch_size=1, backend="arctic"),
    }
    chooser = random.Random(0)
    words = [[chooser.randrange(4096) for _ in range(chooser.randrange(2, 9))] for _ in range(400)]
    stream = [token for _ in range(max(contexts)) for token in words[int(chooser.paretovariate(1.0)) % 400]]
    sampling = DraftSampling(torch.zeros(1))
    for name, make in makers.items():
        for context in contexts:
            try:
                proposer = make()
            except ImportError:
                continue
            text, rest = stream[:context], iter(stream[context:])
            first = Committed(torch.tensor([text]), None, torch.tensor([context]), torch.tensor([context]))
            start_s = seconds(lambda p=proposer, f=first: p.propose(f, K, sampling))  # type: ignore[misc]
            rounds = [[next(rest) for _ in range(3)] for _ in range(300)]
            length, times = context, []
            for tokens in rounds:
                length += 3
                new = Committed(torch.tensor([tokens]), None, torch.tensor([3]), torch.tensor([length]))
                times.append(seconds(lambda p=proposer, n=new: p.propose(n, K, sampling)))  # type: ignore[misc]
            rate = 1 / statistics.median(times)
            rows.append({"proposer": name, "context": context, "proposals_per_s": rate, "prompt_s": start_s})
            print(f"{name:26} context {context:6}   {rate:9.0f} proposals/s   prompt {start_s * 1e3:8.1f} ms")
    return rows


def print_model_row(row: dict[str, Any]) -> None:
    print(f"\n{row['model']}, batch {row['batch']}")
    print(f"  plain        {row['plain_tokens_per_s']:8.1f} tokens/s   generate {row['generate_tokens_per_s']:8.1f}"
          f"   ratio {row['plain_ratio']:.2f}   identical {row['plain_identical']}")  # fmt: skip
    for method in ("ngram", "draft_model"):
        print(f"  {method:12} {row[f'{method}_tokens_per_s']:8.1f} tokens/s   ratio to assisted generation "
              f"{row[f'{method}_ratio']:.2f}   acceptance length {row[f'{method}_acceptance_length']:.2f}"
              f"   identical {row[f'{method}_identical']}")  # fmt: skip
    for oracle in row["oracle"]:
        print(f"  oracle {oracle['accuracy']:.1f}   acceptance length {oracle['acceptance_length']:.2f}   speedup "
              f"{oracle['speedup']:.2f}   ideal {oracle['ideal']:.2f}   measured/ideal {oracle['efficiency']:.2f}"
              f"   v({K + 1}) {oracle['verify_cost']:.2f}   c_draft {oracle['draft_cost']:.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", default="1000,8000,64000", help="context lengths of the proposers; empty: skip")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = [int(batch) for batch in options.batches.split(",")]
    models = [name for name in options.models.split(",") if name]
    rows = [row for name in models for row in benchmark_model(name, batches, options.tokens, options.repeats)]
    print()
    contexts = [int(context) for context in options.contexts.split(",") if context]
    proposers = proposals_per_second(contexts) if contexts else []
    machine = {
        "cpus": os.cpu_count(), "threads": options.threads, "python": platform.python_version(),
        "torch": torch.__version__, "load": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps({"benchmark": "decode", "machine": machine, "models": rows, "proposers": proposers}))


if __name__ == "__main__":
    main()
