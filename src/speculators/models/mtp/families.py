"""Verifier families and their MTP layers, as data: how an engine runs the layer, and how the family names its tensors.

Ours is one graph for all: input_proj reads [embedding ; hidden]. `hidden_first` families store the two halves of
input_proj the other way round; they are swapped on import and back on export (see `native`).

    family        serves (vLLM 0.32)        concat        reads           fed back           embedding at position 0
    qwen          qwen3_next, qwen3_5       emb ; hidden  normed state    normed             kept
    deepseek_v3   deepseek_v3, _v32         emb ; hidden  normed state    normed             zeroed
    glm4_moe      glm4_moe                  emb ; hidden  normed state    before the norm    zeroed
    mimo          MiMoForCausalLM           hidden ; emb  before norm     normed             zeroed
    plain         none: no engine has one   emb ; hidden  normed state    normed             kept
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYER = "mtp_layers.0."
"""Prefix of our tensors. The layer's own modules and those of its decoder layer lie side by side under it."""


@dataclass(frozen=True)
class MTPFamily:
    """One row of the table."""

    name: str
    model_types: tuple[str, ...]
    """Of the verifier's text config."""
    prefix: str | None = None
    """Of the native tensors; {n} = the verifier's number of layers. None: the family has no MTP layer."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Native name (after the prefix) -> our name (after `LAYER`)."""
    decoder: str = ""
    """What native names put between the prefix and the decoder layer's own names."""
    copies: tuple[str, ...] = ()
    """Native tensors that repeat the verifier's embedding and head: neither imported nor rewritten."""
    hidden_first: bool = False
    reads_raw_states: bool = False
    """The verifier's last state comes before its final norm: vLLM's MiMoModel applies the norm with the head only."""
    feeds_back_raw: bool = False
    """The next step reads the state before the final norm."""
    zeroes_first_embedding: bool = False
    """The embedding of the entry at position 0 counts as zero."""

    def native_prefix(self, config: Any) -> str:
        if self.prefix is None:
            native = sorted(name for row in FAMILIES if row.prefix for name in row.model_types)
            raise ValueError(
                f"verifiers of model_type={config.model_type!r} have no MTP layer of their own, and no engine serves "
                f"one; families that have: {native}"
            )
        return self.prefix.format(n=config.num_hidden_layers)


SHARED_HEAD = {
    "enorm.weight": "token_layernorm.weight",
    "hnorm.weight": "hidden_layernorm.weight",
    "eh_proj.weight": "input_proj.weight",
    "shared_head.norm.weight": "final_layernorm.weight",
}
SHARED_HEAD_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
OWN_NAMES = ("token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight", "final_layernorm.weight")

FAMILIES = (
    MTPFamily(
        "qwen",
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        prefix="mtp.",
        renamed={
            "pre_fc_norm_embedding.weight": "token_layernorm.weight",
            "pre_fc_norm_hidden.weight": "hidden_layernorm.weight",
            "fc.weight": "input_proj.weight",
            "norm.weight": "final_layernorm.weight",
        },
        decoder="layers.0.",
    ),
    MTPFamily(
        "deepseek_v3",
        ("deepseek_v3", "deepseek_v32"),
        prefix="model.layers.{n}.",
        renamed=SHARED_HEAD,
        copies=SHARED_HEAD_COPIES,
        zeroes_first_embedding=True,
    ),
    MTPFamily(
        "glm4_moe",
        ("glm4_moe",),
        prefix="model.layers.{n}.",
        renamed=SHARED_HEAD,
        copies=SHARED_HEAD_COPIES,
        feeds_back_raw=True,
        zeroes_first_embedding=True,
    ),
    # MiMo is Qwen2 with MTP layers; its checkpoints say model_type mimo, or qwen2 with architecture MiMoForCausalLM
    MTPFamily(
        "mimo",
        ("mimo", "qwen2"),
        prefix="model.mtp_layers.0.",
        renamed={name: name for name in OWN_NAMES},
        hidden_first=True,
        reads_raw_states=True,
        zeroes_first_embedding=True,
    ),
    MTPFamily("plain", ("llama", "qwen3")),
)


def family_of(config: Any) -> MTPFamily:
    """The family of a verifier's text config."""
    for row in FAMILIES:
        if config.model_type in row.model_types:
            return row
    known = sorted(name for row in FAMILIES for name in row.model_types)
    raise ValueError(f"model_type={config.model_type!r} has no MTP family here; known: {known}")
