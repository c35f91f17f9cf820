"""Configures drafting: `SpeculativeConfig`, the same JSON as vLLM's `--speculative-config`, and what it infers from."""

from speculators.utils.names import lazy_attributes

_HOME = {
    "ModelInfo": "draft",
    "ParallelInfo": "draft",
    "SpeculativeConfig": "speculative",
    "hf_config_override": "mtp_families",
}
__all__ = ["ModelInfo", "ParallelInfo", "SpeculativeConfig", "hf_config_override"]
# Importing on first use: the command line reads the methods' names without importing torch.
__getattr__, __dir__ = lazy_attributes(__name__, _HOME)
