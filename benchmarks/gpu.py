"""What a GPU does with training steps, extraction and decoding at the shape of an 8B verifier: a table, one JSON line.

    python benchmarks/gpu.py                                    the first CUDA device, under 8 minutes
    python benchmarks/gpu.py --drafters eagle3 dflash --parts train
    python benchmarks/gpu.py --shape tiny --device cpu          seconds: that it runs, and nothing more

train     each drafter: a new row of documents of random length in every step, half of it supervised, bf16 autocast,
          fp32 masters, AdamW. `floor` is the arithmetic of the step (model FLOPs: `speculators.nn.flops`, as in the log
          of training) at the speed of a product measured beside it; `mfu` is their share of the card's peak in its
          data sheet, where that is known.
extract   what training and the store read, against plain forwards of the decoder (`extract.py`).
decode    plain, ngram and an oracle that is right seven times in ten, against transformers' `generate` (`decode.py`).

Weights are random. What fails is a row that says so, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from decode import generate
from decode_efficiency import K, Oracle, decode, seconds
from extract import PLAIN, best_times_s, extraction_ways, make_rows
from torch._dynamo.utils import counters
from train_step import DRAFTERS, MASK_TOKEN
from transformers import AutoModelForCausalLM, LlamaConfig

from speculators.decoding import Engine
from speculators.interfaces import CaptureSpec
from speculators.train.flops import TERA, peak_flop_per_s
from speculators.train.optimizers import make_optimizers
from speculators.train.records import TrainerConfig

PARTS = ("train", "extract", "decode")
ACCURACY = 0.7
NGRAM = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_min": 1, "prompt_lookup_max": 2}


@dataclass(frozen=True)
class Shape:
    """An 8B Llama, and the rows and prompts that it is tried with."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 32
    vocab: int = 128256
    draft_vocab: int = 32000
    length: int = 8192
    """Columns of a row."""
    longest_document: int = 4096
    steps: int = 3
    """Of unrolled drafters, and heads of the others."""
    anchors: int = 512
    warm_up: int = 4
    measured: int = 10
    prompt: int = 128
    tokens: int = 64
    batches: tuple[int, ...] = (1, 8, 32)
    rows: int = 32
    """Of extraction, up to a quarter of `length` long."""
    product: int = 8192
    """Size of the square product whose speed is the card's."""


TINY = Shape(64, 96, 2, 1, 32, 4, 512, 256, 128, 48, 2, 8, 1, 2, 8, 8, (1, 2), 4, 256)
SHAPES = {"8b": Shape(), "tiny": TINY}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--drafters", nargs="+", choices=list(DRAFTERS), default=list(DRAFTERS))
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing new begins after")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--shape tiny --device cpu` shows that the benchmark runs")
    return options


# -- training ----------------------------------------------------------------------------------------------------------


def product_flop_per_s(shape: Shape, device: torch.device) -> float:
    """Of a square product in bf16: what the card gives at best."""
    left, right = (torch.randn(shape.product, shape.product, device=device).bfloat16() for _ in range(2))
    times_s = [timed(lambda: left @ right, device) for _ in range(8)]
    return 2 * shape.product**3 / statistics.median(times_s[3:])


def timed(run: Callable[[], Any], device: torch.device) -> float:
    def waited_for() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds(waited_for)


@contextmanager
def uninitialised() -> Iterator[None]:
    """Leaves weights undrawn on the host: they are drawn on the device (`on_device`)."""
    drawn = {name: getattr(torch.Tensor, name) for name in ("normal_", "uniform_")}
    for name in drawn:
        setattr(torch.Tensor, name, lambda weight, *_, **__: weight)
    try:
        yield
    finally:
        for name, function in drawn.items():
            setattr(torch.Tensor, name, function)


def on_device(model: Any, device: torch.device) -> Any:
    """All weights fp32, random; a norm is one."""
    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0)
    return model.train()


def packed_row(shape: Shape, model: Any, step: int) -> dict[str, torch.Tensor]:
    """A new row: other documents, other supervised tokens."""
    chooser, generator = random.Random(step), torch.Generator().manual_seed(step)
    lengths: list[int] = []
    while sum(lengths) < shape.length:
        lengths.append(min(chooser.randint(1, shape.longest_document), shape.length - sum(lengths)))
    num_aux = len(model.target_layer_ids) if model.capture.aux_layer_ids else 1
    T = shape.length
    return {
        "hidden_states": torch.randn(1, T, num_aux * shape.hidden, generator=generator).bfloat16(),
        "verifier_last_hidden_states": torch.randn(1, T, shape.hidden, generator=generator).bfloat16(),
        "input_ids": torch.randint(MASK_TOKEN + 1, shape.vocab, (1, T), generator=generator),
        "loss_mask": (torch.rand(1, T, generator=generator) < 0.5).long(),
        "document_ids": torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1),
        "position_ids": torch.cat([torch.arange(1, n + 1)[None] for n in lengths], 1),
    }


def train_options(shape: Shape) -> argparse.Namespace:
    sizes = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "draft_vocab", "length", "steps")
    return argparse.Namespace(**{name: getattr(shape, name) for name in sizes}, anchors=shape.anchors)


def measure_training(drafter: str, shape: Shape, device: torch.device, flop_per_s: float) -> dict[str, float]:
    with uninitialised():
        model, keywords = DRAFTERS[drafter][0](train_options(shape), {"attention": "simple_flex_attention"})
    on_device(model, device)
    kwargs, _ = model.get_trainer_kwargs(**keywords)
    optimizers = make_optimizers(model, TrainerConfig(lr=1e-4, num_epochs=1, save_path=""))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compiled_before, times_s, flops = counters["stats"]["unique_graphs"], [], []
    reset_peak(device)
    for step in range(shape.warm_up + shape.measured):
        row = packed_row(shape, model, step)
        batch = {k: v if k in model.columns_on_host else v.to(device) for k, v in row.items()}

        def one_step(batch: dict[str, torch.Tensor] = batch) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**batch, **kwargs)[1]
            loss.backward()
            optimizers.clipped_step(trained, 1.0)

        times_s.append(timed(one_step, device))
        flops.append(model.row_flop)
    step_s, step_flop = (statistics.median(values[shape.warm_up :]) for values in (times_s, flops))
    floor_s, peak = step_flop / flop_per_s, peak_flop_per_s(device, torch.bfloat16)
    return {
        "model_tflop": step_flop / TERA,
        "step_s": step_s,
        "floor_s": floor_s,
        "ratio": step_s / floor_s,
        **({} if peak is None else {"mfu": step_flop / step_s / peak}),
        "tokens_per_s": shape.length / step_s,
        "peak_gib": peak_gib(device),
        "compilations": counters["stats"]["unique_graphs"] - compiled_before,
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -- the verifier ------------------------------------------------------------------------------------------------------


def random_verifier(shape: Shape, device: torch.device) -> Any:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(shape.length, 2048),
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def measure_extraction(model: Any, shape: Shape, device: torch.device) -> dict[str, float]:
    """Tokens per second of each way."""
    lengths = (shape.length // 32, shape.length // 4)
    options = argparse.Namespace(num_rows=shape.rows, lengths=lengths, clock="wall", repeats=2, device=device.type)
    rows = make_rows(options, shape.vocab)
    capture = CaptureSpec((2, shape.layers // 2, shape.layers - 1), last_hidden=True)
    ways = extraction_ways(model, capture, rows)
    del ways[PLAIN[0]]  # one padded batch of all rows: no memory for it
    num_tokens = sum(map(len, rows))
    return {name: num_tokens / time_s for name, time_s in best_times_s(ways, options).items()}


def measure_decoding(model: Any, shape: Shape, batch: int) -> dict[str, float]:
    """Tokens per second of each loop; `same` says how many of the oracle's texts are those of plain decoding."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, shape.vocab, (batch, shape.prompt), generator=generator).tolist()
    plain = Engine(model, max_batch_size=batch)
    outputs = decode(plain, prompts, shape.tokens + K)
    texts = [p + o for p, o in zip(prompts, outputs, strict=True)]
    oracle = Engine(model, Oracle(texts, ACCURACY), num_speculative_tokens=K, max_batch_size=batch)
    ngram = Engine(model, NGRAM, max_batch_size=batch)
    loops = {
        "generate": lambda: generate(model, prompts, shape.tokens),
        "plain": lambda: decode(plain, prompts, shape.tokens),
        "ngram": lambda: decode(ngram, prompts, shape.tokens),
        "oracle": lambda: decode(oracle, prompts, shape.tokens),
    }
    for run in loops.values():
        run()
    found = {name: batch * shape.tokens / min(seconds(run) for _ in range(2)) for name, run in loops.items()}
    same = sum(a == b[: shape.tokens] for a, b in zip(loops["oracle"](), outputs, strict=True)) / batch
    return {**found, "plain_of_generate": found["plain"] / found["generate"], "same": same}


# -- all of it ---------------------------------------------------------------------------------------------------------


def attempt(name: str, measure: Callable[[], dict[str, float]], deadline_s: float) -> dict[str, Any]:
    """The row, printed: its figures, or why there are none."""
    if time.perf_counter() > deadline_s:
        row: dict[str, Any] = {"skipped": "the time is over"}
    else:
        try:
            row = dict(measure())
        except Exception as error:  # one route must not hide the others' figures
            row = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    shown = "   ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(f"{name:<16}{shown}", flush=True)
    return row


def main() -> None:
    options = arguments()
    shape, device, start_s = SHAPES[options.shape], torch.device(options.device), time.perf_counter()
    end_s = start_s + options.minutes * 60
    flop_per_s = product_flop_per_s(shape, device)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "product_tflop_per_s": flop_per_s / 1e12,
    }
    print("   ".join(f"{key} {value}" for key, value in machine.items()))
    found: dict[str, Any] = {"train": {}, "extract": {}, "decode": {}}
    if "train" in options.parts:
        for drafter in options.drafters:
            found["train"][drafter] = attempt(
                drafter, lambda d=drafter: measure_training(d, shape, device, flop_per_s), end_s
            )
    if {"extract", "decode"} & set(options.parts):
        model = random_verifier(shape, device)
        if "extract" in options.parts:
            found["extract"] = attempt("extract", lambda: measure_extraction(model, shape, device), end_s)
        for batch in shape.batches if "decode" in options.parts else ():
            name = f"decode, batch {batch}"
            found["decode"][batch] = attempt(name, lambda b=batch: measure_decoding(model, shape, b), end_s)
    took_s = time.perf_counter() - start_s
    print(json.dumps({"benchmark": "gpu", "shape": options.shape, "machine": machine, **found, "seconds": took_s}))


if __name__ == "__main__":
    main()
