"""A tiny Llama verifier on disk and drafters for it. Shapes: V 40, D 24, H 16, 6 verifier layers."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.models.eagle3 import Eagle3DraftModel

VOCAB, DRAFT_VOCAB, HIDDEN = 40, 24, 16


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("verifier")
    LlamaForCausalLM(config).eval().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


def draft_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """t2d, d2t of 24 scattered ids."""
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(DRAFT_VOCAB)


@pytest.fixture
def make_drafter(verifier_path):
    def make(arch="llama", num_layers=1, draft_vocab_size=DRAFT_VOCAB, seed=0, nested=None, **arguments):
        torch.manual_seed(seed)
        from transformers import AutoConfig

        config = AutoConfig.for_model(
            arch,
            **{
                "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": num_layers,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 256,
                "pad_token_id": None, **(nested or {}),
            },
        )  # fmt: skip
        t2d, d2t = draft_maps() if draft_vocab_size != VOCAB else (None, None)
        arguments = {"norm_before_residual": True, "ttt_steps": 3, "target_layer_ids": [1, 3, 5], **arguments}
        model = Eagle3DraftModel.from_training_args(
            config, t2d=t2d, d2t=d2t, draft_vocab_size=draft_vocab_size, verifier_name_or_path=str(verifier_path),
            **arguments,
        )  # fmt: skip
        for parameter in model.parameters():  # make every weight matter
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
                parameter.data.copy_(1 + noise if parameter.ndim == 1 else noise)
        return model

    return make


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
