"""EAGLE-3: a drafter of one or few layers that reads the verifier's states and is trained on its own output.

Names load lazily: `train --help` reads its keys, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from speculators.utils.names import lazy_attributes

if TYPE_CHECKING:
    from speculators.models.eagle3.config import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.models.eagle3.training import shift_batch

__all__ = ["Eagle3DraftModel", "Eagle3SpeculatorConfig", "shift_batch"]

__getattr__, __dir__ = lazy_attributes(
    __name__, {"Eagle3DraftModel": "core", "Eagle3SpeculatorConfig": "config", "shift_batch": "training"}
)
