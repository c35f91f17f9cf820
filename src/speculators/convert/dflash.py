"""Public path of earlier releases: the DFlash converter."""

from __future__ import annotations

from speculators.convert.utils import Converter


class DFlashConverter(Converter):
    """Converts DFlash checkpoints of other projects."""

    algorithm = "dflash"
    options = {"aux_hidden_state_layer_ids": None}
