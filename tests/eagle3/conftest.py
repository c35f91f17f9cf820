"""A tiny Llama verifier of 6 layers on disk, and drafters for it."""

from pathlib import Path

import pytest
import torch
from drafter_toys import DRAFT_VOCAB, VOCAB, decoder_config, draft_maps, randomise, save_llama
from transformers import LlamaForCausalLM

from speculators.models.eagle3 import Eagle3DraftModel


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("verifier"), num_layers=6)


@pytest.fixture(scope="session")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


@pytest.fixture
def make_drafter(verifier_path):
    def make(arch="llama", num_layers=1, draft_vocab_size=DRAFT_VOCAB, seed=0, nested=None, **arguments):
        torch.manual_seed(seed)
        config = decoder_config(arch, **{"num_hidden_layers": num_layers, **(nested or {})})
        t2d, d2t = draft_maps() if draft_vocab_size != VOCAB else (None, None)
        plain = {"norm_before_residual": True, "norm_before_fc": False, "norm_output": False}  # unless a test says so
        arguments = {**plain, "ttt_steps": 3, "target_layer_ids": [1, 3, 5], **arguments}
        model = Eagle3DraftModel.from_training_args(
            config,
            t2d=t2d,
            d2t=d2t,
            draft_vocab_size=draft_vocab_size,
            **{"verifier_name_or_path": str(verifier_path), **arguments},
        )
        randomise(model)
        return model

    return make
