"""`DSparkDraftModel`: DFlash's weights and two heads, and the hooks of training and serving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculators.interfaces import TreeDrafter
from speculators.losses.registry import resolve_loss_config
from speculators.model import SpeculatorModel
from speculators.models.dflash import DFlashDraftModel
from speculators.models.dflash.blocks import PackedBatch
from speculators.models.dflash.training import DPACE_ALPHA, FIXED_DECAY, GAMMA, Objective
from speculators.models.dspark.arguments import TRAINING_DEFAULTS, DSparkTrainingArgs
from speculators.models.dspark.checkpoint import DSparkContract, pin_causality
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.models.dspark.heads import MARKOV_HEADS, ConfidenceHead, MarkovHead
from speculators.models.dspark.proposer import DSparkProposer, DSparkTreeDrafter
from speculators.models.dspark.training import (
    CONFIDENCE_ALPHA,
    CONFIDENCE_TARGET,
    TV,
    ConfidenceObjective,
    drafts_logits,
    train_forward,
)

DEFAULT_MAX_ANCHORS = 3072
"""Of `get_trainer_kwargs` called by hand; the command line gives its own."""


@SpeculatorModel.register("dspark")
class DSparkDraftModel(DFlashDraftModel):
    config_class = DSparkSpeculatorConfig
    contract = DSparkContract()
    training_args = DSparkTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    anchor_may_draft = True
    pin_causality = staticmethod(pin_causality)
    drafts_logits = staticmethod(drafts_logits)

    def __init__(self, config: DSparkSpeculatorConfig, **kwargs: Any):
        reads_markov = config.enable_confidence_head and config.confidence_head_with_markov
        if reads_markov and config.markov_rank == 0:
            raise ValueError(
                "confidence_head_with_markov=True with markov_rank=0: there is no Markov embedding to read; give a "
                "rank, or --no-confidence-head-with-markov"
            )
        super().__init__(config, **kwargs)
        size = self.hidden_size
        self.markov_head: MarkovHead | None = None
        if config.markov_rank:
            head_class = MARKOV_HEADS[config.markov_head_type]
            self.markov_head = head_class(self.verifier_vocab_size, self.draft_vocab_size, config.markov_rank, size)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            self.confidence_head = ConfidenceHead(size, config.markov_rank if reads_markov else 0)

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(
        cls,
        verifier_config: Any,
        *,
        markov_rank: int = DSparkTrainingArgs.model_fields["markov_rank"].default,
        markov_head_type: str = DSparkTrainingArgs.model_fields["markov_head_type"].default,
        enable_confidence_head: bool | None = None,
        confidence_head_with_markov: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        return {
            **super().config_values(verifier_config, **kwargs),
            "markov_rank": markov_rank,
            "markov_head_type": markov_head_type,
            "enable_confidence_head": True if enable_confidence_head is None else enable_confidence_head,
            "confidence_head_with_markov": (
                True if confidence_head_with_markov is None else confidence_head_with_markov
            ),
        }

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        train, _ = DFlashDraftModel.get_trainer_kwargs(**{"max_anchors": DEFAULT_MAX_ANCHORS, **kwargs})
        shared = {
            **train,
            "tv_loss_fn": resolve_loss_config(TV, kwargs.get("loss_implementation", "fused"))[TV][0],
            "confidence_head_alpha": kwargs.get("confidence_head_alpha", CONFIDENCE_ALPHA),
            "confidence_target": kwargs.get("confidence_target", CONFIDENCE_TARGET),
        }
        return shared, {**shared, "loss_config": dict(shared["loss_config"])}

    def train_on(
        self,
        row: PackedBatch,
        max_anchors: int | None,
        generator: torch.Generator | None,
        *,
        loss_config: Any = None,
        loss_fn: Any = None,
        gamma: float = GAMMA,
        per_position_loss_weight: str = FIXED_DECAY,
        dpace_alpha: float = DPACE_ALPHA,
        tv_loss_fn: Any = None,
        confidence_head_alpha: float = CONFIDENCE_ALPHA,
        confidence_target: str = CONFIDENCE_TARGET,
        **_: Any,
    ) -> tuple[None, Tensor, dict[str, Tensor]]:
        objective = Objective.of(
            loss_config,
            loss_fn,
            default_loss=TRAINING_DEFAULTS["loss_fn"],
            gamma=gamma,
            per_position_loss_weight=per_position_loss_weight,
            dpace_alpha=dpace_alpha,
        )
        confidence = ConfidenceObjective(confidence_head_alpha, confidence_target, tv_loss_fn)
        return train_forward(self, row, objective, confidence, max_anchors, generator)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> DSparkProposer:
        model = self.beside(verifier_model)
        assert isinstance(model, DSparkDraftModel)
        return DSparkProposer(
            model.network,
            model.target_layer_ids,
            model.d2t,
            model.verifier_vocab_size,
            model.markov_head,
            model.confidence_head,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def make_tree_drafter(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> TreeDrafter:
        sizes = {"max_batch_size": max_batch_size, "max_length": max_length}
        chain = self.make_proposer(verifier_model, **sizes)
        if chain.markov_head is None:
            return super().make_tree_drafter(verifier_model, **sizes)
        return DSparkTreeDrafter(chain, chain.markov_head, self.config.num_drafts)
