"""Verifier families and their MTP layers: how an engine runs the layer, how the family names its tensors, and both ways
of renaming.

Ours is one graph for all: input_proj reads [embedding ; hidden]. `hidden_first` families store the two halves of
input_proj the other way round; import swaps them, export swaps them back.

    family        serves (vLLM 0.32)        concat        reads           fed back           embedding at position 0
    qwen          qwen3_next, qwen3_5       emb ; hidden  normed state    normed             kept
    deepseek_v3   deepseek_v3, _v32         emb ; hidden  normed state    normed             zeroed
    glm4_moe      glm4_moe                  emb ; hidden  normed state    before the norm    zeroed
    mimo          MiMoForCausalLM           hidden ; emb  before norm     normed             zeroed
    plain         none: no engine has one   emb ; hidden  normed state    normed             kept

Shapes: E experts, I their width, H hidden size.

    ours          mlp.experts.gate_up_proj [E, 2 I, H] (gate rows first), mlp.experts.down_proj [E, H, I]
    native        the same, or mlp.experts.{e}.{gate,up,down}_proj.weight one by one
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from speculators.checkpoint.tensors import stored_tensors
from speculators.utils.loading import list_checkpoint_keys

LAYER = "mtp_layers.0."
"""Prefix of our tensors. The layer's own modules and its decoder layer's stand side by side under it."""
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
INPUT = "input_proj.weight"


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
    """Part of native names between the prefix and the decoder layer's own names."""
    copies: tuple[str, ...] = ()
    """Native tensors that repeat the verifier's embedding and head: neither imported nor rewritten."""
    hidden_first: bool = False
    reads_raw_states: bool = False
    """The verifier's last state comes before its final norm: vLLM's MiMoModel applies the norm with the head only."""
    feeds_back_raw: bool = False
    """The next step reads the state before the final norm."""
    zeroes_first_embedding: bool = False
    """The embedding at position 0 is zero."""

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
    """Returns the family of a verifier's text config. Raises `ValueError` for a model type without one."""
    for row in FAMILIES:
        if config.model_type in row.model_types:
            return row
    known = sorted(name for row in FAMILIES for name in row.model_types)
    raise ValueError(f"model_type={config.model_type!r} has no MTP family here; known: {known}")


def native_keys(keys: Iterable[str], family: MTPFamily, config: Any) -> list[str]:
    """Selects the verifier's keys that belong to its MTP layer, without copies of embedding and head."""
    if family.prefix is None:
        return []
    prefix = family.native_prefix(config)
    return [key for key in keys if key.startswith(prefix) and key.removeprefix(prefix) not in family.copies]


def read_native(verifier: str, family: MTPFamily, config: Any) -> dict[str, Tensor]:
    """Loads the MTP layer that ships with a verifier, under our names; empty when none does."""
    keys = native_keys(list_checkpoint_keys(verifier), family, config)
    return import_native(stored_tensors(verifier, keys), family, config) if keys else {}


def import_native(native: Mapping[str, Tensor], family: MTPFamily, config: Any) -> dict[str, Tensor]:
    """Renames native tensors to ours."""
    prefix = family.native_prefix(config)
    ours = {}
    for key, tensor in native.items():
        name = key.removeprefix(prefix)
        if name in family.copies:
            continue
        ours[family.renamed.get(name) or name.removeprefix(family.decoder)] = tensor
    ours = stack_experts(ours)
    if family.hidden_first and INPUT in ours:
        ours[INPUT] = swap_halves(ours[INPUT])
    return {LAYER + name: tensor for name, tensor in ours.items()}


def export_native(
    ours: Mapping[str, Tensor], family: MTPFamily, config: Any, *, fused_experts: bool = False
) -> dict[str, Tensor]:
    """Renames our tensors to the family's. `fused_experts`: leaves the experts in one tensor."""
    prefix = family.native_prefix(config)
    native_name = {own: name for name, own in family.renamed.items()}
    tensors = {key.removeprefix(LAYER): tensor for key, tensor in ours.items()}
    if family.hidden_first and INPUT in tensors:
        tensors[INPUT] = swap_halves(tensors[INPUT])
    if not fused_experts:
        tensors = split_experts(tensors)
    return {prefix + (native_name.get(name) or family.decoder + name): tensor for name, tensor in tensors.items()}


def swap_halves(weight_H2H: Tensor) -> Tensor:
    first, second = weight_H2H.chunk(2, dim=1)
    return torch.cat((second, first), dim=1)


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks experts that are stored one by one into one tensor per projection."""
    experts: dict[str, dict[int, Tensor]] = {"gate": {}, "up": {}, "down": {}}
    rest = {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            rest[name] = tensor
        else:
            experts[match[2]][int(match[1])] = tensor
    count = max((len(of_kind) for of_kind in experts.values()), default=0)
    if count == 0:
        return rest
    for kind, of_kind in experts.items():
        if sorted(of_kind) != list(range(count)):
            raise ValueError(
                f"the MTP layer has {kind}_proj of experts {sorted(of_kind)}; each of 0..{count - 1} is needed: the "
                "checkpoint is incomplete"
            )
    gate_up = [torch.cat((experts["gate"][e], experts["up"][e])) for e in range(count)]
    return {**rest, GATE_UP: torch.stack(gate_up), DOWN: torch.stack([experts["down"][e] for e in range(count)])}


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits the stacked experts into one tensor each."""
    out = {name: tensor for name, tensor in tensors.items() if name not in (GATE_UP, DOWN)}
    if GATE_UP not in tensors:
        return out
    for e, (gate_up, down) in enumerate(zip(tensors[GATE_UP].unbind(), tensors[DOWN].unbind(), strict=True)):
        gate, up = gate_up.chunk(2)
        for kind, tensor in (("gate", gate), ("up", up), ("down", down)):
            out[f"mlp.experts.{e}.{kind}_proj.weight"] = tensor.contiguous()
    return out
