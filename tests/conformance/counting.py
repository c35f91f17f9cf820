"""A verifier that counts, text it writes, and drafters that `train` makes for it. What every algorithm is held to.

Tokens 1 .. 30 stand on a ring in a shuffled order, and the verifier always says the next one: its embedding is a frame
of orthogonal rows, its head the same frame turned by one. Its layers add noise that depends on the context, too little
to change the greedy token: states differ everywhere, and what is drafted must be read from the right place.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import speculators.models
from speculators.train.config import TrainConfig
from speculators.train.draft_shape import build_model

VOCAB, HIDDEN, NUM_LAYERS = 32, 32, 8
MASK_TOKEN = 31
RING = (1 + torch.randperm(30, generator=torch.Generator().manual_seed(0))).tolist()
SUCCESSOR = dict(zip(RING, RING[1:] + RING[:1], strict=True))

BUILT_IN = sorted(module.name for module in pkgutil.iter_modules(speculators.models.__path__) if module.ispkg)
THIRD_PARTY = "myalgo"
FIXTURES = Path(__file__).parents[1] / "fixtures"
"""Where it lies: outside the package."""


def count_from(token: int, length: int) -> list[int]:
    text = [token]
    while len(text) < length:
        text.append(SUCCESSOR[text[-1]])
    return text


def llama(noise: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=noise,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def counting_verifier(path: Path) -> Path:
    model = llama(noise=0.12)
    frame_VH = nn.init.orthogonal_(torch.empty(VOCAB, HIDDEN)) * HIDDEN**0.5
    turned_VH = frame_VH.clone()
    for token, successor in SUCCESSOR.items():
        turned_VH[successor] = frame_VH[token]
    turned_VH[[0, MASK_TOKEN]] = 0.0
    model.model.embed_tokens.weight.data.copy_(frame_VH)
    model.lm_head.weight.data.copy_(turned_VH / 2)
    model.model.norm.weight.data.copy_(1 + 0.2 * torch.randn(HIDDEN))
    model.save_pretrained(path)
    return path


def wandering_verifier(path: Path) -> Path:
    """Random weights, large ones: its greedy text does not settle, and drafts of it are mostly wrong."""
    llama(noise=0.4).save_pretrained(path)
    return path


def counted_text(path: Path) -> Path:
    """A prepared data set: 60 texts of the counting verifier, the first tokens of each unsupervised."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(60):
        start, extra = torch.randint(30, (2,), generator=generator).tolist()
        ids = count_from(RING[start], 8 + extra)
        rows.append({"input_ids": ids, "loss_mask": [0] * 2 + [1] * (len(ids) - 2), "seq_len": len(ids)})
    Dataset.from_list(rows).save_to_disk(path)
    # by place on the ring: what is kept of them is scattered over the ids
    frequencies = {token: 1 + place for place, token in enumerate(RING)}
    torch.save(frequencies, path / "token_freq.pt")
    return path


def train_config(name: str, verifier: Path, data: Path, save_path: Path, **changes: Any) -> TrainConfig:
    """The algorithm's own defaults, on a small scale."""
    settings = {
        "speculator_type": name,
        "verifier_name_or_path": str(verifier),
        "data_path": str(data),
        "save_path": str(save_path),
        "mask_token_id": MASK_TOKEN,
        "total_seq_len": 64,
        "lr": 0.01,
        "block_size": 4,
        "max_anchors": 48,
        "optimizer": "adamw",
        "hidden_states_dtype": "float32",
        "train_data_ratio": 0.9,
        "epochs": 9,
        "checkpoint_freq": 1000,
    }
    return TrainConfig.from_flat({**settings, **changes})


def untrained(name, verifier_path, data_path, save_path, **changes):
    """A new drafter as `train` builds it, every trained weight random, so that each of them matters."""
    config = train_config(name, verifier_path, data_path, save_path, **changes)
    model = build_model(config, AutoConfig.from_pretrained(verifier_path))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
            parameter.data.copy_(1 + noise if parameter.ndim == 1 else noise)
    return model.eval()
