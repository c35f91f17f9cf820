"""A tiny Llama verifier on disk, and EAGLE drafters for it."""

from pathlib import Path

import pytest
import torch
from eagle1_toys import HIDDEN, VOCAB
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from speculators.models.eagle import EagleSpeculator


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("verifier")
    model = LlamaForCausalLM(config).eval()
    model.model.norm.weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval().requires_grad_(False)


@pytest.fixture
def make_drafter(verifier_path):
    def make(arch="llama", seed=0, nested=None, **arguments):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            arch,
            **{
                "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 256,
                "pad_token_id": None, **(nested or {}),
            },
        )  # fmt: skip
        model = EagleSpeculator.from_training_args(config, verifier_name_or_path=str(verifier_path), **arguments)
        for parameter in model.parameters():  # make every weight matter
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
                parameter.data.copy_(1 + noise if parameter.ndim == 1 else noise)
        return model.eval()

    return make
