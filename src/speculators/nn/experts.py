"""An MLP of experts, a few of which each token visits, and one that all visit (Qwen3-Next, Qwen3.5-MoE).

Shapes: M tokens, E experts, k experts a token visits, I their width, H hidden size.

    p = softmax(router(x));   out = sum over the k largest p of p_e expert_e(x)  +  sigmoid(g(x)) shared(x)
    (`norm_topk_prob`: the k weights are scaled to add up to 1)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.nn.decoder import MLP, activation


class Experts(nn.Module):
    """All experts' weights in two tensors; gate rows come before up rows."""

    def __init__(self, config: Any):
        super().__init__()
        num_experts, width, size = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, size, width))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=getattr(config, "initializer_range", 0.02))
        self.act = activation(config.hidden_act)

    def forward(self, hidden_MH: Tensor, expert_Mk: Tensor, weight_Mk: Tensor) -> Tensor:
        out_MH = torch.zeros_like(hidden_MH)
        for expert in expert_Mk.unique().tolist():
            token, place = (expert_Mk == expert).nonzero().unbind(1)
            gate, up = F.linear(hidden_MH[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            answer = F.linear(self.act(gate) * up, self.down_proj[expert]) * weight_Mk[token, place, None]
            out_MH = out_MH.index_add(0, token, answer.to(out_MH.dtype))
        return out_MH


class SparseMLP(nn.Module):
    """Routed experts and a gated shared one, under the names of transformers."""

    def __init__(self, config: Any):
        super().__init__()
        size = config.hidden_size
        self.num_visited, self.renormalised = config.num_experts_per_tok, bool(getattr(config, "norm_topk_prob", True))
        self.gate = nn.Linear(size, config.num_experts, bias=False)
        self.experts = Experts(config)
        shared = {"hidden_size": size, "intermediate_size": config.shared_expert_intermediate_size}
        self.shared_expert = MLP(SimpleNamespace(hidden_act=config.hidden_act, **shared))
        self.shared_expert_gate = nn.Linear(size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_MH = hidden.reshape(-1, hidden.shape[-1])
        weight_Mk, expert_Mk = self.gate(hidden_MH).float().softmax(-1).topk(self.num_visited, dim=-1)
        if self.renormalised:
            weight_Mk = weight_Mk / weight_Mk.sum(-1, keepdim=True)
        routed_MH = self.experts(hidden_MH, expert_Mk, weight_Mk.to(hidden_MH.dtype))
        shared_MH = self.shared_expert_gate(hidden_MH).sigmoid() * self.shared_expert(hidden_MH)
        return (routed_MH + shared_MH).view_as(hidden)
