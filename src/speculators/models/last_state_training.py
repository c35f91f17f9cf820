"""How drafters that read the verifier's last state alone learn: head k at column t, on y[t], is taught x[t+2+k].

Shapes: B rows, T columns, R = B * T places end to end, N places that take part, K heads, H hidden size, V vocabulary.

    token      x0   x1   x2   x3   x4       nothing is shifted: column t holds token x[t] and state y[t]
    state      y0   y1   y2   y3   y4
    head 0 at column t   reads y[t] (and x[t+1])                    is taught x[t+2]
    head k at column t   reads y[t] (and x[t+1] .. x[t+1+k])        is taught x[t+2+k]

Head k counts at column t if column t+2+k is supervised and of the same document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators.losses.chunked import row_losses
from speculators.losses.chunks import HeadTargets, Targets, TokenTargets
from speculators.losses.metrics import counted
from speculators.losses.registry import LossConfig
from speculators.models.last_state_proposer import LastStateNetwork
from speculators.models.unrolled_steps import step_accuracy

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


@dataclass(frozen=True)
class Places:
    """All columns of all rows end to end, padded so that every head's target can be looked up."""

    token_ids_R: Tensor
    documents_R: Tensor
    """Distinct between rows; -1 = padding."""
    loss_mask_R: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, document_ids: Tensor | None, loss_mask: Tensor | None) -> Places:
        documents = torch.zeros_like(input_ids) if document_ids is None else document_ids
        rows_B1 = torch.arange(len(input_ids), device=input_ids.device)[:, None]
        distinct = torch.where(documents < 0, -1, documents + rows_B1 * (documents.max() + 1))
        mask = torch.ones_like(input_ids) if loss_mask is None else loss_mask
        return cls(input_ids.flatten(), distinct.flatten(), mask.flatten().bool())

    def counts(self, num_heads: int) -> Tensor:
        """bool [K, R]: which heads count where."""
        num_places = len(self.token_ids_R)
        out = self.loss_mask_R.new_zeros(num_heads, num_places)
        for k in range(num_heads):
            num = max(num_places - TARGET_SHIFT - k, 0)
            source, target = self.documents_R[:num], self.documents_R[num_places - num :]
            out[k, :num] = (source == target) & (source >= 0) & self.loss_mask_R[num_places - num :]
        return out


def train_losses(
    network: LastStateNetwork,
    states_RH: Tensor,
    places: Places,
    targets: Targets,
    loss_config: LossConfig,
    head_weights: Sequence[float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each head is averaged over the columns where it counts and weighted; heads are added."""
    is_hard = isinstance(targets, TokenTargets)
    counts_KR = places.counts(len(head_weights))
    # the columns where this head or one after it counts: all tokens up to there are of the same document
    is_needed_KR = counts_KR.flip(0).cumsum(0).flip(0) > 0
    place_N = is_needed_KR[0].nonzero().squeeze(1)
    carried = network.start(states_RH[place_N])
    correct_KR, losses = torch.zeros_like(counts_KR), []
    metrics: dict[str, Tensor] = {}
    for k, weight in enumerate(head_weights):
        stays_N = is_needed_KR[k, place_N]
        place_N, carried = place_N[stays_N], carried[stays_N]
        features, carried = network.step(k, carried, places.token_ids_R[place_N + 1 + k])
        counts_N = counts_KR[k, place_N]
        counted_N = place_N[counts_N]
        target_N = counted_N + TARGET_SHIFT + k - (0 if is_hard else 1)
        rows = row_losses(
            features[counts_N],
            network.heads[k].weight,
            targets,
            target_N,
            loss_config,
            expected_weight_N=torch.ones_like(target_N, dtype=torch.float32),
        )
        mean = rows.loss_N.sum() / max(len(counted_N), 1)
        losses.append(weight * mean)
        correct_KR[k, counted_N] = rows.correct_N
        metrics |= counted(f"loss_{k}", rows.loss_N.sum(), len(counted_N))
    metrics |= step_accuracy(counts_KR, correct_KR)
    loss = torch.stack(losses).sum()
    return loss, {"loss": loss.detach(), **counted("loss", loss.detach(), 1.0), **metrics}


def targets_of(
    loss_config: LossConfig, input_ids: Tensor, normed_RH: Tensor, head_VH: Tensor, transform: Any
) -> Targets:
    """The data's tokens, or the verifier's distributions; `transform` is (scale, softcap) of its logits."""
    if set(loss_config) == {HARD_LABELS}:
        return TokenTargets(input_ids.flatten())
    return HeadTargets(normed_RH, head_VH, *transform)


def all_logits(network: LastStateNetwork, states_BTH: Tensor, input_ids: Tensor) -> list[Tensor]:
    """[B, T - K, V] of each head, teacher forced. For callers that ask; training never holds them."""
    num_columns = max(input_ids.shape[1] - len(network.heads), 0)
    carried, out = network.start(states_BTH[:, :num_columns]), []
    for k, head in enumerate(network.heads):
        features, carried = network.step(k, carried, input_ids[:, 1 + k : 1 + k + num_columns])
        out.append(head(features))
    return out
