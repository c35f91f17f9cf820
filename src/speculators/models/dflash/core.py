"""`DFlashDraftModel`: the weights under the names of the checkpoint, and the hooks of training and serving.

Shapes: D = aux layers * H, H hidden size, V verifier vocabulary. What is computed with the weights is in `network`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from speculators.interfaces import LossOutput, PackedBatch, TreeDrafter, VerifierStates
from speculators.losses.registry import LossConfig
from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs, LossArgs
from speculators.models.dflash.checkpoint import DFlashContract, complete_block_config, pin_causality
from speculators.models.dflash.config import (
    CALLED_BY_HAND,
    TRAINING_DEFAULTS,
    DFlashSpeculatorConfig,
    DFlashTrainingArgs,
    check_buildable,
)
from speculators.models.dflash.network import BlockDecoderLayer, DFlashNetwork
from speculators.models.dflash.proposer import DFlashProposer
from speculators.models.dflash.training import (
    BlockArgs,
    BlockOutput,
    check_weighting,
    drafts_logits,
    fill_blocks,
    last_block,
    train_blocks,
)
from speculators.models.draft_model import DraftModel, mask_token_of, resolve_mask_token_id
from speculators.models.supervision import VerifierHead
from speculators.models.tree_drafting import SlotTreeDrafter
from speculators.nn.decoder import DecoderLayer
from speculators.nn.draft_tokens import logits_over_verifier
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope
from speculators.training_keys import AnchorKeys, default_of
from speculators.verifier.config import resolve_target_layer_ids

logger = logging.getLogger(__name__)


@SpeculatorModel.register("dflash")
class DFlashDraftModel(DraftModel):
    """Owns the weights under the names of the checkpoint."""

    config_class: type[DFlashSpeculatorConfig] = DFlashSpeculatorConfig
    contract = DFlashContract()
    training_args: ClassVar[type[BaseModel]] = DFlashTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    layer_methods = ("project_context",)
    recorded_keys: ClassVar[Mapping[str, str]] = {"target_layer_ids": "aux_hidden_state_layer_ids"}
    called_by_hand: ClassVar[Mapping[str, Any]] = CALLED_BY_HAND
    forward_keys: ClassVar[Mapping[str, str]] = {
        "dflash_decay_gamma": "gamma",
        "per_position_loss_weight": "per_position_loss_weight",
        "dpace_alpha": "dpace_alpha",
    }
    forward_columns = (
        "hidden_states",
        "input_ids",
        "loss_mask",
        "verifier_last_hidden_states",
        "document_ids",
        "position_ids",
    )
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
        return mask_token_of(self.config)

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
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        own, draft, verifier = args.own, args.draft, args.verifier.verifier_name_or_path
        trust_remote_code = args.verifier.trust_remote_code
        nested = complete_block_config(layer_config)
        cls.pin_causality(nested, own.sliding_window_non_causal)
        args.choose_attention(nested)
        return {
            "transformer_layer_config": nested,
            "draft_vocab_size": draft.draft_vocab_size or nested.vocab_size,
            "block_size": draft.block_size,
            "aux_hidden_state_layer_ids": resolve_target_layer_ids(
                draft.target_layer_ids, verifier, trust_remote_code=trust_remote_code
            ),
            "mask_token_id": resolve_mask_token_id(draft.mask_token_id, verifier, nested.vocab_size, trust_remote_code),
            "sliding_window_non_causal": own.sliding_window_non_causal,
            "sample_from_anchor": own.sample_from_anchor,
        }

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        return max(1, args.draft.block_size - (not args.own.sample_from_anchor))

    pin_causality = staticmethod(pin_causality)
    """Make the mask that is trained the mask that is served."""

    @classmethod
    def check_loss(cls, own: Any, loss_config: LossConfig) -> None:
        check_weighting(own, loss_config)

    @classmethod
    def trainer_keywords(cls, own: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        most = cls.generic_key(keys, AnchorKeys, "max_anchors")
        return {**super().trainer_keywords(own, keys), "max_anchors": most}

    def loss_args(self, keywords: Mapping[str, Any]) -> BlockArgs[Any]:
        args = super().loss_args(keywords)
        most = args.max_anchors or self.config.max_anchors or default_of(AnchorKeys, "max_anchors")
        return BlockArgs(**{**vars(args), "max_anchors": most}, block_size=self.config.block_size)

    @property
    def verifier_head(self) -> VerifierHead:
        return VerifierHead(self.verifier_norm, self.verifier_lm_head, self.target_transform, self.outside_head())

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        assert isinstance(args, BlockArgs)
        return train_blocks(self.network, batch, self.verifier_head, args)

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor:
        batch, first_slot = self.packed_batch(**self.training_row(states)), self.config.first_slot
        blocks = last_block(batch, num_drafts, first_slot)
        output = fill_blocks(self.network, batch, blocks, self.attention_route(self.device.type))
        return logits_over_verifier(self.drafts_logits(output)[first_slot:], self.t2d)

    def drafts_logits(self, output: BlockOutput) -> Tensor:
        return drafts_logits(self.network, output)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int) -> DFlashProposer:
        model = self.beside(verifier_model)
        return DFlashProposer(
            model.network,
            model.target_layer_ids,
            model.d2t,
            model.verifier_vocab_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> TreeDrafter:
        """Slots do not see each other's tokens: the candidates of a slot are the same below all nodes before it."""
        chain = self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        return SlotTreeDrafter.of_chain(chain, max_depth=self.config.num_drafts)
