"""Sizes, draft maps and packed rows of the EAGLE-3 tests. Shapes: V 40, D 24, H 16."""

import torch

VOCAB, DRAFT_VOCAB, HIDDEN = 40, 24, 16


def draft_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """t2d, d2t of 24 scattered ids."""
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(DRAFT_VOCAB)


def packed_batch(lengths, seed=0, padding=0, num_aux=3, supervised=0.7):
    """A packed row as the trainer gives it (after the shift): documents of the given lengths, then padding."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    document_ids = torch.full((1, total), -1)
    position_ids = torch.zeros(1, total, dtype=torch.int64)
    start = 0
    for i, length in enumerate(lengths):
        document_ids[0, start : start + length] = i
        position_ids[0, start : start + length] = torch.arange(1, length + 1)
        start += length
    real = document_ids != -1
    return {
        "hidden_states": torch.randn(1, total, num_aux * HIDDEN, generator=generator) * real[..., None],
        "verifier_last_hidden_states": torch.randn(1, total, HIDDEN, generator=generator) * real[..., None],
        "input_ids": torch.randint(0, VOCAB, (1, total), generator=generator) * real,
        "loss_mask": (torch.rand(1, total, generator=generator) < supervised).long() * real,
        "document_ids": document_ids,
        "position_ids": position_ids,
    }
