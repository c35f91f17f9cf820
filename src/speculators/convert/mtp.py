"""Public path of earlier releases: the MTP converter and its tables of tensor names."""

from __future__ import annotations

from speculators.convert.utils import Converter

MTP_EXACT_REMAP = {
    "mtp.fc.weight": "mtp_layers.0.input_proj.weight",
    "mtp.norm.weight": "mtp_layers.0.final_layernorm.weight",
}
MTP_PREFIX_REMAP = {
    "mtp.pre_fc_norm_hidden.": "mtp_layers.0.hidden_layernorm.",
    "mtp.pre_fc_norm_embedding.": "mtp_layers.0.token_layernorm.",
    "mtp.layers.0.": "mtp_layers.0.",
}


class MTPConverter(Converter):
    """Converts the MTP layer of a verifier's own checkpoint."""

    algorithm = "mtp"
    options = {"num_speculative_steps": 3}
