"""`PEagleDraftModel`: EAGLE-3's weights and a learned state for masked slots; the hooks of training and serving.

Shapes: D = aux layers * H, H hidden size, V verifier vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from speculators.interfaces import TreeDrafter
from speculators.losses.registry import choose_loss_config, loss_keywords
from speculators.model import SpeculatorModel
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.eagle3.training import PackedBatch
from speculators.models.peagle.arguments import TRAINING_DEFAULTS, PEagleTrainingArgs
from speculators.models.peagle.checkpoint import PEagleContract, write_fc_norm
from speculators.models.peagle.config import PEagleSpeculatorConfig, default_of
from speculators.models.peagle.proposer import PEagleProposer
from speculators.models.peagle.training import Sampling, drafts_read, train_forward
from speculators.models.tree_drafting import SlotTreeDrafter
from speculators.verifier.config import resolve_mask_token_id


@SpeculatorModel.register("peagle")
class PEagleDraftModel(Eagle3DraftModel):
    """Owns the weights under the names of the checkpoint."""

    config_class = PEagleSpeculatorConfig  # type: ignore[assignment]
    contract = PEagleContract()
    training_args = PEagleTrainingArgs  # type: ignore[assignment]
    training_defaults = TRAINING_DEFAULTS
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
    def mask_token_id(self) -> int:
        if self.config.mask_token_id is None:
            raise ValueError("mask_token_id is not set, so masked slots have no token; set it in config.json")
        return self.config.mask_token_id

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(  # type: ignore[override]
        cls,
        verifier_config: Any,
        *,
        verifier_name_or_path: str,
        num_depths: int = default_of("num_depths"),
        mask_token_id: int | None = None,
        norm_before_residual: bool = default_of("norm_before_residual"),
        embed_requires_grad: bool = default_of("embed_requires_grad"),
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Config fields of a new drafter from what the command line knows."""
        shared = {
            "verifier_name_or_path": verifier_name_or_path,
            "norm_before_residual": norm_before_residual,
            "embed_requires_grad": embed_requires_grad,
            "trust_remote_code": trust_remote_code,
            "ttt_steps": num_depths,  # tokens drafted a round
        }
        values = super().config_values(verifier_config, **{**kwargs, **shared})
        nested = values["transformer_layer_config"]
        write_fc_norm(nested, values["fc_norm"])
        values["mask_token_id"] = resolve_mask_token_id(
            mask_token_id, verifier_name_or_path, nested.vocab_size, trust_remote_code
        )
        return values

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {
            **loss_keywords(**kwargs),
            "max_anchors": kwargs.get("max_anchors"),
            **{name: kwargs.get(name, default_of(name)) for name in PEagleSpeculatorConfig.training_fields},
        }
        return shared, {**shared, "loss_config": dict(shared["loss_config"])}

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        verifier_last_hidden_states: Tensor | None = None,
        *,
        loss_config: Any = None,
        loss_fn: Any = None,
        max_anchors: int | None = None,
        num_depths: int | None = None,
        down_sample_ratio: float | None = None,
        down_sample_ratio_min: float | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """(None, loss, metrics). Slots are drawn by `generator` (None: torch's own in training, the same ones every
        time in evaluation). Unknown keywords of the batch are ignored."""
        sampling = Sampling(
            self.num_depths if num_depths is None else num_depths,
            self.down_sample_ratio if down_sample_ratio is None else down_sample_ratio,
            self.down_sample_ratio_min if down_sample_ratio_min is None else down_sample_ratio_min,
            max_anchors,
        )
        batch = PackedBatch.of(
            hidden_states, input_ids, document_ids, loss_mask, position_ids, verifier_last_hidden_states
        )
        losses = choose_loss_config(loss_config, loss_fn, default="kl_div")
        return train_forward(self, batch, sampling, losses, generator)

    drafts_read = staticmethod(drafts_read)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> PEagleProposer:
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

    def make_tree_drafter(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> TreeDrafter:
        chain = self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        return SlotTreeDrafter(
            chain.slot_log_probs, chain.capture, d2t=chain.d2t, verifier_vocab_size=chain.verifier_vocab_size
        )
