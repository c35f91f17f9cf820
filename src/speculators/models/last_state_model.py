"""What drafters that read the verifier's last state alone share: the verifier's final norm and head, for inputs and
targets, and the hooks of training.

A config of theirs has `hidden_size`, `vocab_size` and `rms_norm_eps`, all the verifier's.
Shapes: H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.draft_vocab import VERIFIER_ONLY_KEYS
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.losses.registry import choose_loss_config, resolve_loss_config
from speculators.model import SpeculatorModel
from speculators.models.last_state_proposer import LastStateNetwork
from speculators.models.last_state_training import Places, align, all_logits, targets_of, train_losses
from speculators.nn.norms import RMSNorm
from speculators.verifier.config import LogitTransform
from speculators.verifier.weights import read_verifier_weights

DEFAULT_LOSS = "kl_div"


class LastStateModel(SpeculatorModel):
    """Subclasses define `network`."""

    align = staticmethod(align)
    has_chosen_layers = False
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

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        spec = kwargs.get("loss_fn") or DEFAULT_LOSS
        loss_config = resolve_loss_config(spec, kwargs.get("loss_implementation", "fused"))
        shared = {"loss_config": loss_config, "return_logits": False}
        if kwargs.get("head_weight_decay") is not None:
            shared["head_weight_decay"] = kwargs["head_weight_decay"]
        return shared, dict(shared)

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        loss_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        head_weight_decay: float = 1.0,
        loss_config: Any = None,
        loss_fn: Any = None,
        return_logits: bool = True,
        **_: Any,
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """(logits [B, T - K, V] of each head, loss, metrics). `hidden_states` are the verifier's last states, before
        its final norm. `return_logits=False` (what the trainer gives): the list is empty."""
        network, config = self.network, choose_loss_config(loss_config, loss_fn, DEFAULT_LOSS)
        if hidden_states.shape[-1] == 0:  # a batch of which no sample could be had
            hidden_states = hidden_states.new_zeros(*input_ids.shape, self.verifier_lm_head.in_features)
        states_RH = hidden_states.flatten(0, 1)
        targets = targets_of(
            config, input_ids, self.verifier_norm(states_RH), self.verifier_lm_head.weight, self.target_transform
        )
        weights = [head_weight_decay**k for k in range(len(network.heads))]
        places = Places.of(input_ids, document_ids, loss_mask)
        loss, metrics = train_losses(network, states_RH, places, targets, config, weights)
        logits = all_logits(network, hidden_states, input_ids) if return_logits else []
        return logits, loss, metrics

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
