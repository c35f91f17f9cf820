"""EAGLE-1 and 2, HASS: a drafter of one layer that predicts the verifier's next feature."""

from speculators.models.eagle.config import EagleSpeculatorConfig
from speculators.models.eagle.core import EagleSpeculator

__all__ = ["EagleSpeculator", "EagleSpeculatorConfig"]
