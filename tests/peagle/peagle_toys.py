"""Sizes, draft maps and packed rows of the P-EAGLE tests. Shapes: V 40, D 24, H 16."""

import torch

VOCAB, DRAFT_VOCAB, HIDDEN, MASK = 40, 24, 16, 39


def draft_maps():
    """t2d, d2t of 24 scattered ids."""
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(DRAFT_VOCAB)


def packed_batch(lengths, seed=0, padding=0, supervised=0.8):
    """A packed row as the trainer gives it (after the shift): documents of the given lengths, then padding."""
    generator = torch.Generator().manual_seed(seed)
    document_ids = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding])
    position_ids = torch.tensor([[p for n in lengths for p in range(1, n + 1)] + [0] * padding])
    total, real = document_ids.shape[1], document_ids != -1
    return {
        "hidden_states": torch.randn(1, total, 3 * HIDDEN, generator=generator) * real[..., None],
        "verifier_last_hidden_states": torch.randn(1, total, HIDDEN, generator=generator) * real[..., None],
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator) * real,
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long() * real,
        "document_ids": document_ids,
        "position_ids": position_ids,
    }
