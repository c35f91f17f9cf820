"""DFlash: a drafter that fills a whole block of masked slots in one forward."""

from speculators.models.dflash.config import DFlashSpeculatorConfig
from speculators.models.dflash.core import DFlashDraftModel

__all__ = ["DFlashDraftModel", "DFlashSpeculatorConfig"]
