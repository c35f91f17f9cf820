"""A random verifier on disk, and drafters of every algorithm with weights that make them draft all kinds of tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.train.config import TrainConfig
from speculators.train.draft_shape import build_model, load_verifier_config

VOCAB, DRAFT_VOCAB = 64, 40


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("verifier")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> str:
    """Frequencies by which 40 tokens are kept that are no prefix of the vocabulary."""
    path = tmp_path_factory.mktemp("vocabulary") / "token_freq.pt"
    torch.save({token: 100 - token % 7 for token in range(VOCAB)}, path)
    return str(path)


@pytest.fixture
def make_checkpoint(verifier_path, vocabulary, tmp_path):
    """A saved drafter, as `train` makes it from these flags, with random weights."""

    def make(speculator_type: str, seed: int = 0, **flags) -> str:
        config = TrainConfig.from_flat(
            {
                "speculator_type": speculator_type,
                "verifier_name_or_path": verifier_path,
                "data_path": str(tmp_path),
                "save_path": str(tmp_path / "run"),
                "token_freq_path": vocabulary,
                "target_layer_ids": [1, 3, 5],
                **flags,
            }
        )
        torch.manual_seed(seed)
        model = build_model(config, load_verifier_config(verifier_path, False))
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 0.3 if parameter.dim() > 1 else 0.1
                parameter.data += scale * torch.randn_like(parameter)
        path = tmp_path / f"{speculator_type}-{seed}"
        model.save_pretrained(path)
        return str(path)

    return make
