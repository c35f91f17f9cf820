"""Sizes and batches of the toys in conftest.py, and two processes that are ranks of one run."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch
from ports import free_port

from speculators.train.records import TrainerConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
VOCAB_SIZE, HIDDEN_SIZE = 64, 16


def random_batch(seed: int, num_tokens: int = 24) -> dict[str, torch.Tensor]:
    """A packed row of two documents and some padding, states of two aux layers."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.tensor([0] * 10 + [1] * (num_tokens - 12) + [-1] * 2)
    return {
        "input_ids": torch.randint(0, VOCAB_SIZE, (1, num_tokens), generator=generator),
        "hidden_states": torch.randn(1, num_tokens, 2 * HIDDEN_SIZE, generator=generator),
        "verifier_last_hidden_states": torch.randn(1, num_tokens, HIDDEN_SIZE, generator=generator),
        "loss_mask": torch.ones(1, num_tokens, dtype=torch.int64),
        "position_ids": torch.arange(num_tokens)[None],
        "document_ids": documents[None],
    }


def trainer_config(**changes) -> TrainerConfig:
    """For what asks a trainer's configuration and saves nothing by it."""
    return TrainerConfig(**{"lr": 1e-3, "num_epochs": 1, "save_path": "unused", **changes})


def run_on_two_ranks(script: str | Path, *arguments: object, folder: Path, timeout_s: float) -> list[str]:
    """Runs a script as both ranks of a gloo run on CPUs; returns what each wrote to stdout, fails with their stderr.

    Both are forked from a server that has imported what takes longer than most of these runs; it ends with the tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["speculators.train.run"])
    argv, port = [str(script), *map(str, arguments)], free_port()
    ranks = [context.Process(target=run_as_rank, args=(rank, port, folder, argv)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout_s)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
        rank.close()
    assert codes == [0, 0], [(folder / f"stderr{rank}").read_text()[-3000:] for rank in range(2)]
    return [(folder / f"stdout{rank}").read_text() for rank in range(2)]


def run_as_rank(rank: int, port: int, folder: Path, argv: list[str]) -> None:
    """Runs the script in this process, which was forked for it."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
