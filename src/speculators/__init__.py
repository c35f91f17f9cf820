"""Speculators: train, decode and serve speculative-decoding drafters with one forward.

Names load on first use: `import speculators` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from speculators import compat as compat  # serves the module paths of earlier releases

if TYPE_CHECKING:
    from speculators.api import evaluate, regenerate, train_drafter, verify
    from speculators.building.run import build
    from speculators.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig, reload_schemas
    from speculators.convert.entrypoints import convert_model
    from speculators.data_generation.prepare import prepare_data
    from speculators.decoding.config import SpeculativeConfig
    from speculators.decoding.engine import Engine
    from speculators.decoding.settings import SamplingParams
    from speculators.deploy.check import check_checkpoint as check
    from speculators.deploy.export import export_checkpoint as export
    from speculators.diagnosis import diagnose
    from speculators.model import SpeculatorModel
    from speculators.proposals import TokenProposalConfig
    from speculators.train.config import TrainConfig
    from speculators.verifier import load_verifier

__all__ = [
    "Engine",
    "SamplingParams",
    "SpeculativeConfig",
    "SpeculatorModel",
    "SpeculatorModelConfig",
    "SpeculatorsConfig",
    "TokenProposalConfig",
    "TrainConfig",
    "VerifierConfig",
    "build",
    "check",
    "convert_model",
    "diagnose",
    "evaluate",
    "export",
    "load_verifier",
    "prepare_data",
    "regenerate",
    "reload_schemas",
    "train_drafter",
    "verify",
]

HOME = {
    "SpeculatorModel": "speculators.model:SpeculatorModel",
    "SpeculatorModelConfig": "speculators.config:SpeculatorModelConfig",
    "SpeculatorsConfig": "speculators.config:SpeculatorsConfig",
    "VerifierConfig": "speculators.config:VerifierConfig",
    "reload_schemas": "speculators.config:reload_schemas",
    "TokenProposalConfig": "speculators.proposals:TokenProposalConfig",
    "load_verifier": "speculators.verifier:load_verifier",
    "regenerate": "speculators.api:regenerate",
    "prepare_data": "speculators.data_generation.prepare:prepare_data",
    "TrainConfig": "speculators.train.config:TrainConfig",
    "train_drafter": "speculators.api:train_drafter",
    "Engine": "speculators.decoding.engine:Engine",
    "SamplingParams": "speculators.decoding.sampling:SamplingParams",
    "SpeculativeConfig": "speculators.decoding.config:SpeculativeConfig",
    "build": "speculators.building.run:build",
    "evaluate": "speculators.api:evaluate",
    "verify": "speculators.api:verify",
    "check": "speculators.deploy.check:check_checkpoint",
    "diagnose": "speculators.diagnosis:diagnose",
    "export": "speculators.deploy.export:export_checkpoint",
    "convert_model": "speculators.convert.entrypoints:convert_model",
}
"""Name -> where it is defined."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("speculators.config").installed_version()
    if name in HOME:
        module, attribute = HOME[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    # <Algorithm>DraftModel, <Algorithm>SpeculatorConfig, ... of the algorithm folders
    if name.endswith(("Model", "Config", "Speculator")) and not name.startswith("_"):
        models = importlib.import_module("speculators.models")
        if name in dir(models):
            return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
