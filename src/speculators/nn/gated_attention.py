"""Attention whose output is gated by its own query projection (Qwen3-Next, Qwen3.5).

Shapes: B rows, T new positions, R answered positions, N query heads, d head size, W width of the layer's input.

    q_proj gives 2 d numbers a head: [query ; gate]            out = o_proj(attention(..) * sigmoid(gate))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from speculators.nn.attention import Attend, Attention
from speculators.nn.rope import RopeTables


class GatedAttention(Attention):
    """Grouped-query attention with an output gate; otherwise as `Attention`."""

    def __init__(self, config: Any):
        super().__init__(config)
        q_proj = self.q_proj
        self.q_proj = nn.Linear(q_proj.in_features, 2 * q_proj.out_features, bias=q_proj.bias is not None)

    def forward(self, hidden_BTW: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        both = self.q_proj(hidden_BTW).unflatten(-1, (self.num_heads, 2 * self.head_dim))
        query_BTNd, gate_BTNd = both.chunk(2, dim=-1)
        key_BTGd, value_BTGd = self.project_kv(hidden_BTW, rope)
        if self.q_norm is not None:
            query_BTNd = self.q_norm(query_BTNd)
        attended = attend(rope.rotate(query_BTNd), key_BTGd, value_BTGd).flatten(-2)
        return self.o_proj(attended * attend.rows(gate_BTNd.flatten(-2)).sigmoid())

    def fused(self) -> Any:
        """As it is: its query projection is already the larger part."""
        return self
