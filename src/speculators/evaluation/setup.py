"""Loading what is decoded with: the verifier, its tokenizer, and an engine a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from speculators.decoding import Engine
from speculators.evaluation.methods import Method
from speculators.verifier import load_verifier

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Decodable:
    """A verifier ready to decode."""

    model: PreTrainedModel
    tokenizer: Any

    def engine(self, method: Method, *, max_batch_size: int, max_length: int | None = None) -> Engine:
        return Engine(
            self.model,
            method.speculative_config,
            tokenizer=self.tokenizer,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )


def load_decodable(
    verifier: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> Decodable:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    model = load_verifier(
        verifier,
        dtype=getattr(torch, dtype),
        device=default_device() if device == "auto" else device,
        trust_remote_code=trust_remote_code,
    )
    return Decodable(model, AutoTokenizer.from_pretrained(verifier, trust_remote_code=trust_remote_code))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
