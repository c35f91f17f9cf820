"""MLP speculator: a small recurrent network on the verifier's last state and the tokens chosen since."""

from speculators.models.mlp.config import MLPSpeculatorConfig
from speculators.models.mlp.core import MLPSpeculator

__all__ = ["MLPSpeculator", "MLPSpeculatorConfig"]
