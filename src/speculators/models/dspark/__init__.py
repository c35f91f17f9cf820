"""DSpark: DFlash with a Markov head that ties neighbouring drafts together and a head that knows when to stop."""

from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.models.dspark.core import DSparkDraftModel

__all__ = ["DSparkDraftModel", "DSparkSpeculatorConfig"]
