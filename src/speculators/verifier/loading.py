"""Loads a verifier: any Hugging Face causal LM, from safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from speculators.utils.files import refuse_missing_verifier
from speculators.utils.quiet import no_progress_bars
from speculators.verifier.config import first_line, open_verifier_config, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@no_progress_bars()
def load_verifier(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Loads a causal LM in eval mode, without gradients; `dtype=None` keeps the checkpoint's own dtype.

    Raises ValueError, before any weight is read, for a path that is not there, a device that torch does not have, a
    config that transformers cannot read and an encoder-decoder; after it, for weights that are not safetensors."""
    from transformers import AutoModelForCausalLM  # imports modelling code: only who loads a model pays for it

    name = str(name_or_path)
    refuse_missing_device(device)
    refuse_missing_verifier(name)
    config = open_verifier_config(name, trust_remote_code, revision)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name!r} is an encoder-decoder ({config.model_type}); a verifier must be a causal LM")
    # sdpa has no soft cap and transformers drops it silently there: the eager path is the trained model
    is_capped = getattr(text_config(config), "attn_logit_softcapping", None)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype if dtype is not None else "auto",
            trust_remote_code=trust_remote_code,
            revision=revision,
            use_safetensors=True,
            **({"attn_implementation": "eager"} if is_capped else {}),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load {name!r} as a causal LM from safetensors: {first_line(error)}") from error
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def refuse_missing_device(device: torch.device | str | None) -> None:
    """Before anything is loaded, and in words of ours: torch only asserts."""
    try:
        wanted = torch.device(device if device is not None else "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none that torch knows; say cpu, cuda, cuda:1, ...") from error
    num_devices = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= num_devices:
        raise ValueError(f"device={str(device)!r} but torch sees {num_devices} CUDA devices; use cpu or another one")
