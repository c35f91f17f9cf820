"""The MTP network: a verifier state and the next token in, the state of the next position out. Training and decoding
call the same step.

Shapes: B rows, T positions in, R query positions, H hidden size, V vocabulary.

    f_t = final norm of the verifier's state y_t             what engines feed: the model's output (MiMo: y_t itself)
    step:  (token x_{t+1}, f_t) --> layer --> out --> final_layernorm --> lm_head --> predicts x_{t+2}
           fed back as the next f: the normed state (GLM: the state before the norm)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from speculators.models.feedback_proposer import StepOutput
from speculators.models.mtp.layer import MTPLayer
from speculators.nn.attention import AttentionFunction
from speculators.nn.rope import Rope, RopeTables

NO_TOKEN = -1
"""In place of a token: its embedding is zero."""


@dataclass(frozen=True)
class MTPNetwork:
    """The modules of a drafter and the functions over them. Owns none of them."""

    embed_tokens: nn.Embedding
    verifier_norm: nn.Module
    layer: MTPLayer
    lm_head: nn.Linear
    rope: Rope
    reads_raw_states: bool
    zeroes_first_embedding: bool

    @property
    def layers(self) -> Sequence[Any]:
        return [self.layer]

    @property
    def windows(self) -> list[int | None]:
        return [None]

    @property
    def linears(self) -> Sequence[nn.Linear]:
        return [self.layer.input_proj, self.lm_head]

    def combine(self, states_BTH: Tensor) -> Tensor:
        return states_BTH if self.reads_raw_states else self.verifier_norm(states_BTH)

    def tokens_at(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """The tokens as `step` takes them: engines zero the embedding at position 0 in some families."""
        return token_ids.masked_fill(positions == 0, NO_TOKEN) if self.zeroes_first_embedding else token_ids

    def step(
        self, token_ids_BT: Tensor, hidden_BTH: Tensor, rope: RopeTables, layer_attention: Sequence[AttentionFunction]
    ) -> StepOutput:
        embeds_BTH = self.embed_tokens(token_ids_BT.clamp_min(0))
        if self.zeroes_first_embedding:
            embeds_BTH = embeds_BTH.masked_fill((token_ids_BT == NO_TOKEN).unsqueeze(-1), 0.0)
        (attention,) = layer_attention
        return StepOutput(*self.layer(embeds_BTH, hidden_BTH, rope, attention))

    def fused(self) -> MTPNetwork:
        """A snapshot for decoding: the same function, faster for few rows. What is the verifier's stays shared."""
        layer = self.layer.fused()
        assert isinstance(layer, MTPLayer)
        return dataclasses.replace(self, layer=layer, verifier_norm=copy.deepcopy(self.verifier_norm))
