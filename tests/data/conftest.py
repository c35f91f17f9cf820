"""Tokenizers and model directories for the data tests."""

from __future__ import annotations

import pytest
from chats import make_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory as far as data preparation looks into it: tokenizer and chat template."""
    path = tmp_path_factory.mktemp("verifier")
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def base_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    path = tmp_path_factory.mktemp("base_verifier")
    make_tokenizer(None).save_pretrained(path)
    return str(path)
