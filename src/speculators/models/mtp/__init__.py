"""MTP: one more layer of the verifier's own shape, run once for each drafted token on the verifier's last state."""

from speculators.models.mtp.config import MTPSpeculatorConfig
from speculators.models.mtp.core import MTPDraftModel
from speculators.models.mtp.training import compute_step_weights, shift_batch_mtp

__all__ = ["MTPDraftModel", "MTPSpeculatorConfig", "compute_step_weights", "shift_batch_mtp"]
