"""An MLP of experts, a few of which each token visits, and one that all visit.

Shapes: M tokens, E experts, k experts a token visits, I their width, H hidden size, g groups of experts.

    Qwen3-Next, Qwen3.5-MoE    p = softmax(router(x))
                               out = sum over the k largest p of p_e expert_e(x)  +  sigmoid(gate(x)) shared(x)
    DeepSeek-V3, GLM-4-MoE     p = sigmoid(router(x)); chosen by p + bias: the best groups (by the sum of their two
                               best), in them the k best
                               out = scale * sum over the chosen of p_e expert_e(x)  +  shared(x)
    (`norm_topk_prob`: the k weights are scaled to add up to 1)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.nn.decoder import MLP, activation

TINY = 1e-20
"""Beside the sum of a token's weights: as in transformers, no division by zero."""


class Experts(nn.Module):
    """All experts' weights in two tensors; gate rows come before up rows."""

    def __init__(self, config: Any, num_experts: int):
        super().__init__()
        width, size = config.moe_intermediate_size, config.hidden_size
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
    """Qwen's: routed experts and a gated shared one, under the names of transformers."""

    def __init__(self, config: Any):
        super().__init__()
        size = config.hidden_size
        self.num_visited, self.renormalised = config.num_experts_per_tok, bool(getattr(config, "norm_topk_prob", True))
        self.gate = nn.Linear(size, config.num_experts, bias=False)
        self.experts = Experts(config, config.num_experts)
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


class GroupRouter(nn.Module):
    """Which experts a token visits and how they are weighed, in fp32 whatever surrounds it."""

    def __init__(self, config: Any):
        super().__init__()
        self.num_visited, self.num_groups = config.num_experts_per_tok, config.n_group or 1
        self.num_chosen_groups = config.topk_group or 1
        self.renormalised, self.scale = bool(config.norm_topk_prob), float(config.routed_scaling_factor)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=getattr(config, "initializer_range", 0.02))
        # Balances the load in the verifier's own training; no gradient reaches it.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.e_score_correction_bias: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> GroupRouter:
        """A cast leaves the bias in fp32, as engines do: choices near a tie would change."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != bias_E.dtype:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self

    def forward(self, hidden_MH: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, experts), both [M, k]"""
        with torch.autocast(hidden_MH.device.type, enabled=False):
            prob_ME = F.linear(hidden_MH.float(), self.weight.float()).sigmoid()
        choice_ME = prob_ME + self.e_score_correction_bias.float()
        if self.num_chosen_groups < self.num_groups:
            choice_Mgn = choice_ME.unflatten(-1, (self.num_groups, -1))
            best_groups = choice_Mgn.topk(2, dim=-1).values.sum(-1).topk(self.num_chosen_groups, dim=-1).indices
            is_out_Mg = torch.ones_like(choice_Mgn[..., 0], dtype=torch.bool).scatter(1, best_groups, False)
            choice_ME = choice_Mgn.masked_fill(is_out_Mg[..., None], float("-inf")).flatten(-2)
        expert_Mk = choice_ME.topk(self.num_visited, dim=-1).indices
        weight_Mk = prob_ME.gather(1, expert_Mk)
        if self.renormalised:
            weight_Mk = weight_Mk / (weight_Mk.sum(-1, keepdim=True) + TINY)
        return weight_Mk * self.scale, expert_Mk


class GroupRoutedMLP(nn.Module):
    """DeepSeek-V3's and GLM-4-MoE's: experts chosen group by group and a shared one, under transformers' names."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate = GroupRouter(config)
        self.experts = Experts(config, config.n_routed_experts)
        width = config.moe_intermediate_size * config.n_shared_experts
        shared = {"hidden_size": config.hidden_size, "intermediate_size": width}
        self.shared_experts = MLP(SimpleNamespace(hidden_act=config.hidden_act, **shared))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_MH = hidden.reshape(-1, hidden.shape[-1])
        weight_Mk, expert_Mk = self.gate(hidden_MH)
        routed_MH = self.experts(hidden_MH, expert_Mk, weight_Mk.to(hidden_MH.dtype))
        return (routed_MH + self.shared_experts(hidden_MH)).view_as(hidden)
