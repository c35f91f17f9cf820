"""How drafters that read the verifier's last state alone learn: head k at column t, on y[t], is taught x[t+2+k].

Shapes: T columns, those of several rows end to end, N columns that take part, K heads, H hidden size, V vocabulary.

    token      x0   x1   x2   x3   x4       nothing is shifted: column t holds token x[t] and state y[t]
    state      y0   y1   y2   y3   y4
    head 0 at column t   reads y[t] (and x[t+1])                    is taught x[t+2]
    head k at column t   reads y[t] (and x[t+1] .. x[t+1+k])        is taught x[t+2+k]

Head k is supervised at column t if column t+2+k is and of the same document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculators.interfaces import LossOutput, PackedBatch, Ratio
from speculators.losses.chunked import row_losses
from speculators.losses.chunks import Targets, TokenTargets
from speculators.losses.metrics import ratio
from speculators.losses.registry import LossConfig
from speculators.model_training import LossArgs
from speculators.models.last_state_proposer import LastStateNetwork
from speculators.models.supervision import VerifierHead, step_accuracy
from speculators.training_keys import TrainingArgs

HARD_LABELS = "ce"
"""The loss that teaches the data's tokens; all others teach the verifier's distributions."""
TARGET_SHIFT = 2
"""Head 0 at column t is taught column t + 2."""


class HeadLossArgs(TrainingArgs):
    """Training keys that drafters with a head per draft have."""

    head_weight_decay: float


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
    supervised_KT = supervised_heads(batch, len(network.heads))
    # the columns where this head or one after it is supervised: all tokens up to there are of the same document
    is_needed_KT = supervised_KT.flip(0).cumsum(0).flip(0) > 0
    column_N = is_needed_KT[0].nonzero().squeeze(1)
    carried = network.start(batch.last_hidden_TH[column_N])
    correct_KT, losses = torch.zeros_like(supervised_KT), []
    metrics: dict[str, Ratio] = {}
    for k in range(len(network.heads)):
        stays_N = is_needed_KT[k, column_N]
        column_N, carried = column_N[stays_N], carried[stays_N]
        features, carried = network.step(k, carried, batch.token_ids_T[column_N + 1 + k])
        supervised_N = supervised_KT[k, column_N]
        judged_N = column_N[supervised_N]
        target_N = judged_N + TARGET_SHIFT + k - (0 if is_hard else 1)
        rows = row_losses(
            features[supervised_N],
            network.heads[k].weight,
            targets,
            target_N,
            args.loss_config,
            expected_weight_N=torch.ones_like(target_N, dtype=torch.float32),
        )
        losses.append(args.own.head_weight_decay**k * (rows.loss_N.sum() / max(len(judged_N), 1)))
        correct_KT[k, judged_N] = rows.correct_N
        metrics[f"loss_{k}"] = ratio(rows.loss_N.sum(), len(judged_N))
    return LossOutput(torch.stack(losses).sum(), metrics | step_accuracy(supervised_KT, correct_KT))


def supervised_heads(batch: PackedBatch, num_heads: int) -> Tensor:
    """bool [K, T]: which heads are supervised where."""
    documents_T, num_columns = batch.document_ids_T, len(batch.document_ids_T)
    out = batch.supervised_T.new_zeros(num_heads, num_columns)
    for k in range(num_heads):
        num = max(num_columns - TARGET_SHIFT - k, 0)
        same_document = documents_T[:num] == documents_T[num_columns - num :]
        out[k, :num] = same_document & batch.supervised_T[num_columns - num :]
    return out


def all_logits(network: LastStateNetwork, states_BTH: Tensor, input_ids: Tensor) -> list[Tensor]:
    """[B, T - K, V] of each head, teacher forced. For callers that ask; training never holds them."""
    num_columns = max(input_ids.shape[1] - len(network.heads), 0)
    carried, out = network.start(states_BTH[:, :num_columns]), []
    for k, head in enumerate(network.heads):
        features, carried = network.step(k, carried, input_ids[:, 1 + k : 1 + k + num_columns])
        out.append(head(features))
    return out
