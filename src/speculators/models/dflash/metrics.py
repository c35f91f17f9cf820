"""Computes the loss and metrics of blocks from logits, and samples anchors from a mask: what training does, as pure
functions of tensors that the contract names.

Shapes: P blocks, S slots per block, T = P * S slots in order, N supervised slots, V draft vocabulary, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.losses.chunked import RowLosses
from speculators.losses.metrics import as_pairs, ratio
from speculators.losses.registry import LossConfig, resolve_loss_config
from speculators.models.dflash.block_attention import BlockLayout
from speculators.models.dflash.config import FIXED_DECAY, DFlashTrainingArgs
from speculators.models.dflash.training import BlockArgs, Blocks, check_weighting, reduce, slot_columns
from speculators.nn.packed_row import drawn
from speculators.nn.routes import DENSE
from speculators.training_keys import LossKeys, default_of, read_keys


def compute_metrics(
    logits: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    block_size: int | None = None,
    gamma: float = default_of(DFlashTrainingArgs, "dflash_decay_gamma"),
    loss_config: LossConfig | None = None,
    per_position_loss_weight: str | None = None,
    dpace_alpha: float = default_of(DFlashTrainingArgs, "dpace_alpha"),
    sample_from_anchor: bool = default_of(DFlashTrainingArgs, "sample_from_anchor"),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, metrics as `X_sum` and `X_total`) as training computes them. None is one slot a block,
    the loss `kl_div` and the fixed decay.

    `logits`, `targets` [1, T, V]; `loss_mask` [1, T]. Slot 0 never counts unless `sample_from_anchor`. Raises
    `ValueError` when blocks do not divide T, and for settings outside their ranges.
    """
    given = {
        "dflash_decay_gamma": gamma,
        "per_position_loss_weight": per_position_loss_weight or FIXED_DECAY,
        "dpace_alpha": dpace_alpha,
        "sample_from_anchor": sample_from_anchor,
    }
    own = read_keys(DFlashTrainingArgs, given)
    config = loss_config or resolve_loss_config(default_of(LossKeys, "loss_fn"))
    blocks = blocks_of(loss_mask, 1 if block_size is None else block_size, 0 if sample_from_anchor else 1)
    losses = losses_of(logits, targets, blocks, config)
    loss, metrics = reduce(losses, blocks, args_of(own, config, blocks))
    return loss, as_pairs({"loss": ratio(loss), **metrics})


def blocks_of(loss_mask: Tensor, block_size: int, first_slot: int) -> Blocks:
    """Makes blocks of T slots that stand side by side; they know their places and what is supervised, no anchors."""
    num_slots = loss_mask.numel()
    if block_size < 1 or num_slots % block_size:
        raise ValueError(f"{num_slots} slots do not divide into blocks of block_size={block_size}; pad to a multiple")
    supervised_PS = loss_mask.reshape(-1, block_size).bool()
    supervised_PS = supervised_PS & (torch.arange(block_size, device=loss_mask.device) >= first_slot)
    columns_PS = torch.arange(num_slots, device=loss_mask.device).view_as(supervised_PS)
    layout = BlockLayout(columns_PS[:, 0], columns_PS[:, 0], block_size)
    place_N = supervised_PS.flatten().nonzero().squeeze(1)
    return Blocks(layout, columns_PS, supervised_PS, first_slot, place_N, place_N, layout)


def losses_of(logits: Tensor, targets: Tensor, blocks: Blocks, loss_config: LossConfig) -> RowLosses:
    """Computes the losses of the supervised slots."""
    draft_NV, target_NV = (values.flatten(0, -2)[blocks.place_N] for values in (logits, targets))
    terms = {name: function(draft_NV, target_NV) for name, (function, _) in loss_config.items()}
    loss_N = torch.stack([weight * terms[name] for name, (_, weight) in loss_config.items()]).sum(0)
    detached = {name: term_N.detach() for name, term_N in terms.items()}
    draft_ids_N, target_ids_N = draft_NV.argmax(-1), target_NV.argmax(-1)
    return RowLosses(loss_N, detached, draft_ids_N, target_ids_N, torch.zeros_like(draft_ids_N, dtype=torch.bool))


def args_of(own: DFlashTrainingArgs, loss_config: LossConfig, blocks: Blocks) -> BlockArgs[DFlashTrainingArgs]:
    check_weighting(own, loss_config)
    size = blocks.layout.block_size
    return BlockArgs(own, loss_config, DENSE, max_anchors=len(blocks.anchors_P), generator=None, block_size=size)


def get_base_indices_for_anchored_blocks(anchor_positions: Tensor, block_size: int) -> Tensor:
    """Lists the columns [P * S] that the slots of blocks at `anchor_positions` ([P] or [1, P]) stand at."""
    return slot_columns(anchor_positions.flatten().long(), block_size).flatten()


def select_anchors(loss_mask: Tensor, num_anchors: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Draws (anchors, which are real), [num_anchors] each: supervised columns outside the last `block_size`, ascending,
    by torch's global generator; anchor 0 fills the rest. `loss_mask` [C] or [1, C].

    Training itself (`training.choose_blocks`) also leaves out anchors whose block has nothing to teach.
    """
    may_anchor_C = loss_mask.flatten().bool().clone()
    may_anchor_C[max(0, len(may_anchor_C) - block_size) :] = False
    chosen = drawn(may_anchor_C.nonzero().squeeze(1).cpu(), num_anchors).to(loss_mask.device)
    anchors = chosen.new_zeros(num_anchors)
    anchors[: len(chosen)] = chosen
    return anchors, torch.arange(num_anchors, device=loss_mask.device) < len(chosen)
