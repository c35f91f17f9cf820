"""The EAGLE network: tokens and the verifier's features in, predicted features out. Training and decoding share it.

Shapes: B rows, T positions in, R query positions, H hidden size, V vocabulary.

    f_i  = the verifier's final norm of its last state at i; head(f_i) are its logits for x_{i+1}
    step:  (token x_{i+1}, f_i) --fusion_fc--> layer --> f'_{i+1} --(pre_lm_head_layernorm)--> head --> predicts x_{i+2}
           fed back as the next feature: f'_{i+1} itself
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.models.feedback_proposer import StepOutput
from speculators.nn.attention import AttentionFunction
from speculators.nn.decoder import DecoderLayer
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope, RopeTables


class EagleDecoderLayer(DecoderLayer):
    """Without its input norm, unless the drafter has the extra norms."""

    def __init__(self, config: Any, layernorms: bool):
        super().__init__(config, 0)
        if not layernorms:
            self.input_layernorm = nn.Identity()  # type: ignore[assignment]


@dataclass(frozen=True)
class EagleNetwork:
    """The modules of a drafter and the functions over them. Owns none of them."""

    embedding_VH: Tensor
    """The verifier's embedding table as stored: a family that scales its embeddings does so in the verifier alone."""
    embedding_layernorm: RMSNorm | None
    fusion_fc: nn.Linear
    layers: Sequence[DecoderLayer]
    """One layer."""
    pre_lm_head_layernorm: RMSNorm | None
    lm_head: nn.Linear
    verifier_norm: nn.Module
    rope: Rope
    windows: list[int | None]

    @property
    def linears(self) -> list[nn.Linear]:
        return [self.fusion_fc, self.lm_head]

    def combine(self, last_hidden_BTH: Tensor) -> Tensor:
        """The verifier's last states to features."""
        return self.verifier_norm(last_hidden_BTH)

    def step(
        self, token_ids_BT: Tensor, features_BTH: Tensor, rope: RopeTables, layer_attention: Sequence[AttentionFunction]
    ) -> StepOutput:
        embeds_BTH = F.embedding(token_ids_BT, self.embedding_VH)
        if self.embedding_layernorm is not None:
            embeds_BTH = self.embedding_layernorm(embeds_BTH)
        fused_BTH = self.fusion_fc(torch.cat((embeds_BTH, features_BTH.to(embeds_BTH.dtype)), dim=-1))
        out_BRH = self.layers[0](fused_BTH, rope, layer_attention[0])
        return StepOutput(self.head_input(out_BRH), out_BRH)

    def head_input(self, features_BRH: Tensor) -> Tensor:
        return features_BRH if self.pre_lm_head_layernorm is None else self.pre_lm_head_layernorm(features_BRH)

    def snapshot(self, like_VH: Tensor) -> EagleNetwork:
        """The drafter's own modules copied for decoding, in the dtype and on the device of the verifier's embedding:
        the same function, faster for few rows. Embedding, head and norm, which are the verifier's, stay shared."""

        def own(module):
            return None if module is None else copy.deepcopy(module).requires_grad_(False).to(like_VH)

        return dataclasses.replace(
            self,
            embedding_layernorm=own(self.embedding_layernorm),
            fusion_fc=own(self.fusion_fc),
            layers=[own(layer).fused() for layer in self.layers],
            pre_lm_head_layernorm=own(self.pre_lm_head_layernorm),
        )
