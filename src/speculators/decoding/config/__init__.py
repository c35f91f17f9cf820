"""Configures drafting: `SpeculativeConfig`, the same JSON as vLLM's `--speculative-config`, and what it infers from."""

from speculators.decoding.config.draft import ModelInfo, ParallelInfo
from speculators.decoding.config.mtp_families import hf_config_override
from speculators.decoding.config.speculative import SpeculativeConfig

__all__ = ["ModelInfo", "ParallelInfo", "SpeculativeConfig", "hf_config_override"]
