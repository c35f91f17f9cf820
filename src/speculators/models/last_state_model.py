"""What drafters that read the verifier's last state alone share: the verifier's final norm and head, for inputs and
targets, and the hooks of training.

A config of theirs has `hidden_size`, `vocab_size` and `rms_norm_eps`, all the verifier's.
Shapes: H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.draft_vocab import VERIFIER_ONLY_KEYS
from speculators.interfaces import CaptureSpec, LossOutput, PackedBatch, VerifierStates
from speculators.model import SpeculatorModel
from speculators.model_training import LossArgs
from speculators.models.last_state_proposer import LastStateNetwork
from speculators.models.last_state_training import align, all_logits, train_heads
from speculators.models.supervision import VerifierHead
from speculators.nn.norms import RMSNorm
from speculators.nn.packed_batch import join_rows
from speculators.verifier.config import LogitTransform
from speculators.verifier.loading import read_verifier_weights


class LastStateModel(SpeculatorModel):
    """Subclasses define `network`."""

    align = staticmethod(align)
    has_chosen_layers = False
    forward_keys: ClassVar[Mapping[str, str]] = {"head_weight_decay": "head_weight_decay"}
    forward_columns = ("input_ids", "hidden_states", "loss_mask", "document_ids")
    target_transform = LogitTransform()
    """What the verifier does to the numbers its head gives."""
    _keys_to_ignore_on_save = list(VERIFIER_ONLY_KEYS)
    _keys_to_ignore_on_load_missing = list(VERIFIER_ONLY_KEYS)

    def add_verifier_tail(self) -> None:
        """Frozen copies, never saved. The head is NaN until loaded, so that it cannot pass for one."""
        config: Any = self.config
        self.verifier_norm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.verifier_lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.constant_(self.verifier_lm_head.weight, math.nan)
        self.verifier_lm_head._is_hf_initialized = True  # type: ignore[assignment]
        for module in (self.verifier_norm, self.verifier_lm_head):
            module.requires_grad_(False)

    @property
    def network(self) -> LastStateNetwork:
        raise NotImplementedError

    @property
    def capture(self) -> CaptureSpec:
        return CaptureSpec(last_hidden=True)

    @property
    def target_layer_ids(self) -> list[int]:
        return []

    def load_verifier_weights(self) -> None:
        """Final norm and head; nothing to do when the config names no verifier."""
        path = self.config.recorded_verifier
        if path is None:
            return
        V, H = self.verifier_lm_head.weight.shape
        weights = read_verifier_weights(path, vocab_size=V, hidden_size=H, needs_embedding=False)
        with torch.no_grad():
            self.verifier_lm_head.weight.copy_(weights.head_VH)
        self.verifier_norm = weights.fill_norm(self.verifier_norm)
        self.target_transform = weights.logit_transform

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def trainer_keywords(cls, own: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().trainer_keywords(own, keys), "return_logits": False}

    def packed_batch(  # type: ignore[override]
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        loss_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> PackedBatch:
        """Of any number of rows. `hidden_states` are the verifier's last states, before its final norm."""
        return join_rows(
            input_ids,
            aux=None,
            last_hidden=self.states_of(input_ids, hidden_states),
            document_ids=document_ids,
            loss_mask=loss_mask,
            position_ids=None,
            first_position=self.first_position,
        )

    def states_of(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        """[B, S, H]; zeros for a batch of which no sample could be had."""
        if hidden_states.shape[-1]:
            return hidden_states
        return hidden_states.new_zeros(*input_ids.shape, self.verifier_lm_head.in_features)

    @property
    def verifier_head(self) -> VerifierHead:
        return VerifierHead(self.verifier_norm, self.verifier_lm_head, self.target_transform)

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        return train_heads(self.network, batch, self.verifier_head, args)

    def forward_output(
        self, batch: PackedBatch, args: LossArgs[Any], result: LossOutput, given: Mapping[str, Any]
    ) -> list[Tensor]:
        """Logits [B, S - K, V] of each head; with `return_logits=False` (what the trainer gives) none are kept."""
        if not given.get("return_logits", True):
            return []
        states = self.states_of(given["input_ids"], given["hidden_states"])
        return all_logits(self.network, states, given["input_ids"])

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor:
        """As many rows as there are heads, at most K."""
        row, num_heads = self.training_row(states), len(self.network.heads)
        column = len(states.token_ids_T) - num_drafts - 2
        padded_ids = F.pad(row["input_ids"], (0, num_heads))  # every head answers up to the last column
        logits = all_logits(self.network, row["hidden_states"], padded_ids)
        return torch.stack([of_head[0, column] for of_head in logits[:num_drafts]])


def check_whole_vocabulary(draft_vocab_size: int | None, vocab_size: int) -> None:
    if draft_vocab_size not in (None, vocab_size):
        raise ValueError(
            f"draft_vocab_size={draft_vocab_size}: this drafter's heads are over the verifier's {vocab_size} tokens; "
            "leave draft_vocab_size out"
        )
