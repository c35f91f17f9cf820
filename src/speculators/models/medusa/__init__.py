"""Medusa: heads beside the verifier's own, each guessing one token further ahead from the same state."""

from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.models.medusa.core import MedusaDraftModel

__all__ = ["MedusaDraftModel", "MedusaSpeculatorConfig"]
