"""DSpark: DFlash with a Markov head that ties neighbouring drafts together and a head that estimates acceptance."""

from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.models.dspark.core import DSparkDraftModel

__all__ = ["DSparkDraftModel", "DSparkSpeculatorConfig"]
