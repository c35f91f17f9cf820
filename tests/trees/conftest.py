"""A tiny Llama verifier of 6 layers, and one saved checkpoint of each drafter that can draft trees."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import speculators.models.eagle
import speculators.models.eagle3
import speculators.models.medusa
import speculators.models.mlp
import speculators.models.mtp
import speculators.models.peagle  # noqa: F401
from speculators.model import SpeculatorModel

VOCAB, HIDDEN = 32, 16
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
KEPT = torch.arange(VOCAB) % 4 != 2
"""Draft vocabulary: 24 of the 32 tokens."""
OFFSETS = KEPT.nonzero()[:, 0] - torch.arange(int(KEPT.sum()))
ARGUMENTS = {
    "eagle": {},
    "eagle3": {"target_layer_ids": [1, 3, 5], "t2d": KEPT, "d2t": OFFSETS, "draft_vocab_size": int(KEPT.sum())},
    "peagle": {
        "target_layer_ids": [1, 3, 5],
        "t2d": KEPT,
        "d2t": OFFSETS,
        "draft_vocab_size": int(KEPT.sum()),
        "num_depths": 4,
        "mask_token_id": 3,
    },
    "mtp": {},
    "medusa": {"num_heads": 3},
    "mlp": {"n_predict": 3, "inner_dim": 12},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=6, initializer_range=0.3)).eval()
    path = tmp_path_factory.mktemp("verifier")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path).eval()


@pytest.fixture(scope="session")
def checkpoints(verifier_path, tmp_path_factory):
    """Paths by type. Weights are random: what is accepted is luck, and there is enough of it in a tree."""
    paths = {}
    for name, arguments in ARGUMENTS.items():
        torch.manual_seed(1)
        config = LlamaConfig(**SHAPE, num_hidden_layers=1)
        model_class = SpeculatorModel.registry[name]
        model = model_class.from_training_args(config, verifier_name_or_path=str(verifier_path), **arguments)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.ndim > 1 and "embed" not in key:
                parameter.data.normal_(0.0, 0.3)
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
    return paths
