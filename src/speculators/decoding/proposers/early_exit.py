"""Self-drafting: the verifier's own first layers, then its final norm and head. A baseline without training."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from speculators.verifier import verifier_parts


def first_layers(model: Any, num_layers: int) -> Any:
    """A causal LM of the first layers of `model`. It shares every module and weight; nothing is copied."""
    parts = verifier_parts(model)
    total = len(parts.layers)
    if not 1 <= num_layers < total:
        raise ValueError(f"early_exit_layer={num_layers} must be in 1..{total - 1}: the verifier has {total} layers")
    config = copy.deepcopy(parts.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    return _with_replaced(model, parts.layers, nn.ModuleList(list(parts.layers)[:num_layers]), parts.config, config)


def _with_replaced(module: Any, layers: nn.Module, kept: nn.Module, config: Any, shorter: Any) -> Any:
    """A shallow copy of the modules on the way to `layers`; everything beside that way is shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    if getattr(module, "config", None) is config:
        twin.config = shorter
    for name, child in module.named_children():
        if child is layers:
            twin._modules[name] = kept
        elif any(inner is layers for inner in child.modules()):
            twin._modules[name] = _with_replaced(child, layers, kept, config, shorter)
    return twin
