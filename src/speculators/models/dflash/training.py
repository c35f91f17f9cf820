"""How DFlash learns: blocks of masked slots at sampled anchors, all filled in one forward, the tokens before them true.

Shapes: P blocks, S slots a block, N supervised slots, H hidden size, V draft vocabulary. Alignment: see `blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speculators.losses.chunked import RowLosses, row_losses
from speculators.losses.chunks import HeadTargets
from speculators.losses.metrics import counted
from speculators.losses.registry import MASK_EPSILON, LossConfig, choose_loss_config
from speculators.losses.weights import dflash_loss_decay, dpace_loss_decay
from speculators.models.dflash.arguments import TRAINING_DEFAULTS, DFlashTrainingArgs
from speculators.models.dflash.block_attention import ContextKV, block_attention_class
from speculators.models.dflash.blocks import Blocks, PackedBatch, choose_blocks, validation_generator
from speculators.models.dflash.network import DFlashNetwork
from speculators.models.draft_layers import attention_of

if TYPE_CHECKING:
    from speculators.models.dflash.core import DFlashDraftModel

FIXED_DECAY, DPACE = "fixed-exp-decay", "dpace"
DEFAULT_MAX_ANCHORS = 512
"""Of forwards called by hand; the command line gives its own."""
GAMMA = DFlashTrainingArgs.model_fields["dflash_decay_gamma"].default
DPACE_ALPHA = DFlashTrainingArgs.model_fields["dpace_alpha"].default


@dataclass(frozen=True)
class Objective:
    """What a forward minimises."""

    loss_config: LossConfig
    gamma: float = GAMMA
    per_position_loss_weight: str = FIXED_DECAY
    dpace_alpha: float = DPACE_ALPHA

    @classmethod
    def of(
        cls,
        loss_config: LossConfig | None,
        loss_fn: Any,
        *,
        default_loss: Any = TRAINING_DEFAULTS["loss_fn"],
        gamma: float = GAMMA,
        per_position_loss_weight: str = FIXED_DECAY,
        dpace_alpha: float = DPACE_ALPHA,
    ) -> Objective:
        config = choose_loss_config(loss_config, loss_fn, default_loss)
        check_weighting(per_position_loss_weight, dpace_alpha, config)
        return cls(config, gamma, per_position_loss_weight, dpace_alpha)

    def fixed_weights(self, blocks: Blocks) -> Tensor | None:
        """[P, S] weights that do not depend on the losses, if they do not."""
        if self.per_position_loss_weight != FIXED_DECAY:
            return None
        return dflash_loss_decay(blocks.slot_index_PS, self.gamma, blocks.first_slot == 0)

    def weights(self, blocks: Blocks, loss_PS: Tensor) -> Tensor:
        """[P, S]; never carries gradient."""
        fixed_PS = self.fixed_weights(blocks)
        if fixed_PS is not None:
            return fixed_PS
        weights = dpace_loss_decay(
            blocks.slot_index_PS.flatten(),
            blocks.counts_PS.flatten(),
            blocks.layout.block_size,
            self.dpace_alpha,
            loss_PS.detach().flatten(),
        )
        return weights.view_as(loss_PS)


def check_weighting(per_position_loss_weight: str, dpace_alpha: float, loss_config: LossConfig) -> None:
    if per_position_loss_weight not in (FIXED_DECAY, DPACE):
        raise ValueError(
            f"per_position_loss_weight={per_position_loss_weight!r} is unknown; use {FIXED_DECAY!r} or {DPACE!r}"
        )
    if per_position_loss_weight == DPACE and list(loss_config) != ["ce"]:
        raise ValueError(
            f"per_position_loss_weight='dpace' takes the loss for -log of the chance to be right, which only ce is: "
            f"with {sorted(loss_config)} use --per-position-loss-weight {FIXED_DECAY}, or --loss-fn ce"
        )
    if not 0.0 < dpace_alpha <= 1.0:
        raise ValueError(f"dpace_alpha={dpace_alpha} must be in (0, 1]")


@dataclass(frozen=True)
class Filled:
    """A training forward up to the head."""

    row: PackedBatch
    blocks: Blocks
    hidden_PSH: Tensor

    @property
    def hidden_NH(self) -> Tensor:
        return self.hidden_PSH[self.blocks.counts_PS]

    @property
    def target_index_N(self) -> Tensor:
        return self.blocks.target_index_PS[self.blocks.counts_PS]


def fill_blocks(
    model: DFlashDraftModel, row: PackedBatch, max_anchors: int | None, generator: torch.Generator | None
) -> Filled:
    config = model.config
    if generator is None and not model.training:
        generator = validation_generator()
    most = max_anchors or config.max_anchors or DEFAULT_MAX_ANCHORS
    return fill(model, row, choose_blocks(row, config.block_size, config.first_slot, most, generator))


def fill(model: DFlashDraftModel, row: PackedBatch, blocks: Blocks) -> Filled:
    attention = attention_of(model.config)
    return Filled(row, blocks, run_blocks(model.network, row, blocks, attention))


def drafts_logits(model: DFlashDraftModel, filled: Filled) -> Tensor:
    """[S, D] of the slots of a single block."""
    return model.lm_head(filled.hidden_PSH[0])


def run_blocks(network: DFlashNetwork, row: PackedBatch, blocks: Blocks, attention: str | None) -> Tensor:
    """What the head reads, [P, S, H]."""
    context_CH = network.context(row.features_CD)
    context_rope = network.rope.at(row.position_ids_T[: len(context_CH)], torch.float32)
    attend_class = block_attention_class(attention, context_CH.device)
    layer_attention = []
    for layer, layer_mask in zip(network.layers, network.layer_masks, strict=True):
        key_1CGd, value_1CGd = layer.self_attn.project_kv(context_CH[None], context_rope)  # type: ignore[operator]
        layer_attention.append(attend_class(blocks.layout, layer_mask, ContextKV(key_1CGd[0], value_1CGd[0])))
    token_ids_PS = network.blocks(row.token_ids_T[blocks.anchors_P], blocks.layout.block_size)
    return network.forward(token_ids_PS, network.rope.at(blocks.positions_PS(row), torch.float32), layer_attention)


def targets_of(model: DFlashDraftModel, row: PackedBatch) -> HeadTargets:
    return HeadTargets(model.verifier_norm(row.last_hidden_CH), model.verifier_lm_head.weight, *model.target_transform)


def train_forward(
    model: DFlashDraftModel,
    row: PackedBatch,
    objective: Objective,
    max_anchors: int | None,
    generator: torch.Generator | None,
) -> tuple[None, Tensor, dict[str, Tensor]]:
    filled = fill_blocks(model, row, max_anchors, generator)
    losses = row_losses(
        filled.hidden_NH, model.lm_head.weight, targets_of(model, row), filled.target_index_N, objective.loss_config
    )
    return None, *reduce(losses, filled.blocks, objective)


def on_grid(values_N: Tensor, counts_PS: Tensor) -> Tensor:
    """Values of the supervised slots at their places, zeros elsewhere: [P, S]."""
    return values_N.new_zeros(counts_PS.shape).masked_scatter(counts_PS, values_N)


def reduce(losses: RowLosses, blocks: Blocks, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    """sum(loss * weight) / (supervised slots + eps); the weights are not in the denominator."""
    counts_PS = blocks.counts_PS
    total = counts_PS.sum() + MASK_EPSILON
    loss_PS = on_grid(losses.loss_N, counts_PS)
    weight_PS = objective.weights(blocks, loss_PS)
    loss = (loss_PS * weight_PS).sum() / total
    metrics = {"loss": loss.detach(), **counted("loss", loss, 1.0)}
    if len(objective.loss_config) > 1:
        for name in objective.loss_config:
            term = (on_grid(losses.terms[name], counts_PS) * weight_PS).sum() / total
            metrics |= counted(f"{name}_loss", term, 1.0)
    return loss, metrics | accuracy(losses, blocks)


def accuracy(losses: RowLosses, blocks: Blocks) -> dict[str, Tensor]:
    """Greedy agreement with the verifier: by slot, over all slots, and as tokens a round (`eal`)."""
    counts_PS = blocks.counts_PS
    correct_PS = on_grid(losses.correct_N, counts_PS)
    metrics = counted("full_acc", correct_PS.sum(), counts_PS.sum())
    for k in range(blocks.first_slot, blocks.layout.block_size):
        metrics |= counted(f"position_{k}_acc", correct_PS[:, k].sum(), counts_PS[:, k].sum())
    return metrics | mean_length("eal", correct_PS.float(), blocks)


def mean_length(name: str, kept_PS: Tensor, blocks: Blocks) -> dict[str, Tensor]:
    """Mean over the blocks with a supervised slot of 1 + sum_k prod_{j <= k} kept_j; the bonus token is the 1."""
    is_judged_P = blocks.counts_PS.any(1)
    run_P = 1.0 + kept_PS[:, blocks.first_slot :].cumprod(1).sum(1)
    return counted(name, (run_P * is_judged_P).sum(), is_judged_P.sum())
