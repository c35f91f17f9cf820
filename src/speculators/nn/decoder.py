"""Pre-norm decoder layers of Llama and Qwen3 shape, and the first layer of an EAGLE drafter.

Shapes: B rows, T positions in, R query positions (see `AttentionFunction.select_queries`), H hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speculators.nn.attention import Attention, AttentionFunction, FusedAttention, concatenated
from speculators.nn.norms import RMSNorm, cast_once, recomputed
from speculators.nn.rope import RopeTables

ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activation(name: str):
    if name not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act={name!r} is not one of {sorted(ACTIVATIONS)}; set --draft-hidden-act to one of them"
        )
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    recomputes = False
    """Whether training keeps the input alone, and computes the rest a second time in the backward pass."""

    def __init__(self, config: Any):
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act = activation(config.hidden_act)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.product, hidden_BTH, use_reentrant=False, preserve_rng_state=False)
        for_gate, for_up = cast_once(hidden_BTH, 2)
        return recomputed(self.down, self.gate_proj(for_gate), self.up_proj(for_up))

    def product(self, hidden_BTH: Tensor) -> Tensor:
        return self.down(self.gate_proj(hidden_BTH), self.up_proj(hidden_BTH))

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self.act(gate) * up)

    def fused(self) -> FusedMLP:
        return FusedMLP(self)


def recompute_mlps(model: nn.Module) -> bool:
    """Makes all feed-forward parts of a model recompute (`MLP.recomputes`). Returns whether it has any."""
    mlps = [module for module in model.modules() if isinstance(module, MLP)]
    for mlp in mlps:
        mlp.recomputes = True
    return bool(mlps)


def recomputes_mlps(model: nn.Module) -> bool:
    return any(isinstance(module, MLP) and module.recomputes for module in model.modules())


class FusedMLP(nn.Module):
    """gate and up in one product, for decoding."""

    def __init__(self, source: MLP):
        super().__init__()
        self.gate_up_proj = concatenated(source.gate_proj, source.up_proj)
        self.down_proj, self.act = source.down_proj, source.act

    def __call__(self, hidden_BTH: Tensor) -> Tensor:
        return self.forward(hidden_BTH)  # a snapshot has no hooks

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        gate, up = self.gate_up_proj.forward(hidden_BTH).chunk(2, dim=-1)
        return self.down_proj.forward(self.act(gate) * up)


class DecoderLayer(nn.Module):
    """a = z + Attn(RN(z)); out = a + MLP(RN(a))"""

    self_attn: Attention | FusedAttention
    mlp: MLP | FusedMLP
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    def __init__(self, config: Any, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_BTH: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        attended_BRH = self.self_attn(self.input_layernorm(hidden_BTH), rope, attention)
        return self.feed_forward(attention.select_queries(hidden_BTH) + attended_BRH)

    def feed_forward(self, hidden_BRH: Tensor) -> Tensor:
        return hidden_BRH + self.mlp(self.post_attention_layernorm(hidden_BRH))

    def project_context(self, hidden_BTH: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """Returns keys and values of states that are read by this layer's queries alone."""
        assert isinstance(self.self_attn, Attention)
        return self.self_attn.project_kv(hidden_BTH, rope)

    def fused(self) -> DecoderLayer:
        """Returns a copy for decoding with fused products."""
        twin = copy.deepcopy(self).requires_grad_(False)
        assert isinstance(twin.self_attn, Attention) and isinstance(twin.mlp, MLP)
        twin._modules |= {"self_attn": twin.self_attn.fused(), "mlp": twin.mlp.fused()}
        norms = {name: norm.frozen() for name, norm in twin.named_children() if isinstance(norm, RMSNorm)}
        twin._modules |= norms
        return twin


class FusionDecoderLayer(DecoderLayer):
    """First layer of EAGLE-3: attention reads [embedding ; hidden], the residual stream is the hidden half alone."""

    def __init__(self, config: Any, layer_idx: int = 0, norm_before_residual: bool = False):
        super().__init__(config, layer_idx)
        self.self_attn = Attention(config, input_size=2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_before_residual = norm_before_residual

    def forward(
        self, hidden_BTH: Tensor, rope: RopeTables, attention: AttentionFunction, embeds_BTH: Tensor | None = None
    ) -> Tensor:
        assert embeds_BTH is not None
        normed_BTH = self.hidden_norm(hidden_BTH)
        residual_BTH = normed_BTH if self.norm_before_residual else hidden_BTH
        both_BT2H = torch.cat((self.input_layernorm(embeds_BTH), normed_BTH), dim=-1)
        return self.feed_forward(attention.select_queries(residual_BTH) + self.self_attn(both_BT2H, rope, attention))
