"""Shared by drafters that read the verifier's last state alone: the verifier's final norm and head, for inputs and
targets, the hooks of training, and how they learn: head k at column t, on y[t], is taught x[t+2+k].

A config of theirs has `hidden_size`, `vocab_size` and `rms_norm_eps`, all the verifier's.
Shapes: B rows, S columns of a row; T columns, those of several rows end to end, N columns that take part, K heads,
H hidden size, V vocabulary.

    token      x0   x1   x2   x3   x4       nothing is shifted: column t holds token x[t] and state y[t]
    state      y0   y1   y2   y3   y4
    head 0 at column t   reads y[t] (and x[t+1])                    is taught x[t+2]
    head k at column t   reads y[t] (and x[t+1] .. x[t+1+k])        is taught x[t+2+k]

Head k is supervised at column t if column t+2+k is and of the same document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.draft_vocab import VERIFIER_ONLY_KEYS
from speculators.interfaces import CaptureSpec, LossOutput, PackedBatch, Ratio, VerifierStates
from speculators.losses.chunked import row_losses
from speculators.losses.chunks import Targets, TokenTargets
from speculators.losses.metrics import ratio
from speculators.losses.registry import LossConfig
from speculators.model import SpeculatorModel
from speculators.model_training import LossArgs
from speculators.models.last_state_proposer import LastStateNetwork
from speculators.models.supervision import VerifierHead, step_accuracy
from speculators.nn.flops import head_flop, targets_flop
from speculators.nn.norms import RMSNorm
from speculators.nn.packed_row import join_rows
from speculators.training_keys import HeadLossArgs
from speculators.verifier.config import LogitTransform
from speculators.verifier.loading import read_verifier_weights

HARD_LABELS = "ce"
"""The loss that teaches the data's tokens; all others teach the verifier's distributions."""
TARGET_SHIFT = 2
"""Head 0 at column t is taught column t + 2."""


def align(sample: dict[str, Any]) -> dict[str, Any]:
    """No shift: the drafter reads the verifier's last states in place of aux states."""
    kept: dict[str, Any] = {
        key: sample[key] for key in ("input_ids", "loss_mask", "lengths", "position_ids") if key in sample
    }
    return {**kept, "hidden_states": sample["verifier_last_hidden_states"]}


def teaches_tokens(loss_config: LossConfig) -> bool:
    return set(loss_config) == {HARD_LABELS}


def train_heads(
    network: LastStateNetwork, batch: PackedBatch, verifier: VerifierHead, args: LossArgs[HeadLossArgs]
) -> LossOutput:
    """Each head is averaged over its supervised columns and weighted; heads are added."""
    assert batch.last_hidden_TH is not None
    is_hard = teaches_tokens(args.loss_config)
    targets: Targets = TokenTargets(batch.token_ids_T) if is_hard else verifier.targets(batch.last_hidden_TH)
    device = batch.token_ids_T.device

    def on_device(chosen: Tensor) -> Tensor:
        return chosen.to(device, non_blocking=True)

    supervised_KT = supervised_heads(batch, len(network.heads))  # all choices are made on the host
    # the columns where this head or one after it is supervised: all tokens up to there are of the same document
    is_needed_KT = supervised_KT.flip(0).cumsum(0).flip(0) > 0
    column_N = is_needed_KT[0].nonzero().squeeze(1)
    carried = network.start(batch.last_hidden_TH[on_device(column_N)])
    supervised_on = on_device(supervised_KT)
    correct_KT, losses = torch.zeros_like(supervised_on), []
    metrics: dict[str, Ratio] = {}
    flop, taught = 0, []
    for k in range(len(network.heads)):
        stays_N = is_needed_KT[k, column_N].nonzero().squeeze(1)
        column_N, carried = column_N[stays_N], carried[on_device(stays_N)]
        flop += network.step_flop(k, len(column_N))
        features, carried = network.step(k, carried, batch.token_ids_T[on_device(column_N + 1 + k)])
        supervised_N = supervised_KT[k, column_N].nonzero().squeeze(1)
        judged_N = column_N[supervised_N]
        target_N = judged_N + TARGET_SHIFT + k - (0 if is_hard else 1)
        flop += head_flop(network.heads[k].weight, len(judged_N))
        taught.append(target_N)
        rows = row_losses(
            features[on_device(supervised_N)],
            network.heads[k].weight,
            targets,
            target_N,
            args.loss_config,
            weight_N=torch.ones(len(target_N), device=device),
        )
        assert rows.total is not None
        losses.append(args.own.head_weight_decay**k * (rows.total / max(len(judged_N), 1)))
        correct_KT[k, on_device(judged_N)] = rows.correct_N
        metrics[f"loss_{k}"] = ratio(rows.total, len(judged_N))
    flop += 0 if is_hard else targets_flop(verifier.lm_head.weight, torch.cat(taught))
    metrics |= step_accuracy(supervised_on, correct_KT)
    return LossOutput(torch.stack(losses).sum(), metrics, model_flop=flop)


def supervised_heads(batch: PackedBatch, num_heads: int) -> Tensor:
    """bool [K, T], on the host: which heads are supervised where."""
    documents_T, num_columns = batch.host_document_ids_T, len(batch.host_document_ids_T)
    out = torch.zeros(num_heads, num_columns, dtype=torch.bool)
    for k in range(num_heads):
        num = max(num_columns - TARGET_SHIFT - k, 0)
        same_document = documents_T[:num] == documents_T[num_columns - num :]
        out[k, :num] = same_document & batch.host_supervised_T[num_columns - num :]
    return out


def all_logits(network: LastStateNetwork, states_BTH: Tensor, input_ids: Tensor) -> list[Tensor]:
    """[B, T - K, V] of each head, teacher forced. For callers that ask; training never holds them."""
    num_columns = max(input_ids.shape[1] - len(network.heads), 0)
    carried, out = network.start(states_BTH[:, :num_columns]), []
    for k, head in enumerate(network.heads):
        features, carried = network.step(k, carried, input_ids[:, 1 + k : 1 + k + num_columns])
        out.append(head(features))
    return out


class LastStateModel(SpeculatorModel):
    """Subclasses define `network`."""

    align = staticmethod(align)
    has_chosen_layers = False
    columns_on_host = ("document_ids", "loss_mask")
    uses_every_weight = True
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
