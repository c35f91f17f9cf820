"""Speculators: train, decode and serve speculative-decoding drafters with one forward.

Names load on first use: `import speculators` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculators.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig, reload_schemas
    from speculators.decoding.config import SpeculativeConfig
    from speculators.decoding.engine import Engine
    from speculators.decoding.sampling import SamplingParams
    from speculators.model import SpeculatorModel
    from speculators.proposals import TokenProposalConfig
    from speculators.verifier import load_verifier

__all__ = [
    "Engine",
    "SamplingParams",
    "SpeculativeConfig",
    "SpeculatorModel",
    "SpeculatorModelConfig",
    "SpeculatorsConfig",
    "TokenProposalConfig",
    "VerifierConfig",
    "load_verifier",
    "reload_schemas",
]

_HOME = {
    "Engine": "speculators.decoding.engine",
    "SamplingParams": "speculators.decoding.sampling",
    "SpeculativeConfig": "speculators.decoding.config",
    "load_verifier": "speculators.verifier",
    "SpeculatorModel": "speculators.model",
    "SpeculatorModelConfig": "speculators.config",
    "SpeculatorsConfig": "speculators.config",
    "VerifierConfig": "speculators.config",
    "reload_schemas": "speculators.config",
    "TokenProposalConfig": "speculators.proposals",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("speculators.config").installed_version()
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    # <Algorithm>DraftModel, <Algorithm>SpeculatorConfig, ... of the algorithm folders
    if name.endswith(("Model", "Config", "Speculator")) and not name.startswith("_"):
        models = importlib.import_module("speculators.models")
        if name in dir(models):
            return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
