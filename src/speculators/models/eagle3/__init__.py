"""EAGLE-3: a drafter of one or few layers that reads the verifier's states and is trained on its own output."""

from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.eagle3.training import shift_batch

__all__ = ["Eagle3DraftModel", "Eagle3SpeculatorConfig", "shift_batch"]
