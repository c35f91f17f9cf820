"""An MTP layer under the names of its verifier's family, and back. What differs is in the table of `families`.

Shapes: E experts, I their width, H hidden size.

    ours      mlp.experts.gate_up_proj [E, 2 I, H] (gate rows first), mlp.experts.down_proj [E, H, I]
    native    the same, or mlp.experts.{e}.{gate,up,down}_proj.weight one by one
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from speculators.models.mtp.families import LAYER, MTPFamily
from speculators.utils.loading import list_checkpoint_keys, load_model_layers

EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
INPUT = "input_proj.weight"


def native_keys(keys: Iterable[str], family: MTPFamily, config: Any) -> list[str]:
    """Those of a verifier's keys that belong to its MTP layer (copies of embedding and head left out)."""
    if family.prefix is None:
        return []
    prefix = family.native_prefix(config)
    return [key for key in keys if key.startswith(prefix) and key.removeprefix(prefix) not in family.copies]


def read_native(verifier: str, family: MTPFamily, config: Any) -> dict[str, Tensor]:
    """Our tensors of the MTP layer that ships with a verifier; empty when none does."""
    keys = native_keys(list_checkpoint_keys(verifier), family, config)
    return import_native(load_model_layers(keys, verifier), family, config) if keys else {}


def import_native(native: Mapping[str, Tensor], family: MTPFamily, config: Any) -> dict[str, Tensor]:
    """Native tensors under our names."""
    prefix = family.native_prefix(config)
    ours = {}
    for key, tensor in native.items():
        name = key.removeprefix(prefix)
        if name in family.copies:
            continue
        ours[family.renamed.get(name) or name.removeprefix(family.decoder)] = tensor
    ours = fused(ours)
    if family.hidden_first and INPUT in ours:
        ours[INPUT] = halves_swapped(ours[INPUT])
    return {LAYER + name: tensor for name, tensor in ours.items()}


def export_native(
    ours: Mapping[str, Tensor], family: MTPFamily, config: Any, *, fused_experts: bool = False
) -> dict[str, Tensor]:
    """Our tensors under the family's names. `fused_experts`: leave the experts in one tensor."""
    prefix = family.native_prefix(config)
    native_name = {own: name for name, own in family.renamed.items()}
    tensors = {key.removeprefix(LAYER): tensor for key, tensor in ours.items()}
    if family.hidden_first and INPUT in tensors:
        tensors[INPUT] = halves_swapped(tensors[INPUT])
    if not fused_experts:
        tensors = split(tensors)
    return {prefix + (native_name.get(name) or family.decoder + name): tensor for name, tensor in tensors.items()}


def halves_swapped(weight_H2H: Tensor) -> Tensor:
    first, second = weight_H2H.chunk(2, dim=1)
    return torch.cat((second, first), dim=1)


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts stored one by one, in one tensor a projection."""
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


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one."""
    out = {name: tensor for name, tensor in tensors.items() if name not in (GATE_UP, DOWN)}
    if GATE_UP not in tensors:
        return out
    for e, (gate_up, down) in enumerate(zip(tensors[GATE_UP], tensors[DOWN], strict=True)):
        gate, up = gate_up.chunk(2)
        for kind, tensor in (("gate", gate), ("up", up), ("down", down)):
            out[f"mlp.experts.{e}.{kind}_proj.weight"] = tensor.contiguous()
    return out
