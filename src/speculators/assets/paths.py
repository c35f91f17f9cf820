"""Finds the embedded verifier and its prompts, with which every command runs on a machine without a network.

`scripts/build_tiny_verifier.py` made them; the README.md of the model folder says how, and how good the model is.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal


def tiny_verifier_path() -> Path:
    """Returns the folder of the embedded verifier, for `from_pretrained` of transformers and for `vllm serve`."""
    return Path(str(files("speculators.assets") / "tiny_verifier"))


def prompts_path(split: Literal["train", "heldout"] = "train") -> Path:
    """Returns a JSONL file of conversations about objects that the verifier was trained on, or has never seen.

    Raises `ValueError` for another split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is not a set of embedded prompts; the sets are 'train' and 'heldout'")
    return Path(str(files("speculators.assets") / "prompts" / f"{split}.jsonl"))
