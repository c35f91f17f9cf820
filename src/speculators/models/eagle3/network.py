"""The EAGLE-3 network: verifier states and tokens in, draft states out. Training and decoding call the same step.

Shapes: B rows, T positions in, R query positions, H hidden size, A aux layers, D = A * H, V draft vocabulary.

    features g_i [D] --(input_norm | fc_norm)--> fc --> h_i [H]          once for each state the verifier made
    step:  (token x_{i+1}, h_i) --> layers --> out_i --> norm --> lm_head --> predicts x_{i+2}
           fed back as the next h_i: out_i, or norm(out_i) with `norm_output`
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speculators.models.feedback_proposer import StepOutput
from speculators.nn.attention import AttentionFunction
from speculators.nn.decoder import DecoderLayer
from speculators.nn.flops import product_flop
from speculators.nn.norms import FrozenRMSNorm, RMSNorm
from speculators.nn.rope import Rope, RopeTables


@dataclass(frozen=True)
class Eagle3Network:
    """The modules of a drafter and the functions over them. Owns none of them."""

    embed_tokens: nn.Embedding
    input_norm: RMSNorm | FrozenRMSNorm | None
    fc_norm: nn.ModuleList | None
    fc: nn.Linear
    layers: Sequence[DecoderLayer]
    norm: RMSNorm | FrozenRMSNorm
    lm_head: nn.Linear
    rope: Rope
    windows: list[int | None]
    norm_output: bool

    @property
    def linears(self) -> list[nn.Linear]:
        return [self.fc, self.lm_head]

    def combine(self, features_BTD: Tensor) -> Tensor:
        """Verifier states to draft states: [B, T, H]. Never applied to what the drafter itself made."""
        if self.input_norm is not None:
            features_BTD = self.input_norm(features_BTD)
        if self.fc_norm is not None:
            chunks = features_BTD.chunk(len(self.fc_norm), dim=-1)
            features_BTD = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return self.fc(features_BTD)

    def combine_flop(self, num_rows: int) -> int:
        """Model FLOPs of `combine`; norms before `fc` are trained."""
        has_norm = self.input_norm is not None or self.fc_norm is not None
        return product_flop(self.fc.weight, num_rows, input_learns=has_norm)

    def step(
        self, token_ids_BT: Tensor, hidden_BTH: Tensor, rope: RopeTables, layer_attention: Sequence[AttentionFunction]
    ) -> StepOutput:
        first, *others = zip(self.layers, layer_attention, strict=True)
        layer, attention = first
        hidden = layer(hidden_BTH, rope, attention, self.embed_tokens(token_ids_BT))
        for layer, attention in others:
            hidden = layer(hidden, rope, attention)
        normed = self.norm(hidden)
        return StepOutput(normed, normed if self.norm_output else hidden)

    def fused(self) -> Eagle3Network:
        """A snapshot for decoding: the same function, faster for few rows. Only the embedding and the head, which are
        the verifier's, stay shared (the embedding is copied if it is trained)."""
        embed_tokens = self.embed_tokens
        return dataclasses.replace(
            self,
            embed_tokens=copy.deepcopy(embed_tokens) if embed_tokens.weight.requires_grad else embed_tokens,
            input_norm=self.input_norm.frozen() if self.input_norm is not None else None,
            fc_norm=frozen_norms(self.fc_norm) if self.fc_norm is not None else None,
            fc=copy.deepcopy(self.fc),
            layers=[layer.fused() for layer in self.layers],
            norm=self.norm.frozen(),
        )


def frozen_norms(norms: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(norm.frozen() for norm in norms if isinstance(norm, RMSNorm | FrozenRMSNorm))
