"""`MTPDraftModel`: the weights under the names of the checkpoint, and the hooks of training and serving.

Shapes: H hidden size, V vocabulary. What is computed with the weights is in `network`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from speculators.draft_vocab import DraftVocabMixin
from speculators.interfaces import CaptureSpec, LossOutput, PackedBatch, VerifierStates
from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs, LossArgs
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.models.mtp.checkpoint import MTPContract, stitch, verifier_layer_config
from speculators.models.mtp.config import TRAINING_DEFAULTS, MTPSpeculatorConfig, MTPTrainingArgs
from speculators.models.mtp.families import LAYER, family_of, read_native
from speculators.models.mtp.network import MTPLayer, MTPNetwork, decoder_shape
from speculators.models.mtp.training import (
    MTPArgs,
    compute_step_weights,
    documents_of,
    drafts_read,
    positions_of,
    shift_batch_mtp,
    step_logits,
    train_steps,
)
from speculators.models.supervision import VerifierHead
from speculators.models.tree_drafting import FeedbackTreeDrafter
from speculators.nn.norms import RMSNorm
from speculators.nn.packed_row import join_rows
from speculators.nn.rope import Rope
from speculators.training_keys import NO_BLOCKS, NO_VOCABULARY_OF_ITS_OWN
from speculators.verifier.capture import fitting_embedding, verifier_parts
from speculators.verifier.config import text_config

logger = logging.getLogger(__name__)

VERIFIERS_OWN = ["embed_tokens.weight", "lm_head.weight"]


@SpeculatorModel.register("mtp")
class MTPDraftModel(DraftVocabMixin, SpeculatorModel):  # type: ignore[misc]
    """Owns the weights under the names of the checkpoint."""

    config_class = MTPSpeculatorConfig  # type: ignore[assignment]
    training_args = MTPTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    unread_keys = ("target_layer_ids", *NO_VOCABULARY_OF_ITS_OWN, *NO_BLOCKS)
    has_chosen_layers = False
    uses_every_weight = True
    takes_routes = True
    columns_on_host = ("document_ids", "loss_mask")
    forward_keys: ClassVar[Mapping[str, str]] = {}
    forward_columns = ("input_ids", "hidden_states", "attention_mask", "position_ids", "loss_mask", "document_ids")
    contract = MTPContract()
    align = staticmethod(shift_batch_mtp)
    stitch = staticmethod(stitch)
    _keys_to_ignore_on_save = [*VERIFIERS_OWN, *DraftVocabMixin._keys_to_ignore_on_save]

    def __init__(self, config: MTPSpeculatorConfig, **kwargs: Any):
        if isinstance(config, MTPSpeculatorConfig):
            check_buildable(config)
        super().__init__(config, **kwargs)
        del self.verifier_lm_head  # the head is the verifier's already
        nested = config.transformer_layer_config
        self.family = family_of(nested)
        self.mtp_layers = nn.ModuleList([MTPLayer(nested, self.family)])
        self.verifier_norm = RMSNorm(nested.hidden_size, nested.rms_norm_eps)
        self.verifier_norm.requires_grad_(False)
        self.post_init()

    @property
    def layers(self) -> nn.ModuleList:
        return self.mtp_layers

    @property
    def network(self) -> MTPNetwork:
        return MTPNetwork(
            self.embed_tokens,
            self.verifier_norm,
            cast("MTPLayer", self.mtp_layers[0]),
            self.lm_head,
            Rope(self.config.transformer_layer_config),
            self.family.reads_raw_states,
            self.family.zeroes_first_embedding,
        )

    @property
    def target_layer_ids(self) -> list[int]:
        return [self.config.transformer_layer_config.num_hidden_layers]

    @property
    def capture(self) -> CaptureSpec:
        """The last state alone: it is what the layer reads."""
        return CaptureSpec(last_hidden=True)

    def load_verifier_weights(self) -> None:
        """Embedding, head and final norm are the verifier's, whatever a checkpoint has."""
        path = self.config.recorded_verifier
        if path is None:
            self.freeze_verifier_weights()
            return
        for module in (self.embed_tokens, self.lm_head):
            nn.init.constant_(module.weight, math.nan)
        self.verifier_lm_head = self.lm_head  # which the mixin fills
        super().load_verifier_weights()
        del self.verifier_lm_head

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        """Of the verifier's own config."""
        nested = verifier_layer_config(text_config(layer_config))
        draft_vocab_size = args.draft.draft_vocab_size
        if draft_vocab_size not in (None, nested.vocab_size):
            raise ValueError(
                f"draft_vocab_size={draft_vocab_size}: an MTP layer drafts through the verifier's own head, over its "
                f"{nested.vocab_size} tokens; leave draft_vocab_size out"
            )
        args.choose_attention(nested)
        return {"transformer_layer_config": nested}

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        return args.own.num_speculative_steps

    def initialise(self, args: DrafterArgs[Any]) -> None:
        """From the MTP layer the verifier ships with, if there is one."""
        self.load_native_layer(args.verifier.verifier_name_or_path)

    def load_native_layer(self, verifier: str) -> None:
        """Start from the MTP layer in the verifier's checkpoint, if there is one."""
        tensors = read_native(verifier, self.family, self.config.transformer_layer_config)
        if not tensors:
            logger.warning("%s ships no MTP layer: training starts from random weights", verifier)
            return
        own = {key: tensor.shape for key, tensor in self.state_dict().items() if key.startswith(LAYER)}
        found = {key: tensor.shape for key, tensor in tensors.items()}
        if found != own:
            odd = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))
            raise ValueError(
                f"Architecture mismatch: the MTP layer of '{verifier}' does not fit its config in "
                f"{[(key, found.get(key), own.get(key)) for key in odd]} (name, shape there, shape by the config)"
            )
        self.load_state_dict(tensors, strict=False)
        logger.warning("training starts from the MTP layer of %s", verifier)

    @classmethod
    def trainer_keywords(cls, own: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        weights = keys.get("step_weights")
        if weights is None:
            if keys.get("num_speculative_steps") is None:
                raise ValueError("num_speculative_steps is needed to weigh the steps; give it, or step_weights")
            weights = compute_step_weights(own.step_weight_beta, own.num_speculative_steps)
        return {"step_weights": weights, "return_logits": False}

    def packed_batch(  # type: ignore[override]
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> PackedBatch:
        """Of any number of rows. `hidden_states` are the verifier's last states, before its final norm."""
        nested = self.config.transformer_layer_config
        positions = positions_of(input_ids, position_ids, nested.model_type)
        if hidden_states.shape[-1] == 0:  # a batch of which no sample could be had
            hidden_states = hidden_states.new_zeros(*input_ids.shape, nested.hidden_size)
        return join_rows(
            input_ids,
            aux=None,
            last_hidden=hidden_states,
            document_ids=documents_of(input_ids, document_ids, attention_mask, positions),
            loss_mask=loss_mask,
            position_ids=positions,
            first_position=self.first_position,
        )

    def loss_args(self, keywords: Mapping[str, Any]) -> MTPArgs:
        args, weights = super().loss_args(keywords), keywords.get("step_weights")
        num_steps = self.config.num_speculative_steps
        if weights is None:
            weights = compute_step_weights(args.own.step_weight_beta, num_steps)
        if len(weights) != num_steps:
            raise ValueError(
                f"step_weights has {len(weights)} entries for num_speculative_steps={num_steps}; give one for each step"
            )
        return MTPArgs(**vars(args), step_weights=list(weights))

    @property
    def verifier_head(self) -> VerifierHead:
        return VerifierHead(self.verifier_norm, self.lm_head, self.target_transform)

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        assert isinstance(args, MTPArgs)
        return train_steps(self.network, batch, self.verifier_head, args)

    def forward_output(
        self, batch: PackedBatch, args: LossArgs[Any], result: LossOutput, given: Mapping[str, Any]
    ) -> list[Tensor]:
        """Logits [B, S - K - 1, V] of each step; with `return_logits=False` (what the trainer gives) none are kept."""
        assert isinstance(args, MTPArgs)
        if not given.get("return_logits", True):
            return []
        return step_logits(self.network, batch, len(given["input_ids"]), args)

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor:
        """The first draft is a step of training; see `training.drafts_read` for the others."""
        batch = self.packed_batch(**self.training_row(states))
        return self.lm_head(drafts_read(self.network, batch, num_drafts, self.attention_route(self.device.type)))

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> FeedbackProposer:
        """Entry i of its cache is token x[i+1] with the state y[i] that predicted it, normed as the family reads it."""
        model = self.beside(verifier_model)
        network = dataclasses.replace(
            model.network,
            embed_tokens=cast("nn.Embedding", verifier_model.get_input_embeddings()),
            lm_head=verifier_model.get_output_embeddings(),
            verifier_norm=verifier_parts(verifier_model).final_norm,
        ).fused()
        return FeedbackProposer(
            network,
            CaptureSpec(last_hidden=True),
            None,
            self.verifier_vocab_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            input_tokens=network.tokens_at,
        )

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> FeedbackTreeDrafter:
        return FeedbackTreeDrafter(
            self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        )

    def beside(self, verifier_model: PreTrainedModel) -> Self:
        """This drafter in the verifier's dtype, on its device."""
        source = fitting_embedding(verifier_model, self.verifier_vocab_size, self.hidden_size)
        weight = self.network.layer.input_proj.weight
        if weight.dtype == source.dtype and weight.device == source.device:
            return self
        model = copy.deepcopy(self)  # training keeps its own
        model.to(device=source.device, dtype=source.dtype)  # type: ignore[call-arg]
        return model


def check_buildable(config: MTPSpeculatorConfig) -> None:
    if config.draft_vocab_size != config.vocab_size:
        raise NotImplementedError(
            f"draft_vocab_size={config.draft_vocab_size}: MTP drafts over the whole vocabulary ({config.vocab_size})"
        )
    decoder_shape(config.transformer_layer_config)
