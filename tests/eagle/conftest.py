"""A tiny Llama verifier on disk, and EAGLE drafters for it."""

from pathlib import Path

import pytest
import torch
from drafter_toys import decoder_config, randomise, save_llama
from transformers import LlamaForCausalLM

from speculators.models.eagle import EagleSpeculator


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("verifier"), num_layers=3, norm_noise=0.3)


@pytest.fixture(scope="session")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval().requires_grad_(False)


@pytest.fixture
def make_drafter(verifier_path):
    def make(arch="llama", seed=0, nested=None, **arguments):
        torch.manual_seed(seed)
        config = decoder_config(arch, **(nested or {}))
        model = EagleSpeculator.from_training_args(config, verifier_name_or_path=str(verifier_path), **arguments)
        randomise(model)
        return model.eval()

    return make
