"""Sizes and batches of the toys in conftest.py, and two processes that are ranks of one run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

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


def run_on_two_ranks(script: str, *arguments: object, folder: Path, timeout_s: float) -> None:
    """Runs a script as both ranks of a gloo run on CPUs; fails with what rank 0 wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, *map(str, arguments)]
    logs = [(folder / f"log{rank}").open("w+") for rank in range(2)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=log, stderr=log)
        for r, log in enumerate(logs)
    ]
    codes = [process.wait(timeout_s) for process in processes]
    for log in logs:
        log.close()
    assert codes == [0, 0], (folder / "log0").read_text()[-3000:]
