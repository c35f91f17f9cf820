"""The DSpark network: DFlash's and two heads."""

from __future__ import annotations

from dataclasses import dataclass

from speculators.models.dflash.network import DFlashNetwork
from speculators.models.dspark.heads import ConfidenceHead, MarkovHead


@dataclass(frozen=True)
class DSparkNetwork(DFlashNetwork):
    markov_head: MarkovHead | None
    """Ties neighbouring drafts together."""
    confidence_head: ConfidenceHead | None
    """Estimates whether a draft will be accepted."""
