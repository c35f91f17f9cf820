"""Loads a verifier with its tokenizer for decoding, by name or around a model that is loaded already."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speculators.decoding.settings import DEFAULT_DEVICE, DEFAULT_DTYPE, refuse_unknown_dtype
from speculators.utils.progress import no_progress_bars
from speculators.utils.quantized import tokenizer_source
from speculators.utils.util import chosen_device
from speculators.verifier import load_verifier

VerifierSource = str | os.PathLike[str] | PreTrainedModel
"""Hub id, directory, or a loaded causal LM (`load_verifier`)."""


@dataclass(frozen=True)
class DecodingTarget:
    """A verifier ready to decode."""

    name: str
    """Hub id or directory; "" for a model that was never saved."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@no_progress_bars()
def open_target(
    verifier: VerifierSource,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> DecodingTarget:
    """Loads the verifier unless it is a model already, and its tokenizer unless one is given.

    `dtype` (None: float32) and `device` (None or "auto": the first CUDA device, else the CPU) are of a verifier that is
    loaded here. Raises `ValueError` for one that cannot be loaded, and for a dtype or device given for a loaded model.
    """
    if isinstance(verifier, PreTrainedModel):
        given = {"dtype": dtype, "device": None if device == DEFAULT_DEVICE else device}
        for key, value in given.items():
            if value is not None:
                raise ValueError(f"{key}={value!r} but the verifier is loaded already; call verifier.to(...) instead")
        name, model = verifier.name_or_path or "", verifier
    else:
        name = os.fspath(verifier)
        dtype = dtype or DEFAULT_DTYPE
        refuse_unknown_dtype(dtype)
        model = load_verifier(
            name, dtype=getattr(torch, dtype), device=chosen_device(device), trust_remote_code=trust_remote_code
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(name, trust_remote_code)
    return DecodingTarget(name, model, tokenizer)


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not name:
        raise ValueError("the verifier was not loaded from a directory or hub id: give its tokenizer too (tokenizer=)")
    return AutoTokenizer.from_pretrained(**tokenizer_source(name), trust_remote_code=trust_remote_code)


def served_temperature(target: DecodingTarget) -> float | None:
    """The verifier's generation_config.json says what vLLM samples with where a request does not: `temperature`, with
    or without `do_sample`. None where it says neither: vLLM then samples at 1, and a client may ask for anything."""
    config = getattr(target.model, "generation_config", None)
    temperature = None if config is None else config.to_diff_dict().get("temperature")
    if temperature is None:
        return 1.0 if getattr(config, "do_sample", False) else None
    return float(temperature)
