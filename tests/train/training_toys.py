"""Sizes and batches of the toys in conftest.py."""

from __future__ import annotations

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
