"""`DFlashDraftModel`: the weights under the names of the checkpoint, and the hooks of training and serving.

Shapes: D = aux layers * H, H hidden size, V verifier vocabulary. What is computed with the weights is in `network`.
"""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from speculators.interfaces import TreeDrafter, VerifierStates
from speculators.losses.registry import loss_keywords
from speculators.model import SpeculatorModel
from speculators.models.dflash.arguments import TRAINING_DEFAULTS, DFlashTrainingArgs
from speculators.models.dflash.blocks import PackedBatch, last_block
from speculators.models.dflash.checkpoint import DFlashContract, complete_block_config, pin_causality
from speculators.models.dflash.config import DFlashSpeculatorConfig, check_buildable
from speculators.models.dflash.network import BlockDecoderLayer, DFlashNetwork
from speculators.models.dflash.proposer import DFlashProposer
from speculators.models.dflash.training import (
    DEFAULT_MAX_ANCHORS,
    DPACE_ALPHA,
    FIXED_DECAY,
    GAMMA,
    Objective,
    check_weighting,
    drafts_logits,
    fill,
    train_forward,
)
from speculators.models.draft_model import DraftModel
from speculators.models.tree_drafting import SlotTreeDrafter
from speculators.nn.decoder import DecoderLayer
from speculators.nn.draft_vocab import logits_over_verifier
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope
from speculators.verifier.config import make_speculators_config, resolve_mask_token_id, resolve_target_layer_ids

logger = logging.getLogger(__name__)


@SpeculatorModel.register("dflash")
class DFlashDraftModel(DraftModel):
    """Owns the weights under the names of the checkpoint."""

    config_class: type[DFlashSpeculatorConfig] = DFlashSpeculatorConfig
    contract = DFlashContract()
    training_args: ClassVar[type[BaseModel]] = DFlashTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    anchor_may_draft = False
    """Whether serving engines accept `sample_from_anchor`."""

    def __init__(self, config: DFlashSpeculatorConfig, **kwargs: Any):
        check_buildable(config)
        super().__init__(config, **kwargs)
        nested = config.transformer_layer_config
        size, eps = nested.hidden_size, nested.rms_norm_eps
        self.block_size = config.block_size
        self.fc = nn.Linear(len(self.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList([BlockDecoderLayer(nested, i) for i in range(nested.num_hidden_layers)])
        self.norm = RMSNorm(size, eps)
        self.verifier_norm = RMSNorm(size, eps)
        self.verifier_norm.requires_grad_(False)
        verifiers_own = ["embed_tokens.weight"] if self.use_draft_vocab else ["embed_tokens.weight", "lm_head.weight"]
        self._keys_to_ignore_on_save = [*verifiers_own, *type(self)._keys_to_ignore_on_save]
        if config.sample_from_anchor and not self.anchor_may_draft:
            logger.warning("sample_from_anchor=True: vLLM refuses it for '%s'", config.speculators_model_type)
        self.post_init()

    @property
    def network(self) -> DFlashNetwork:
        config = self.config
        return DFlashNetwork(
            self.embed_tokens,
            self.fc,
            self.hidden_norm,
            cast("list[DecoderLayer]", list(self.layers)),
            self.norm,
            self.lm_head,
            Rope(config.transformer_layer_config),
            config.layer_masks,
            self.mask_token_id,
            config.first_slot,
        )

    @property
    def target_layer_ids(self) -> list[int]:
        return list(self.config.aux_hidden_state_layer_ids)

    @property
    def mask_token_id(self) -> int:
        if self.config.mask_token_id is None:
            raise ValueError("mask_token_id is not set, so masked slots have no token; set it in config.json")
        return self.config.mask_token_id

    def load_verifier_weights(self) -> None:
        """The embedding, and the head of the whole vocabulary, are the verifier's even where a checkpoint has them."""
        path = self.config.recorded_verifier
        if path is not None:
            nn.init.constant_(self.embed_tokens.weight, math.nan)
            if not self.use_draft_vocab:
                nn.init.constant_(self.lm_head.weight, math.nan)
        super().load_verifier_weights()

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(  # type: ignore[override]
        cls,
        verifier_config: Any,
        *,
        draft_vocab_size: int | None,
        verifier_name_or_path: str,
        block_size: int | None = None,
        mask_token_id: int | None = None,
        sliding_window_non_causal: bool = False,
        sample_from_anchor: bool | None = None,
        target_layer_ids: list[int] | None = None,
        draft_attn_impl: str | None = None,
        trust_remote_code: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Config fields of a new drafter from what the command line knows."""
        fields = cls.config_class.model_fields
        nested = complete_block_config(verifier_config)
        cls.pin_causality(nested, sliding_window_non_causal)
        if draft_attn_impl is not None:
            nested._attn_implementation = draft_attn_impl
        if block_size is None:
            block_size = fields["block_size"].default
        if sample_from_anchor is None:
            sample_from_anchor = fields["sample_from_anchor"].default
        return {
            "transformer_layer_config": nested,
            "draft_vocab_size": draft_vocab_size or nested.vocab_size,
            "block_size": block_size,
            "aux_hidden_state_layer_ids": resolve_target_layer_ids(
                target_layer_ids, verifier_name_or_path, trust_remote_code=trust_remote_code
            ),
            "mask_token_id": resolve_mask_token_id(
                mask_token_id, verifier_name_or_path, nested.vocab_size, trust_remote_code
            ),
            "sliding_window_non_causal": sliding_window_non_causal,
            "sample_from_anchor": sample_from_anchor,
            "speculators_config": make_speculators_config(
                fields["speculators_model_type"].default,
                max(1, block_size - (not sample_from_anchor)),
                verifier_name_or_path,
                trust_remote_code,
            ),
        }

    pin_causality = staticmethod(pin_causality)
    """Make the mask that is trained the mask that is served."""

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {
            **loss_keywords(**kwargs),
            "gamma": kwargs.get("dflash_decay_gamma", GAMMA),
            "max_anchors": kwargs.get("max_anchors", DEFAULT_MAX_ANCHORS),
            "per_position_loss_weight": kwargs.get("per_position_loss_weight", FIXED_DECAY),
            "dpace_alpha": kwargs.get("dpace_alpha", DPACE_ALPHA),
        }
        check_weighting(shared["per_position_loss_weight"], shared["dpace_alpha"], shared["loss_config"])
        return shared, {**shared, "loss_config": dict(shared["loss_config"])}

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        loss_mask: Tensor | None = None,
        verifier_last_hidden_states: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        max_anchors: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """(None, loss, metrics). Anchors are drawn by `generator` (None: torch's own in training, the same ones every
        time in evaluation). Of the other keywords, those of `train_on` count; the rest of the batch is ignored."""
        row = PackedBatch.of(
            hidden_states, input_ids, loss_mask, verifier_last_hidden_states, document_ids, position_ids
        )
        return self.train_on(row, max_anchors, generator, **kwargs)

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
        **_: Any,
    ) -> tuple[None, Tensor, dict[str, Tensor]]:
        objective = Objective.of(
            loss_config,
            loss_fn,
            gamma=gamma,
            per_position_loss_weight=per_position_loss_weight,
            dpace_alpha=dpace_alpha,
        )
        return train_forward(self, row, objective, max_anchors, generator)

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor:
        batch = self.training_row(states)
        row = PackedBatch.of(
            batch["hidden_states"],
            batch["input_ids"],
            batch["loss_mask"],
            batch["verifier_last_hidden_states"],
            batch["document_ids"],
            batch["position_ids"],
        )
        first_slot = self.config.first_slot
        filled = fill(self, row, last_block(row, num_drafts, first_slot))
        return logits_over_verifier(self.drafts_logits(self, filled)[first_slot:], self.t2d)

    drafts_logits: ClassVar[Any] = staticmethod(drafts_logits)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> DFlashProposer:
        model = self.beside(verifier_model)
        return DFlashProposer(
            model.network,
            model.target_layer_ids,
            model.d2t,
            model.verifier_vocab_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def make_tree_drafter(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> TreeDrafter:
        """Slots do not see each other's tokens: the candidates of a slot are the same below all nodes before it."""
        chain = self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        return SlotTreeDrafter(
            chain.slot_log_probs,
            chain.capture,
            max_depth=self.config.num_drafts,
            d2t=chain.d2t,
            verifier_vocab_size=chain.verifier_vocab_size,
        )
