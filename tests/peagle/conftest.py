"""A tiny Llama verifier of 6 layers on disk, and P-EAGLE drafters for it."""

from pathlib import Path

import pytest
import torch
from peagle_toys import DRAFT_VOCAB, HIDDEN, MASK, VOCAB, draft_maps
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from speculators.models.peagle import PEagleDraftModel


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
    def make(arch="qwen3", num_layers=1, draft_vocab_size=DRAFT_VOCAB, seed=0, nested=None, **arguments):
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
        arguments = {"num_depths": 4, "target_layer_ids": [1, 3, 5], "mask_token_id": MASK, **arguments}
        model = PEagleDraftModel.from_training_args(
            config, t2d=t2d, d2t=d2t, draft_vocab_size=draft_vocab_size, verifier_name_or_path=str(verifier_path),
            **arguments,
        )  # fmt: skip
        for name, parameter in model.named_parameters():  # make every weight matter
            if parameter.requires_grad and name != "embed_tokens.weight":
                noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
                parameter.data.copy_(1 + noise if parameter.ndim == 1 else noise)
        model.mask_hidden.data.normal_()
        return model

    return make
