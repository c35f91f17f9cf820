"""The embedded verifier and its prompts: what lets every command run on a machine without a network.

Made by `scripts/build_tiny_verifier.py`; how, and how good it is, stands in the model folder's README.md.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

__all__ = ["prompts_path", "tiny_verifier_path"]


def tiny_verifier_path() -> Path:
    """Folder of the embedded verifier, for `from_pretrained` of transformers and for `vllm serve`."""
    return Path(str(files(__name__) / "tiny_verifier"))


def prompts_path(split: Literal["train", "heldout"] = "train") -> Path:
    """JSONL file of conversations about objects the verifier was trained on, or was never shown."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is no set of embedded prompts; there are 'train' and 'heldout'")
    return Path(str(files(__name__) / "prompts" / f"{split}.jsonl"))
