"""P-EAGLE: EAGLE-3's layers drafting all tokens in one forward, from masked slots."""

from speculators.models.peagle.config import PEagleSpeculatorConfig
from speculators.models.peagle.core import PEagleDraftModel

__all__ = ["PEagleDraftModel", "PEagleSpeculatorConfig"]
