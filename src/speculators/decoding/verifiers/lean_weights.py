"""Reads Llama-shaped decoders out of transformers' modules: checks which models qualify and prepares their weights.

Shapes: N query heads, G key/value heads, d head size, H hidden size.

A layer qualifies by its parts, not by its name: two RMS norms; q, k, v, o projections (or qkv in one) with or without
biases and per-head q/k norms; gate, up, down (or gate_up in one). Anything else that holds a parameter disqualifies the
model. `hf_verifier` then proves on a few tokens that the lean forward computes the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.nn.norms import rms_norm
from speculators.nn.prepacked_linear import (
    MAX_PREPACKED_BYTES,
    Apply,
    apply_linear,
    can_prepack,
    is_installed,
    joined,
    version_of,
)
from speculators.verifier import VerifierParts

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on the position alone; the others also depend on how long the sequence has become."""
INERT_HOOKS = "transformers.utils.output_capturing"
"""Module of the hooks that transformers leaves on a model after returning hidden states; they do nothing otherwise."""
NORMS = ("input_layernorm", "post_attention_layernorm")


Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(any tensor of the right dtype, positions [1, P]) -> cos and sin [1, P, r]."""


class NotLlamaShaped(Exception):
    """Says why a model runs by its own forward."""


class LeanLayer(NamedTuple):
    """One decoder layer, as functions of rows [B, T, ...]."""

    norm_input: Apply
    qkv: Apply
    norm_heads: Apply | None
    """In place, on the query and key heads [B, T, N + G, d]."""
    output: Apply
    norm_mlp: Apply
    gate_up: Apply
    down: Apply


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float


class LeanWeights:
    """The weights of a model as functions for the lean forward. `refresh` follows later changes of the weights."""

    def __init__(self, model: PreTrainedModel, parts: VerifierParts):
        self.embedding = plain(model.get_input_embeddings(), nn.Embedding)
        self.head_module = plain(parts.head, nn.Linear)
        self.layer_modules = list(parts.layers)
        for layer in self.layer_modules:
            refuse_other_parts(layer)
        self.final_norm_module = parts.final_norm
        self.rotary = rotary_of(model)
        self.act = activation_of(self.layer_modules[0])
        self.shape = same_for_all([shape_of(layer.self_attn) for layer in self.layer_modules], "attention shapes")
        modules = [self.embedding, self.head_module, self.final_norm_module, *self.layer_modules]
        inner = [m for module in modules for m in module.modules()]
        outer = list(dict.fromkeys([model, model.get_decoder(), parts.layers]))
        self._inner, self._watched = inner, [*outer, *inner]
        self._children = [tuple(module._modules.values()) for module in self._watched]
        self.refuse_changes()
        self._places = [(m._parameters, name) for m in inner for name, p in m._parameters.items() if p is not None]
        refuse_mixed(self._sources())
        self._read_at: Any = None
        self.refresh()

    def refuse_changes(self) -> None:
        """Raise NotLlamaShaped for hooks and replaced modules: the lean forward would skip them."""
        refuse_hooks(self._watched)
        refuse_own_forward(self._inner)
        for module, children in zip(self._watched, self._children, strict=True):
            if tuple(module._modules.values()) != children:
                raise NotLlamaShaped(f"parts of a {type(module).__name__} were replaced after it was read")

    def refresh(self) -> None:
        """Read the weights again if they have changed."""
        now = version_of(self._sources())
        if now == self._read_at:
            return
        self._bytes_left = MAX_PREPACKED_BYTES
        self.layers = [self._layer(layer) for layer in self.layer_modules]
        self.final_norm = norm_of(self.final_norm_module)
        self.head = self._linear(self.head_module)
        self._read_at = version_of(self._sources())  # joining has moved them

    def _sources(self) -> list[Any]:
        # looked up each time: loading a state dict may put other parameters in their places
        return [parameters[name] for parameters, name in self._places]

    def _layer(self, layer: Any) -> LeanLayer:
        attention, mlp = layer.self_attn, layer.mlp
        return LeanLayer(
            norm_of(layer.input_layernorm),
            self._linear(*parts_of(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")),
            heads_norm_of(attention, self.shape),
            self._linear(attention.o_proj),
            norm_of(layer.post_attention_layernorm),
            self._linear(*parts_of(mlp, ("gate_proj", "up_proj"), "gate_up_proj")),
            self._linear(mlp.down_proj),
        )

    def _linear(self, *linears: nn.Linear) -> Apply:
        weight = joined([linear.weight for linear in linears])
        bias = joined([linear.bias for linear in linears]) if linears[0].bias is not None else None
        self._bytes_left -= weight.numel() * weight.element_size()
        return apply_linear(weight, bias, prepack=can_prepack(weight) and self._bytes_left >= 0)


# -- parts of a layer


def plain(module: Any, kind: type[nn.Module]) -> Any:
    """The module, if it is exactly of that class (subclasses, quantised or adapted, compute something else)."""
    if module is None:
        raise NotLlamaShaped(f"no {kind.__name__} where Llama has one")
    if type(module) is not kind:
        raise NotLlamaShaped(f"a {type(module).__name__} where a {kind.__name__} was expected")
    return module


def parts_of(module: Any, separate: tuple[str, ...], together: str) -> list[nn.Linear]:
    if isinstance(getattr(module, together, None), nn.Module):
        return [plain(getattr(module, together), nn.Linear)]
    found = [plain(getattr(module, name, None), nn.Linear) for name in separate]
    if len({linear.bias is None for linear in found}) > 1:
        raise NotLlamaShaped(f"some of {separate} have a bias and some have none")
    return found


def refuse_other_parts(layer: Any) -> None:
    """Raise NotLlamaShaped for a layer with a parameter that `LeanWeights` does not read."""
    for name in (*NORMS, "self_attn", "mlp"):
        if not isinstance(getattr(layer, name, None), nn.Module):
            raise NotLlamaShaped(f"{type(layer).__name__} has no {name}")
    attention, mlp = layer.self_attn, layer.mlp
    read: list[nn.Module] = [layer.input_layernorm, layer.post_attention_layernorm]
    read += parts_of(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    read += parts_of(mlp, ("gate_proj", "up_proj"), "gate_up_proj")
    read += [plain(getattr(m, name, None), nn.Linear) for m, name in ((attention, "o_proj"), (mlp, "down_proj"))]
    read += [m for m in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if m is not None]
    known = {id(parameter) for module in read for parameter in module.parameters()}
    other = [name for name, parameter in layer.named_parameters() if id(parameter) not in known]
    if other:
        raise NotLlamaShaped(f"{type(layer).__name__} has other parts: {', '.join(other[:4])}")


def refuse_hooks(modules: list[Any]) -> None:
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(getattr(hook, "__module__", None) != INERT_HOOKS for hook in hooks):
                raise NotLlamaShaped(f"a {type(module).__name__} has hooks, which would not run")


def refuse_own_forward(modules: list[Any]) -> None:
    for module in modules:
        if "forward" in vars(module) and not is_installed(module):
            raise NotLlamaShaped(f"a {type(module).__name__} has a forward of its own, which would not run")


def refuse_mixed(parameters: list[nn.Parameter]) -> None:
    kinds = {(type(p).__name__, str(p.device), str(p.dtype)) for p in parameters}
    if len(kinds) > 1 or not parameters[0].is_floating_point() or type(parameters[0]) is not nn.Parameter:
        raise NotLlamaShaped(f"weights of {len(kinds)} kinds: {sorted(kinds)[:3]}")


def shape_of(attention: Any) -> Shape:
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        raise NotLlamaShaped("attention scores are capped")
    d: int = getattr(attention, "head_dim", 0)
    qkv = parts_of(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    if not isinstance(d, int) or d < 2:
        raise NotLlamaShaped(f"{type(attention).__name__} has no head_dim")
    num_heads = attention.o_proj.in_features // d
    num_kv_heads = (sum(linear.out_features for linear in qkv) // d - num_heads) // 2
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise NotLlamaShaped(f"{num_heads} query heads on {num_kv_heads} key heads")
    return Shape(num_heads, num_kv_heads, d, getattr(attention, "scaling", None) or d**-0.5)


def same_for_all(found: list[Shape], what: str) -> Shape:
    if len(set(found)) != 1:
        raise NotLlamaShaped(f"layers differ in their {what}")
    return found[0]


def rotary_of(model: PreTrainedModel) -> Rotary:
    rotary: Any = getattr(model.get_decoder(), "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise NotLlamaShaped("no rotary embedding shared by the layers")
    rope_type = getattr(rotary, "rope_type", "default")
    if rope_type not in FIXED_ROPE_TYPES:
        raise NotLlamaShaped(f"rope_type {rope_type!r}: its rotation depends on the length of the sequence")
    return rotary


def activation_of(layer: Any) -> Apply:
    for name in ("act_fn", "activation_fn"):
        activation = getattr(layer.mlp, name, None)
        if activation is not None:
            # transformers wraps it in a module
            return F.silu if type(activation).__name__ in ("SiLUActivation", "SiLU") else activation
    raise NotLlamaShaped(f"{type(layer.mlp).__name__} has no activation under a known name")


# -- norms


def norm_of(module: Any) -> Apply:
    """w x / sqrt(mean(x^2) + eps) over the last axis."""
    eps = eps_of(module)  # first: it refuses a norm without a weight
    return rms_norm(module.weight.detach(), eps)


def heads_norm_of(attention: Any, shape: Shape) -> Apply | None:
    """The norms of q and k, in place on their heads side by side."""
    norms: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if all(norm is None for norm in norms):
        return None
    if any(norm is None or next(iter(norm.parameters())).shape != (shape.head_dim,) for norm in norms):
        raise NotLlamaShaped("q_norm and k_norm are not norms of single heads")
    if eps_of(norms[0]) != eps_of(norms[1]):
        raise NotLlamaShaped("q_norm and k_norm differ in their eps")
    counts = (shape.num_heads, shape.num_kv_heads)
    weight_Nd = torch.cat([n.weight.detach().expand(c, -1) for n, c in zip(norms, counts, strict=True)])
    normalise = rms_norm(weight_Nd, eps_of(norms[0]))
    return lambda heads: heads.copy_(normalise(heads))


def eps_of(norm: Any) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float) and isinstance(getattr(norm, "weight", None), nn.Parameter):
            return getattr(norm, name)
    raise NotLlamaShaped(f"{type(norm).__name__} is no RMS norm with a weight and an eps")
