"""The DFlash converter of earlier releases."""

from __future__ import annotations

from speculators.convert.entrypoints import Converter


class DFlashConverter(Converter):
    algorithm = "dflash"
    options = {"aux_hidden_state_layer_ids": None}
