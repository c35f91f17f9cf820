"""Hidden states: extracting them against the verifier's plain forwards, reading the store against reading its files.

    python benchmarks/extract.py --verifier HuggingFaceTB/SmolLM2-135M-Instruct            24 rows of 82 to 337 tokens
    python benchmarks/extract.py --num-rows 8 --megabytes 64                                       seconds, not minutes

Plain forwards run the decoder alone and keep nothing: all rows in one padded batch, a row at a time, and rows of like
length in batches of at most 512 positions. `training` is the source that `train` reads, `generate-offline-data` the one
that writes the store (without the writing). The ways take turns, so that a machine that slows down slows all of them; a
way's time is its best one. On a machine that others use too, `--threads 1 --clock cpu` is steadier.

Reading ends with all bytes in buffers of their own, from the page cache: the first time with checksums, later without.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speculators.assets import tiny_verifier_path
from speculators.data_generation import LocalSource, ShardedStore, WriteOptions
from speculators.data_generation.sources.local import compute_in_order
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.verifier import load_verifier
from speculators.verifier.config import resolve_target_layer_ids, text_config

PLAIN = ("one padded batch", "a row at a time", "like lengths, 512 positions")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", default=str(tiny_verifier_path()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of this process")
    parser.add_argument("--num-rows", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs=2, default=(82, 337), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the store that is read")
    return parser.parse_args()


def make_rows(options: argparse.Namespace, vocab_size: int) -> list[Tensor]:
    """Random tokens; lengths are spread evenly and shuffled."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(*options.lengths, options.num_rows).round().long()
    lengths = lengths[torch.randperm(len(lengths), generator=generator)]
    return [torch.randint(vocab_size, (int(length),), generator=generator) for length in lengths]


def best_times_s(ways: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """Runs the ways in turn, each once before the clock starts."""
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    times_s = {name: float("inf") for name in ways}
    for repeat in range(options.repeats + 1):
        for name, run in ways.items():
            begun_s = clock()
            run()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                times_s[name] = min(times_s[name], clock() - begun_s)
    return times_s


# -- extracting --------------------------------------------------------------------------------------------------------


def like_lengths(rows: Sequence[Tensor], most_positions: int) -> list[list[Tensor]]:
    batches: list[list[Tensor]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= most_positions:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def extraction_ways(model: torch.nn.Module, capture: CaptureSpec, rows: list[Tensor]) -> dict[str, Callable]:
    decoder = model.get_decoder()
    device = next(model.parameters()).device

    @torch.no_grad()
    def forward(batches: Sequence[Sequence[Tensor]]) -> None:
        for batch in batches:
            decoder(input_ids=pad_sequence(list(batch), batch_first=True).to(device), use_cache=False)

    return {
        PLAIN[0]: lambda: forward([rows]),
        PLAIN[1]: lambda: forward([[row] for row in rows]),
        PLAIN[2]: lambda: forward(like_lengths(rows, 512)),
        "training": lambda: LocalSource(model, capture).read(rows),
        "generate-offline-data": lambda: list(compute_in_order(model, capture, rows, range(len(rows)))),
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def copied(states: VerifierStates) -> tuple[Tensor, ...]:
    parts = (states.aux_TD, states.last_hidden_TH)
    return tuple(part.clone() for part in parts if part is not None)


def reading_ways(directory: Path, rows: list[Tensor], capture: CaptureSpec) -> dict[str, Callable]:
    later = ShardedStore(directory, capture, rows)

    def read_files() -> None:
        for path in directory.glob("*.shard"):
            path.read_bytes()

    def read_store(store: ShardedStore) -> None:
        for row in rows:
            copied(store.read([row])[0])

    return {
        "files": read_files,
        "store, first time": lambda: read_store(ShardedStore(directory, capture, rows)),
        "store, later": lambda: read_store(later),
    }


def write_store(directory: Path, megabytes: int, capture: CaptureSpec, dtype: torch.dtype) -> list[Tensor]:
    """Writes random states of rows of 512 tokens and 576 numbers per layer."""
    generator = torch.Generator().manual_seed(1)
    num_tokens, hidden_size = 512, 576
    num_aux = len(capture.aux_layer_ids)
    bytes_per_row = num_tokens * hidden_size * (num_aux + 1) * dtype.itemsize
    rows = [torch.randint(32000, (num_tokens,), generator=generator) for _ in range(megabytes * 2**20 // bytes_per_row)]
    store = ShardedStore(directory, capture, rows, options=WriteOptions())
    aux_TD = torch.randn(num_tokens, num_aux * hidden_size, generator=generator).to(dtype)
    last_TH = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    for index, ids in enumerate(rows):
        store.put_row(index, VerifierStates(ids, aux_TD, last_TH))
    store.close()
    return rows


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = load_verifier(options.verifier, dtype=getattr(torch, options.dtype), device=torch.device(options.device))
    config = text_config(model.config)
    capture = CaptureSpec(resolve_target_layer_ids(None, config), last_hidden=True)
    rows = make_rows(options, config.vocab_size)
    num_tokens = sum(map(len, rows))
    times_s = best_times_s(extraction_ways(model, capture, rows), options)
    tokens_per_s = {name: num_tokens / time_s for name, time_s in times_s.items()}
    best = max(tokens_per_s[name] for name in PLAIN)
    with tempfile.TemporaryDirectory() as directory:
        stored = write_store(Path(directory), options.megabytes, capture, torch.bfloat16)
        num_bytes = sum(path.stat().st_size for path in Path(directory).glob("*.shard"))
        read_s = best_times_s(reading_ways(Path(directory), stored, capture), options)
    gb_per_s = {name: num_bytes / time_s / 1e9 for name, time_s in read_s.items()}
    print(
        f"{len(rows)} rows of {options.lengths[0]} to {options.lengths[1]} tokens, {options.dtype}, {options.device}\n"
    )
    print("| forwards | tokens/s | of the best plain one |\n|---|---|---|")
    for name, speed in tokens_per_s.items():
        print(f"| {'plain, ' if name in PLAIN else ''}{name} | {speed:,.0f} | {speed / best:.2f} |")
    print("\n| reading | GB/s | of raw files |\n|---|---|---|")
    for name, speed in gb_per_s.items():
        print(f"| {name} | {speed:.2f} | {speed / gb_per_s['files']:.2f} |")
    ratios = {name: tokens_per_s[name] / best for name in ("training", "generate-offline-data")}
    reads = {name: gb_per_s[name] / gb_per_s["files"] for name in ("store, first time", "store, later")}
    print(json.dumps({"tokens_per_s": tokens_per_s, "ratios": ratios, "gb_per_s": gb_per_s, "read_ratios": reads}))


if __name__ == "__main__":
    main()
