"""`DSparkDraftModel`: DFlash's weights and two heads, and the hooks of training and serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from speculators.interfaces import LossOutput, PackedBatch, TreeDrafter
from speculators.losses.registry import resolve_loss_config, resolve_loss_fn
from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs, LossArgs
from speculators.models.dflash import DFlashDraftModel
from speculators.models.dflash.training import BlockOutput
from speculators.models.dspark.checkpoint import DSparkContract, pin_causality
from speculators.models.dspark.config import (
    CALLED_BY_HAND,
    TRAINING_DEFAULTS,
    DSparkSpeculatorConfig,
    DSparkTrainingArgs,
)
from speculators.models.dspark.network import MARKOV_HEADS, ConfidenceHead, DSparkNetwork, MarkovHead
from speculators.models.dspark.proposer import DSparkProposer, DSparkTreeDrafter
from speculators.models.dspark.training import TV, DSparkArgs, drafts_logits, train_blocks_and_heads
from speculators.training_keys import LossKeys


@SpeculatorModel.register("dspark")
class DSparkDraftModel(DFlashDraftModel):
    config_class = DSparkSpeculatorConfig
    contract = DSparkContract()
    training_args = DSparkTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    called_by_hand: ClassVar[Mapping[str, Any]] = CALLED_BY_HAND
    forward_keys: ClassVar[Mapping[str, str]] = {
        **DFlashDraftModel.forward_keys,
        "confidence_head_alpha": "confidence_head_alpha",
        "confidence_target": "confidence_target",
    }
    anchor_may_draft = True
    pin_causality = staticmethod(pin_causality)

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

    @property
    def network(self) -> DSparkNetwork:
        return DSparkNetwork(
            **vars(super().network), markov_head=self.markov_head, confidence_head=self.confidence_head
        )

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        heads = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
        return {**super().config_values(layer_config, args), **{name: getattr(args.own, name) for name in heads}}

    @classmethod
    def trainer_keywords(cls, own: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        implementation = cls.generic_key(keys, LossKeys, "loss_implementation")
        tv_loss_fn, _ = resolve_loss_config(TV, implementation)[TV]
        return {**super().trainer_keywords(own, keys), "tv_loss_fn": tv_loss_fn}

    def loss_args(self, keywords: Mapping[str, Any]) -> DSparkArgs:
        return DSparkArgs(
            **vars(super().loss_args(keywords)), tv_loss_fn=keywords.get("tv_loss_fn") or resolve_loss_fn(TV)
        )

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        assert isinstance(args, DSparkArgs)
        return train_blocks_and_heads(self.network, batch, self.verifier_head, args)

    def drafts_logits(self, output: BlockOutput) -> Tensor:
        return drafts_logits(self.network, output)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int) -> DSparkProposer:
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

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> TreeDrafter:
        sizes = {"max_batch_size": max_batch_size, "max_length": max_length}
        chain = self.make_proposer(verifier_model, **sizes)
        if chain.markov_head is None:
            return super().make_tree_drafter(verifier_model, **sizes)
        return DSparkTreeDrafter(chain, chain.markov_head, self.config.num_drafts)
