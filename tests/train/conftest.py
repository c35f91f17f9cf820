"""Toys: a third-party algorithm (tests/fixtures/myalgo), a verifier of 3 tiny layers, a prepared dataset."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from training_toys import FIXTURES, HIDDEN_SIZE, VOCAB_SIZE

if str(FIXTURES) not in sys.path:
    sys.path.insert(0, str(FIXTURES))


@pytest.fixture(scope="session")
def verifier_path(tmp_path_factory) -> Path:
    """A random Llama, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("verifier")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data_path(tmp_path_factory) -> Path:
    """40 documents of a language of counting: the next token is the last one plus the document's stride."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(40):
        length = int(torch.randint(8, 24, (), generator=generator))
        start, stride = torch.randint(1, VOCAB_SIZE, (2,), generator=generator).tolist()
        ids = [(start + stride * step) % VOCAB_SIZE for step in range(length)]
        rows.append({"input_ids": ids, "loss_mask": [0] * 3 + [1] * (length - 3), "seq_len": length})
    path = tmp_path_factory.mktemp("data")
    Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.fixture
def make_model():
    """A fresh toy drafter with seeded weights."""
    from myalgo import MyAlgoConfig, MyAlgoDraftModel

    def make(seed: int = 0):
        torch.manual_seed(seed)
        return MyAlgoDraftModel(MyAlgoConfig(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_layers=2))

    return make
