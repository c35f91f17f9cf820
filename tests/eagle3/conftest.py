"""A tiny Llama verifier of 6 layers on disk, and drafters for it."""

from pathlib import Path

import pytest
import torch
from eagle3_toys import DRAFT_VOCAB, HIDDEN, VOCAB, draft_maps
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from speculators.models.eagle3 import Eagle3DraftModel


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


@pytest.fixture
def make_drafter(verifier_path):
    def make(arch="llama", num_layers=1, draft_vocab_size=DRAFT_VOCAB, seed=0, nested=None, **arguments):
        torch.manual_seed(seed)
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
            config, t2d=t2d, d2t=d2t, draft_vocab_size=draft_vocab_size,
            **{"verifier_name_or_path": str(verifier_path), **arguments},
        )  # fmt: skip
        for parameter in model.parameters():  # make every weight matter
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
                parameter.data.copy_(1 + noise if parameter.ndim == 1 else noise)
        return model

    return make
