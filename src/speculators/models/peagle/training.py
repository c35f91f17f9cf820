"""How P-EAGLE learns: one forward over true columns and masked slots at once, nothing is fed back.

Shapes: T columns of the packed row, M slots, E = T + M elements, R answered elements, N supervised ones, H hidden size,
D = aux layers * H.

    token      x0   x1   x2   x3   x4       column i after `shift_batch`: token x[i+1], state g[i], target y[i+1]
    state      g0   g1   g2   g3   g4
    column     .    0    1    2    3
    chain of column 0    .    1    2        slot (a, d): the mask token and the mask state at position a + d, taught
                                            P(x[a+d+2]) = head(norm(y[a+d+1])): the target of column a + d

A slot thus sees x up to a + 1 and drafts d tokens further than its anchor. Each sampled slot counts the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.chunks import HeadTargets
from speculators.losses.metrics import counted
from speculators.losses.registry import MASK_EPSILON, LossConfig
from speculators.models.draft_layers import attention_of
from speculators.models.eagle3.training import PackedBatch
from speculators.models.peagle.chain_attention import ChainLayout, chain_attention
from speculators.models.peagle.sampling import Chains, sample_chains, validation_generator

if TYPE_CHECKING:
    from speculators.models.peagle.core import PEagleDraftModel


@dataclass(frozen=True)
class Sampling:
    """How many slots are trained."""

    num_depths: int
    ratio: float
    ratio_min: float
    max_anchors: int | None

    def draw(self, batch: PackedBatch, generator: torch.Generator | None) -> Chains:
        return sample_chains(
            batch.loss_mask_T,
            batch.document_ids_T,
            num_depths=self.num_depths,
            ratio=self.ratio,
            ratio_min=self.ratio_min,
            max_anchors=self.max_anchors,
            generator=generator,
        )


@dataclass(frozen=True)
class Supervision:
    """The answered elements: columns, then slots."""

    columns_C: Tensor
    """Supervised columns (one that does not count where there is none: it keeps the graph and gives loss 0)."""
    chains: Chains
    counts_R: Tensor
    depth_R: Tensor
    target_R: Tensor
    """Column whose last state is the target."""

    @classmethod
    def of(cls, batch: PackedBatch, chains: Chains) -> Supervision:
        supervised_T = batch.loss_mask_T.bool() & (batch.document_ids_T != -1)
        columns_C = supervised_T.nonzero().squeeze(1)
        if len(columns_C) == 0:
            columns_C = columns_C.new_zeros(1)
        target_R = torch.cat((columns_C, chains.anchors_M + chains.depths_M))
        depth_R = torch.cat((torch.zeros_like(columns_C), chains.depths_M))
        return cls(columns_C, chains, supervised_T[target_R], depth_R, target_R)


def run_elements(model: PEagleDraftModel, batch: PackedBatch, supervision: Supervision) -> Tensor:
    """What the head reads of the answered elements: [R, H]."""
    network, (anchors_M, depths_M) = model.network, supervision.chains
    layout = ChainLayout(batch.document_ids_T, anchors_M, depths_M, supervision.columns_C)
    attention = attention_of(model.config)
    layer_attention = chain_attention(attention, layout, network.windows)
    token_ids_E = torch.cat((batch.token_ids_T, torch.full_like(anchors_M, model.mask_token_id)))
    slot_11H = network.combine(model.mask_hidden)
    hidden_1EH = torch.cat((network.combine(batch.features_TD[None]), slot_11H.expand(-1, len(anchors_M), -1)), dim=1)
    positions_E = torch.cat((batch.position_ids_T, batch.position_ids_T[anchors_M] + depths_M))
    rope = network.rope.at(positions_E, torch.float32)
    return network.step(token_ids_E[None], hidden_1EH, rope, layer_attention).normed_BRH[0]


def drafts_read(model: PEagleDraftModel, batch: PackedBatch, num_drafts: int) -> Tensor:
    """What the head reads in the places of the last K tokens of the batch: [K, H]. A column and its chain of slots."""
    column = batch.token_ids_T.new_tensor([len(batch.token_ids_T) - num_drafts - 1])
    depths = torch.arange(1, num_drafts, device=column.device)
    chains = Chains(column.expand_as(depths), depths)
    answered = torch.cat((column, column + depths))
    return run_elements(model, batch, Supervision(column, chains, torch.ones_like(answered), answered, answered))


def train_forward(
    model: PEagleDraftModel,
    batch: PackedBatch,
    sampling: Sampling,
    loss_config: LossConfig,
    generator: torch.Generator | None,
) -> tuple[None, Tensor, dict[str, Tensor]]:
    if batch.last_hidden_TH is None:
        raise ValueError("verifier_last_hidden_states is None, but the targets of training are made of them")
    if generator is None and not model.training:
        generator = validation_generator()
    supervision = Supervision.of(batch, sampling.draw(batch, generator))
    hidden_RH = run_elements(model, batch, supervision)
    targets = HeadTargets(
        model.verifier_norm(batch.last_hidden_TH), model.verifier_lm_head.weight, *model.target_transform
    )
    counts_R = supervision.counts_R
    depth_N, target_N = supervision.depth_R[counts_R], supervision.target_R[counts_R]
    losses = row_losses(hidden_RH[counts_R], model.lm_head.weight, targets, target_N, loss_config)
    places = Places(depth_N, target_N - depth_N, sampling.num_depths)
    return None, *reduce(losses, places, loss_config)


class Places(NamedTuple):
    """Where the supervised elements stand."""

    depth_N: Tensor
    anchor_N: Tensor
    num_depths: int

    def on_grid(self, values_N: Tensor) -> Tensor:
        """[depths, columns] by depth and anchor, zeros elsewhere."""
        num_columns = int(self.anchor_N.max()) + 1 if len(self.anchor_N) else 1
        grid_DT = torch.zeros(self.num_depths, num_columns, device=values_N.device)
        grid_DT[self.depth_N, self.anchor_N] = values_N.float()
        return grid_DT


def reduce(losses: RowLosses, places: Places, loss_config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """One mean over all supervised elements, whatever their depth."""
    total = len(places.depth_N) + MASK_EPSILON
    loss = losses.loss_N.sum() / total
    metrics = {"loss": loss.detach(), **counted("loss", loss, 1.0)}
    if len(loss_config) > 1:
        for name in loss_config:
            metrics |= counted(f"{name}_loss", losses.terms[name].sum() / total, 1.0)
    return loss, metrics | accuracy(places.on_grid(losses.correct_N), places.on_grid(torch.ones_like(places.depth_N)))


def accuracy(correct_DT: Tensor, judged_DT: Tensor) -> dict[str, Tensor]:
    """Greedy agreement with the verifier: of all elements, of a depth, and (`full_acc_d`) of whole chains from their
    supervised column to depth d. Chains have no gaps, and which go on is drawn without regard to who is right, so that
    `full_acc_d` estimates the chance of d + 1 accepted drafts."""
    metrics = counted("full_acc", correct_DT.sum(), judged_DT.sum())
    chain_D, begun_D = correct_DT.cumprod(0).sum(1), judged_DT.cumprod(0).sum(1)
    for depth, (correct_T, judged_T) in enumerate(zip(correct_DT, judged_DT, strict=True)):
        metrics |= counted(f"position_{depth}_acc", correct_T.sum(), judged_T.sum())
        metrics |= counted(f"full_acc_{depth}", chain_D[depth], begun_D[depth])
    return metrics
