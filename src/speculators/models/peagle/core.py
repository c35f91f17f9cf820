"""`PEagleDraftModel`: EAGLE-3's weights and a learned state for masked slots; the hooks of training and serving.

Shapes: D = aux layers * H, H hidden size, V verifier vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from speculators.interfaces import LossOutput, PackedBatch, TreeDrafter
from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs, LossArgs
from speculators.models.draft_model import mask_token_of, resolve_mask_token_id
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.peagle.checkpoint import PEagleContract, write_fc_norm
from speculators.models.peagle.config import TRAINING_DEFAULTS, PEagleSpeculatorConfig, PEagleTrainingArgs
from speculators.models.peagle.network import PEagleNetwork
from speculators.models.peagle.proposer import PEagleProposer
from speculators.models.peagle.training import drafts_read, train_slots
from speculators.models.tree_drafting import SlotTreeDrafter
from speculators.nn.routes import Route
from speculators.training_keys import AnchorKeys


@SpeculatorModel.register("peagle")
class PEagleDraftModel(Eagle3DraftModel):
    """Owns the weights under the names of the checkpoint."""

    config_class = PEagleSpeculatorConfig  # type: ignore[assignment]
    contract = PEagleContract()
    training_args = PEagleTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    unread_keys = ("block_size",)
    chosen_anew = ("embed_requires_grad", "norm_output")  # the mask token's row is learnt; no state is fed back
    # by hand without max_anchors: every supervised column is a seed (the contract's `max_anchors=None`)
    called_by_hand: ClassVar[Mapping[str, Any]] = {"max_anchors": None}
    forward_keys: ClassVar[Mapping[str, str]] = {name: name for name in PEagleSpeculatorConfig.training_fields}
    # The embedding is trained: a checkpoint without it is incomplete, and loading says so.
    _keys_to_ignore_on_load_missing = [
        key for key in Eagle3DraftModel._keys_to_ignore_on_load_missing if key != "embed_tokens.weight"
    ]

    def __init__(self, config: PEagleSpeculatorConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))
        self.num_depths: int = config.training_value("num_depths")
        self.down_sample_ratio: float = config.training_value("down_sample_ratio")
        self.down_sample_ratio_min: float = config.training_value("down_sample_ratio_min")

    @property
    def network(self) -> PEagleNetwork:
        return PEagleNetwork(**vars(super().network), mask_token_id=self.mask_token_id, mask_hidden=self.mask_hidden)

    @property
    def mask_token_id(self) -> int:
        return mask_token_of(self.config)

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        values = super().config_values(layer_config, args)
        nested, verifier = values["transformer_layer_config"], args.verifier
        write_fc_norm(nested, values["fc_norm"])
        values["mask_token_id"] = resolve_mask_token_id(
            args.draft.mask_token_id, verifier.verifier_name_or_path, nested.vocab_size, verifier.trust_remote_code
        )
        return values

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        return args.own.num_depths

    @classmethod
    def trainer_keywords(cls, own: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        most = cls.generic_key(keys, AnchorKeys, "max_anchors")
        return {**super().trainer_keywords(own, keys), "max_anchors": most}

    def loss_args(self, keywords: Mapping[str, Any]) -> LossArgs[Any]:
        """What the call does not say is as the config of an older writer has it."""
        said = {name: value for name, value in keywords.items() if value is not None}
        return super().loss_args({**{name: getattr(self, name) for name in self.forward_keys}, **said})

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        return train_slots(self.network, batch, self.verifier_head, args)

    forward_without_targets = SpeculatorModel.forward_without_targets

    def drafts_read(self, batch: PackedBatch, num_drafts: int, attention: Route) -> Tensor:
        return drafts_read(self.network, batch, num_drafts, attention)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int) -> PEagleProposer:
        model = self.beside(verifier_model)
        return PEagleProposer(
            model.network.fused(),
            model.mask_token_id,
            model.mask_hidden,
            model.target_layer_ids,
            model.d2t,
            model.verifier_vocab_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> TreeDrafter:
        chain = self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        return SlotTreeDrafter.of_chain(chain)
