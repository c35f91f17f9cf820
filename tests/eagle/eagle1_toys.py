"""Sizes and packed rows of the EAGLE tests. Shapes: V 40, H 16."""

import torch

VOCAB, HIDDEN = 40, 16


def packed_batch(lengths, seed=0, padding=0, supervised=0.7):
    """A packed row as the trainer gives it (aligned): documents of the given lengths, then padding."""
    generator = torch.Generator().manual_seed(seed)
    document_ids = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding])
    position_ids = torch.tensor([[p for n in lengths for p in range(n)] + [0] * padding])
    total, real = document_ids.shape[1], document_ids != -1
    return {
        "hidden_states": torch.randn(1, total, HIDDEN, generator=generator) * real[..., None],
        "verifier_last_hidden_states": torch.randn(1, total, HIDDEN, generator=generator) * real[..., None],
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator) * real,
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long() * real,
        "document_ids": document_ids,
        "position_ids": position_ids,
    }
