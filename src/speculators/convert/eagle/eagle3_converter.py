"""`Eagle3Converter`: heads of the EAGLE repository and SpecForge."""

from __future__ import annotations

from speculators.convert.converter import Converter


class Eagle3Converter(Converter):
    algorithm = "eagle3"
    options = {
        "norm_before_residual": None,
        "norm_before_fc": None,
        "fc_norm": None,
        "norm_output": None,
        "eagle_aux_hidden_state_layer_ids": None,
    }
