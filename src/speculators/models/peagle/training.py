"""Trains P-EAGLE: one forward over true columns and masked slots at once, nothing is fed back.

Shapes: T columns of the packed row, M slots, E = T + M elements, R queries among them, N supervised, S seeds,
H hidden size, D = aux layers * H.

    token      x0   x1   x2   x3   x4       column i after `shift_batch`: token x[i+1], state g[i], target y[i+1]
    state      g0   g1   g2   g3   g4
    column     .    0    1    2    3
    chain of column 0    .    1    2        slot (a, d): the mask token and the mask state at position a + d, taught
                                            P(x[a+d+2]) = head(norm(y[a+d+1])): the target of column a + d

A slot thus sees x up to a + 1 and drafts d tokens further than its anchor. Each sampled slot counts the same.

Which slots are trained (conditional-on-distribution sampling): fewer the deeper they lie.

    column       0   1   2   3   4   5        supervised: 1 .. 5
    depth 0      0   1   2   3   4   5        every column, with its true token and state
    depth 1          1   .   3   4   5        a share r of the seeds: slot at s, hanging on anchor s - 1
    depth 2              .   .   4   5        a share r^2, among the columns after those of depth 1: anchor s - 2

A slot at depth d continues one at depth d - 1, so a chain has no gaps. Columns a + 1 .. a + d of a chain are supervised
and of the anchor's document: a chain that began in another document would be taught what it cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speculators.interfaces import LossOutput, PackedBatch, Ratio
from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.metrics import ratio
from speculators.losses.registry import MASK_EPSILON, LossConfig
from speculators.model_training import LossArgs
from speculators.models.peagle.config import PEagleTrainingArgs
from speculators.models.peagle.network import ChainLayout, PEagleNetwork, chain_attention
from speculators.models.supervision import VerifierHead
from speculators.nn.flops import head_flop, layer_flop, product_flop, targets_flop
from speculators.nn.packed_row import drawn
from speculators.nn.routes import Route
from speculators.training_keys import default_of, read_keys


def train_slots(
    network: PEagleNetwork, batch: PackedBatch, verifier: VerifierHead, args: LossArgs[PEagleTrainingArgs]
) -> LossOutput:
    """Loss of the supervised columns and of sampled slots."""
    assert batch.last_hidden_TH is not None
    supervision = Supervision.of(batch, sample_chains(batch, args))
    hidden_RH = run_elements(network, batch, supervision, args.attention)
    place_N = supervision.supervised_R.nonzero().squeeze(1)
    depth_N, target_N = supervision.depth_R[place_N], supervision.target_R[place_N]
    targets, hidden_NH = verifier.targets(batch.last_hidden_TH), hidden_RH[on_device(place_N, hidden_RH)]
    losses = row_losses(hidden_NH, network.lm_head.weight, targets, target_N, args.loss_config)
    positions = ChainPositions.of(depth_N, target_N - depth_N, args.own.num_depths, hidden_RH)
    flop = model_flop(network, batch, verifier, supervision, target_N)
    return LossOutput(*reduce(losses, positions, args.loss_config), model_flop=flop)


def model_flop(
    network: PEagleNetwork, batch: PackedBatch, verifier: VerifierHead, supervision: Supervision, target_N: Tensor
) -> int:
    """Every column and slot is context of the layers before the last, which passes supervised columns and slots."""
    documents_T, (anchors_M, depths_M) = batch.host_document_ids_T, supervision.chains
    layout = ChainLayout(documents_T, anchors_M, depths_M, supervision.columns_C)
    num_elements = len(documents_T) + len(anchors_M)
    total = network.combine_flop(len(documents_T)) + product_flop(network.fc.weight, 1)  # the learned state of slots
    for number, (layer, window) in enumerate(zip(network.layers, network.windows, strict=True)):
        visible_E = layout.ranges(window).num_visible
        if number == len(network.layers) - 1:
            visible_E = visible_E[layout.query_elements_R]
        num_pairs = int(visible_E.sum())
        total += layer_flop(layer, num_queries=len(visible_E), num_keys=num_elements, num_pairs=num_pairs)
    total += head_flop(network.lm_head.weight, len(target_N))
    return total + targets_flop(verifier.lm_head.weight, target_N)


@dataclass(frozen=True)
class Supervision:
    """The elements that are queries: columns, then slots. On the host, where they are chosen."""

    columns_C: Tensor
    """Supervised columns (any one where there are none: it keeps the graph and gives loss 0)."""
    chains: Chains
    supervised_R: Tensor
    depth_R: Tensor
    target_R: Tensor
    """Column whose last state is the target."""

    @classmethod
    def of(cls, batch: PackedBatch, chains: Chains) -> Supervision:
        supervised_T = batch.host_supervised_T
        columns_C = supervised_T.nonzero().squeeze(1)
        if len(columns_C) == 0:
            columns_C = columns_C.new_zeros(1)
        target_R = torch.cat((columns_C, chains.anchors_M + chains.depths_M))
        depth_R = torch.cat((torch.zeros_like(columns_C), chains.depths_M))
        return cls(columns_C, chains, supervised_T[target_R], depth_R, target_R)


def on_device(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.to(like.device, non_blocking=True)


def run_elements(network: PEagleNetwork, batch: PackedBatch, supervision: Supervision, attention: Route) -> Tensor:
    """What the head reads of the queries: [R, H]."""
    assert batch.aux_TD is not None
    chosen = (*supervision.chains, supervision.columns_C)
    anchors_M, depths_M, columns_C = (on_device(part, batch.token_ids_T) for part in chosen)
    layout = ChainLayout(batch.document_ids_T, anchors_M, depths_M, columns_C)
    layer_attention = chain_attention(attention, layout, network.windows)
    token_ids_E = torch.cat((batch.token_ids_T, torch.full_like(anchors_M, network.mask_token_id)))
    slot_11H = network.combine(network.mask_hidden)
    hidden_1EH = torch.cat((network.combine(batch.aux_TD[None]), slot_11H.expand(-1, len(anchors_M), -1)), dim=1)
    positions_E = torch.cat((batch.position_ids_T, batch.position_ids_T[anchors_M] + depths_M))
    rope = network.rope.at(positions_E, torch.float32)
    return network.step(token_ids_E[None], hidden_1EH, rope, layer_attention).normed_BRH[0]


def drafts_read(network: PEagleNetwork, batch: PackedBatch, num_drafts: int, attention: Route) -> Tensor:
    """What the head reads in the places of the last K tokens of the batch: [K, H]. A column and its chain of slots."""
    column = torch.tensor([len(batch.token_ids_T) - num_drafts - 1])
    depths = torch.arange(1, num_drafts, device=column.device)
    chains = Chains(column.expand_as(depths), depths)
    queries = torch.cat((column, column + depths))
    supervision = Supervision(column, chains, torch.ones_like(queries), queries, queries)
    return run_elements(network, batch, supervision, attention)


class ChainPositions(NamedTuple):
    """Says where the supervised elements stand."""

    depth_N: Tensor
    anchor_N: Tensor
    num_depths: int
    num_columns: int

    @classmethod
    def of(cls, depth_N: Tensor, anchor_N: Tensor, num_depths: int, like: Tensor) -> ChainPositions:
        """Of what is on the host, on the device of `like`."""
        num_columns = int(anchor_N.max()) + 1 if len(anchor_N) else 1
        return cls(on_device(depth_N, like), on_device(anchor_N, like), num_depths, num_columns)

    def on_grid(self, values_N: Tensor) -> Tensor:
        """[depths, columns] by depth and anchor, zeros elsewhere."""
        grid_DT = torch.zeros(self.num_depths, self.num_columns, device=values_N.device)
        grid_DT[self.depth_N, self.anchor_N] = values_N.float()
        return grid_DT


def reduce(losses: RowLosses, positions: ChainPositions, loss_config: LossConfig) -> tuple[Tensor, dict[str, Ratio]]:
    """One mean over all supervised elements, whatever their depth."""
    total = len(positions.depth_N) + MASK_EPSILON
    loss = losses.loss_N.sum() / total
    metrics: dict[str, Ratio] = {}
    if len(loss_config) > 1:
        metrics = {f"{name}_loss": ratio(losses.terms[name].sum() / total) for name in loss_config}
    correct_DT = positions.on_grid(losses.correct_N)
    return loss, metrics | accuracy(correct_DT, positions.on_grid(torch.ones_like(positions.depth_N)))


def accuracy(correct_DT: Tensor, judged_DT: Tensor) -> dict[str, Ratio]:
    """Greedy agreement with the verifier: of all elements, of a depth, and (`full_acc_d`) of whole chains from their
    supervised column to depth d. Chains have no gaps, and which go on is drawn without regard to who is right, so that
    `full_acc_d` estimates the chance of d + 1 accepted drafts."""
    metrics = {"full_acc": ratio(correct_DT.sum(), judged_DT.sum())}
    chain_D, begun_D = correct_DT.cumprod(0).sum(1), judged_DT.cumprod(0).sum(1)
    for depth, (correct_T, judged_T) in enumerate(zip(correct_DT, judged_DT, strict=True)):
        metrics[f"position_{depth}_acc"] = ratio(correct_T.sum(), judged_T.sum())
        metrics[f"full_acc_{depth}"] = ratio(chain_D[depth], begun_D[depth])
    return metrics


class Chains(NamedTuple):
    """Sampled slots, by anchor and depth."""

    anchors_M: Tensor
    depths_M: Tensor


def sample_chains(batch: PackedBatch, args: LossArgs[PEagleTrainingArgs]) -> Chains:
    """Drawn on the host, so that every device trains on the same slots."""
    return draw_chains(batch.host_supervised_T, batch.host_document_ids_T, args.own, args.max_anchors, args.generator)


def draw_chains(
    supervised_T: Tensor,
    documents_T: Tensor,
    own: PEagleTrainingArgs,
    max_anchors: int | None,
    generator: torch.Generator | None,
) -> Chains:
    continues_T = supervised_T.clone()  # the column may follow the one before it in a chain
    continues_T[:1] = False
    continues_T[1:] &= documents_T[1:] == documents_T[:-1]
    seeds_S = drawn(supervised_T.nonzero().squeeze(1), max_anchors, generator)
    anchors, depths = [seeds_S[:0]], [seeds_S[:0]]
    candidates = seeds_S[continues_T[seeds_S]]
    for depth in range(1, own.num_depths):
        num_slots = int(max(0, len(seeds_S) - depth) * max(own.down_sample_ratio**depth, own.down_sample_ratio_min))
        if num_slots <= 0:
            break
        columns = drawn(candidates, num_slots, generator)
        anchors.append(columns - depth)
        depths.append(torch.full_like(columns, depth))
        following = columns + 1
        following = following[following < len(supervised_T)]
        candidates = following[continues_T[following]]
    anchors_M, depths_M = torch.cat(anchors), torch.cat(depths)
    order_M = (anchors_M * own.num_depths + depths_M).argsort()
    return Chains(anchors_M[order_M], depths_M[order_M])


def generate_cod_sample_indices(
    seq_length: int,
    loss_mask: Tensor,
    num_depths: int = default_of(PEagleTrainingArgs, "num_depths"),
    down_sample_ratio: float = default_of(PEagleTrainingArgs, "down_sample_ratio"),
    down_sample_ratio_min: float = default_of(PEagleTrainingArgs, "down_sample_ratio_min"),
    filter_position_zero: bool = True,
    max_anchors: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples the elements of one document, as above: (anchor, depth) of each, int64 [E]; depth 0 first, whole.

    `loss_mask` [S] or [1, S]. Drawn by torch's global generator. No chain begins before the document, so column 0 is
    never in one: upstream samples it at depth 1, with anchor -1. Raises `ValueError` for a mask of another length, for
    settings outside their ranges and for `filter_position_zero=False`.
    """
    if not filter_position_zero:
        raise ValueError(
            "filter_position_zero=False: column 0 follows no column, so no chain can hold it; leave it out"
        )
    supervised_S = loss_mask.flatten() == 1
    if len(supervised_S) != seq_length:
        raise ValueError(f"loss_mask has {len(supervised_S)} columns and seq_length={seq_length}: one for each")
    ratios = {"down_sample_ratio": down_sample_ratio, "down_sample_ratio_min": down_sample_ratio_min}
    own = read_keys(PEagleTrainingArgs, {"num_depths": num_depths, **ratios})
    host_S = supervised_S.cpu()
    anchors_M, depths_M = draw_chains(host_S, torch.zeros_like(host_S, dtype=torch.int64), own, max_anchors, None)
    order_M = depths_M.argsort(stable=True)
    columns_S = torch.arange(seq_length)
    anchors_E = torch.cat((columns_S, anchors_M[order_M]))
    depths_E = torch.cat((torch.zeros_like(columns_S), depths_M[order_M]))
    return anchors_E.to(loss_mask.device), depths_E.to(loss_mask.device)
