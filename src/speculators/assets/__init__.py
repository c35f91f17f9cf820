"""Finds the embedded verifier and its prompts, with which every command runs on a machine without a network.

`scripts/build_tiny_verifier.py` made them; the README.md of the model folder says how, and how good the model is.
"""

from speculators.assets.paths import prompts_path, tiny_verifier_path

__all__ = ["prompts_path", "tiny_verifier_path"]
