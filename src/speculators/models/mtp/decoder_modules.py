"""Attention and MLPs of verifier families that MTP layers imitate: gated and latent attention, routed experts.

Shapes: B rows, T new positions, R query positions, N heads, H hidden size, W width of the layer's input, c features
without position, r rotated ones, d head size of queries and keys (c + r in MLA), v head size of values; M tokens,
E experts, k experts a token visits, I their width, g groups of experts.

Gated attention (Qwen3-Next, Qwen3.5): q_proj gives 2 d numbers per head, [query ; gate], and
out = o_proj(attention(..) * sigmoid(gate)).

Latent attention (MLA, DeepSeek-V3), written out as ordinary attention in which each head has its own keys:

    query    q_proj(x), or q_b(norm(q_a(x)))          [N, c | r]      the last r are rotated
    latent   kv_a(x) = [l | k_r]                      k_r is rotated and shared by all heads
             kv_b(norm(l)) = [k_c | value]            [N, c | v]
    key      [k_c | k_r]                              scores: d ** -0.5, times YaRN's factor

Values are padded with zeros to the head size of keys, which leaves the output as it is: so every `AttentionFunction`
that drafters have serves this layer too.

Experts, a few of which each token visits, and a shared one that all visit:

    Qwen3-Next, Qwen3.5-MoE    p = softmax(router(x))
                               out = sum over the k largest p of p_e expert_e(x)  +  sigmoid(gate(x)) shared(x)
    DeepSeek-V3, GLM-4-MoE     p = sigmoid(router(x)); chosen by p + bias: the best groups (by the sum of their two
                               best), in them the k best
                               out = scale * sum over the chosen of p_e expert_e(x)  +  shared(x)

With `norm_topk_prob` the k weights are scaled to add up to 1.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.nn.attention import Attention, AttentionFunction
from speculators.nn.decoder import MLP, activation
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import RopeTables, rope_parameters

TINY = 1e-20
"""Added to the sum of a token's weights, as in transformers: no division by zero."""


class GatedAttention(Attention):
    """Grouped-query attention with an output gate; otherwise as `Attention`."""

    def __init__(self, config: Any):
        super().__init__(config)
        q_proj = self.q_proj
        self.q_proj = nn.Linear(q_proj.in_features, 2 * q_proj.out_features, bias=q_proj.bias is not None)

    def forward(self, hidden_BTW: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        both = self.q_proj(hidden_BTW).unflatten(-1, (self.num_heads, 2 * self.head_dim))
        query_BTNd, gate_BTNd = both.chunk(2, dim=-1)
        key_BTGd, value_BTGd = self.project_kv(hidden_BTW, rope)
        if self.q_norm is not None:
            query_BTNd = self.q_norm(query_BTNd)
        attended = attention(rope.rotate(query_BTNd), key_BTGd, value_BTGd).flatten(-2)
        return self.o_proj(attended * attention.select_queries(gate_BTNd.flatten(-2)).sigmoid())

    def fused(self) -> Any:
        """Returns itself: its query projection is already the larger part of the products."""
        return self


class LatentAttention(nn.Module):
    """Multi-head latent attention, under the names of transformers."""

    def __init__(self, config: Any):
        super().__init__()
        size, eps, bias = config.hidden_size, config.rms_norm_eps, bool(getattr(config, "attention_bias", False))
        self.num_heads, self.latent_size = config.num_attention_heads, config.kv_lora_rank
        self.plain_size, self.rotated_size = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_size, self.head_dim = config.v_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
        if self.value_size > self.head_dim:
            raise ValueError(
                f"v_head_dim={self.value_size} is larger than qk_nope_head_dim + qk_rope_head_dim = {self.head_dim}: "
                "no released model is so, and this layer pads values to the size of keys"
            )
        self.num_kv_heads = self.num_heads  # once written out, every head has keys of its own
        self.is_interleaved = bool(getattr(config, "rope_interleave", True))
        self.query_scale = yarn_factor(config)
        width = self.num_heads * self.head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(size, width, bias=False)
        else:
            self.q_a_proj = nn.Linear(size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(size, self.latent_size + self.rotated_size, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_size, eps)
        self.kv_b_proj = nn.Linear(self.latent_size, self.num_heads * (self.plain_size + self.value_size), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_size, size, bias=bias)

    def forward(self, hidden_BTH: Tensor, rope: RopeTables, attention: AttentionFunction) -> Tensor:
        query_BTNd = self.queries(hidden_BTH, rope)
        key_BTNd, value_BTNd = self.keys_and_values(hidden_BTH, rope)
        attended_BRNd = attention(query_BTNd, key_BTNd, value_BTNd)
        return self.o_proj(attended_BRNd[..., : self.value_size].flatten(-2))

    def queries(self, hidden_BTH: Tensor, rope: RopeTables) -> Tensor:
        if hasattr(self, "q_proj"):
            query = self.q_proj(hidden_BTH)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTH)))
        plain, rotated = query.unflatten(-1, (self.num_heads, self.head_dim)).split(
            (self.plain_size, self.rotated_size), dim=-1
        )
        return torch.cat((plain, rope.rotate(self.half_split(rotated))), dim=-1) * self.query_scale

    def keys_and_values(self, hidden_BTH: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        latent, rotated = self.kv_a_proj_with_mqa(hidden_BTH).split((self.latent_size, self.rotated_size), dim=-1)
        both = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.num_heads, -1))
        plain, value = both.split((self.plain_size, self.value_size), dim=-1)
        rotated_BT1r = rope.rotate(self.half_split(rotated.unsqueeze(-2)))
        key = torch.cat((plain, rotated_BT1r.expand(*plain.shape[:-1], -1).to(plain.dtype)), dim=-1)
        return key, F.pad(value, (0, self.head_dim - self.value_size))

    def half_split(self, x: Tensor) -> Tensor:
        """Reorders neighbouring pairs into two halves, as our rotation expects. Scores do not depend on the order."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.is_interleaved else x


def yarn_factor(config: Any) -> float:
    """Returns the factor that YaRN puts on the scores of this family (`mscale_all_dim`)."""
    parameters = rope_parameters(config)
    factor, share = parameters.get("factor") or 1.0, parameters.get("mscale_all_dim") or 0.0
    if parameters["rope_type"] == "default" or not share or factor <= 1.0:
        return 1.0
    return (0.1 * share * math.log(factor) + 1.0) ** 2


class Experts(nn.Module):
    """All experts' weights in two tensors; gate rows come before up rows."""

    def __init__(self, config: Any, num_experts: int):
        super().__init__()
        width, size = config.moe_intermediate_size, config.hidden_size
        self.visited_share = config.num_experts_per_tok / num_experts
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
            expert_out = F.linear(self.act(gate) * up, self.down_proj[expert]) * weight_Mk[token, place, None]
            out_MH = out_MH.index_add(0, token, expert_out.to(out_MH.dtype))
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
    """Chooses the experts of each token and their weights, in fp32 under any autocast."""

    def __init__(self, config: Any):
        super().__init__()
        self.num_visited, self.num_groups = config.num_experts_per_tok, config.n_group or 1
        self.num_chosen_groups = config.topk_group or 1
        self.renormalised, self.scale = bool(config.norm_topk_prob), float(config.routed_scaling_factor)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=getattr(config, "initializer_range", 0.02))
        # Balances the load in the verifier's own training; it gets no gradient.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.e_score_correction_bias: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> GroupRouter:
        """Keeps the bias in fp32 through a cast, as engines do: choices near a tie would change."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != bias_E.dtype:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self

    def forward(self, hidden_MH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights and experts, both [M, k]."""
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
