"""`EagleSpeculator`: the weights of EAGLE-1/2 and HASS, the verifier attached to them, training and serving.

Shapes: B rows, T columns, H hidden size, V vocabulary. What is computed with the weights is in `network`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from speculators.checkpoint.formats import ForeignCheckpoint
from speculators.interfaces import CaptureSpec, LossOutput, PackedBatch, VerifierStates
from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs, LossArgs
from speculators.models.eagle.attachment import DETACHED, Generating, head_of, no_grad_weight, run_sequences
from speculators.models.eagle.checkpoint import EagleContract, complete_eagle_config, save_native
from speculators.models.eagle.config import (
    NUM_TOKENS,
    TRAINING_DEFAULTS,
    EagleSpeculatorConfig,
    EagleTrainingArgs,
    layer_architecture,
)
from speculators.models.eagle.network import EagleDecoderLayer, EagleNetwork
from speculators.models.eagle.training import align, drafts_read, train_features
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.models.supervision import VerifierHead
from speculators.models.tree_drafting import FeedbackTreeDrafter
from speculators.nn.attention import layer_window
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope
from speculators.training_keys import NO_BLOCKS, NO_VOCABULARY_OF_ITS_OWN
from speculators.verifier.capture import fitting_embedding, verifier_parts


@SpeculatorModel.register("eagle")
class EagleSpeculator(Generating, SpeculatorModel):
    """Owns the drafter's weights under the names of the checkpoint; embedding, head and norm are borrowed."""

    config_class = EagleSpeculatorConfig  # type: ignore[assignment]
    training_args = EagleTrainingArgs
    takes_routes = True
    uses_every_weight = True
    columns_on_host = ("document_ids", "loss_mask")
    training_defaults = TRAINING_DEFAULTS
    unread_keys = ("target_layer_ids", *NO_VOCABULARY_OF_ITS_OWN, *NO_BLOCKS)
    forward_keys: ClassVar[Mapping[str, str]] = {
        name: name
        for name in EagleTrainingArgs.model_fields
        if name not in ("layernorms", "fusion_bias", "transformer_layer_architecture")
    }
    contract = EagleContract()
    align = staticmethod(align)

    def __init__(
        self, config: EagleSpeculatorConfig, verifier: Any = None, verifier_attachment_mode: str | None = None
    ):
        """Attaches `verifier`, or the one the config names, unless the mode is "detached"."""
        if not isinstance(config, EagleSpeculatorConfig):
            raise ValueError(f"config is a {type(config).__name__}; EagleSpeculator needs an EagleSpeculatorConfig")
        config.transformer_layer_architecture = layer_architecture(config)
        config.add_layer_architecture()
        super().__init__(config)
        self.detach_all()
        self.mode_after_loading: str | None = None
        nested = config.transformer_layer_config
        size, eps = nested.hidden_size, nested.rms_norm_eps
        self.embedding_layernorm = RMSNorm(size, eps) if config.layernorms else None
        self.fusion_fc = nn.Linear(2 * size, size, bias=config.fusion_bias)
        self.transformer = EagleDecoderLayer(nested, config.layernorms)
        self.pre_lm_head_layernorm = RMSNorm(size, eps) if config.layernorms else None
        self.post_init()
        if verifier is None:
            verifier = config.recorded_verifier
        if verifier is not None and verifier_attachment_mode != DETACHED:
            self.attach_verifier(verifier, verifier_attachment_mode)

    @property
    def layers(self) -> list[nn.Module]:
        return [self.transformer]

    @property
    def capture(self) -> CaptureSpec:
        return CaptureSpec(last_hidden=True)

    @property
    def num_speculative_tokens(self) -> int:
        recorded = self.config.speculators_config
        method = None if recorded is None else recorded.proposal_methods[0]
        return getattr(method, "speculative_tokens", None) or NUM_TOKENS

    @property
    def network(self) -> EagleNetwork:
        if self.verifier_attachment_mode == DETACHED:
            raise ValueError("Verifier model layers not initialized. Call `attach_verifier` to set them up before use.")
        return self.network_with(self.embed_tokens, self.lm_head, cast("nn.Module", self.verifier_norm))

    def network_with(self, embed_tokens: Any, lm_head: Any, verifier_norm: nn.Module) -> EagleNetwork:
        nested = self.config.transformer_layer_config
        return EagleNetwork(
            no_grad_weight(embed_tokens),
            self.embedding_layernorm,
            self.fusion_fc,
            [self.transformer],
            self.pre_lm_head_layernorm,
            head_of(no_grad_weight(lm_head)),
            verifier_norm,
            Rope(nested),
            [layer_window(nested, 0)],
        )

    # -- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def to_be_loaded(
        cls, config: Any, *args: Any, verifier_attachment_mode: str | None = None, **kwargs: Any
    ) -> EagleSpeculator:
        model = cls(config, verifier_attachment_mode=DETACHED)
        model.mode_after_loading = verifier_attachment_mode
        return model

    def load_verifier_weights(self) -> None:
        """After loading: the layers of training from the verifier's files, or the whole verifier if that was asked for.

        Layers loaded here give way to a verifier attached later."""
        path, mode = self.config.recorded_verifier, self.mode_after_loading
        is_needed = self.verifier_attachment_mode == DETACHED or self.is_attached_for_loading
        if path is None or mode == DETACHED or not is_needed:
            return
        if mode is None:
            self.attach_files(path)
        else:
            self.attach_verifier(path, mode)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, verifier: Any = None, **kwargs: Any
    ) -> Any:
        """As `SpeculatorModel.from_pretrained`; `verifier` may also be a loaded model, which is attached."""
        if verifier is None or isinstance(verifier, (str, os.PathLike)):
            return super().from_pretrained(pretrained_model_name_or_path, *args, verifier=verifier, **kwargs)
        mode = kwargs.pop("verifier_attachment_mode", None)
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *args, verifier_attachment_mode=DETACHED, **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if mode != DETACHED:
            model.attach_verifier(verifier, mode)
        return loaded

    @classmethod
    def from_native(cls, path: str | Path, verifier: str | None = None) -> EagleSpeculator:
        """The drafter of a directory in the EAGLE repository's format."""
        converted = cls.contract.format_named("eagle").read(ForeignCheckpoint(Path(path)), verifier)
        return cls.from_pretrained(None, config=converted.config, state_dict=converted.tensors)

    def save_native(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """The directory that vLLM serves with `{"method": "eagle", "model": path}`. Refused where it would not be
        this drafter."""
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        return save_native(self.config, tensors, path)

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        nested, own = complete_eagle_config(layer_config), args.own
        draft_vocab_size = args.draft.draft_vocab_size
        if draft_vocab_size not in (None, nested.vocab_size):
            raise ValueError(
                f"draft_vocab_size={draft_vocab_size}: EAGLE drafts with the verifier's own head over its "
                f"{nested.vocab_size} tokens; leave the option out, or train eagle3"
            )
        args.choose_attention(nested)
        return {
            "transformer_layer_config": nested,
            "transformer_layer_architecture": own.transformer_layer_architecture,
            "layernorms": own.layernorms,
            "fusion_bias": own.fusion_bias,
        }

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        return NUM_TOKENS

    @classmethod
    def get_trainer_kwargs(cls, **keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nothing of nothing, as the contract has it: forwards have the same defaults."""
        return super().get_trainer_kwargs(**keys) if keys else ({}, {})

    def packed_batch(self, hidden_states: Tensor, input_ids: Tensor, **others: Any) -> PackedBatch:  # type: ignore[override]
        if hidden_states.shape[-1] == 0:  # a row of padding alone was never aligned
            hidden_states = torch.zeros_like(others["verifier_last_hidden_states"])
        return super().packed_batch(hidden_states, input_ids, **others)

    @property
    def verifier_head(self) -> VerifierHead:
        network = self.network
        return VerifierHead(network.verifier_norm, network.lm_head, self.target_transform)

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        if not self.training:
            args = dataclasses.replace(args, own=args.own.model_copy(update={"feature_noise": 0.0}))
        return train_features(self.network, batch, self.verifier_head, args)

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        verifier_last_hidden_states: Tensor | None = None,
        document_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Over sequences: logits after each (token, feature) pair; `hidden_states` are features, after the verifier's
        final norm, and stand one position before the tokens.

        With `verifier_last_hidden_states` it trains on a packed row: (draft ids of each step, loss, metrics); both
        states are those before the norm, as `align` pairs them."""
        if verifier_last_hidden_states is not None:
            return super().forward(
                hidden_states=hidden_states,
                input_ids=input_ids,
                document_ids=document_ids,
                loss_mask=loss_mask,
                position_ids=position_ids,
                verifier_last_hidden_states=verifier_last_hidden_states,
                **kwargs,
            )
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not supported: nothing here keeps them")
        past = past_key_values
        if use_cache and past is None:
            past = DynamicCache()
        logits = run_sequences(self.network, input_ids, hidden_states, attention_mask, position_ids, past)
        if return_dict is None:
            return_dict = bool(getattr(self.config, "use_return_dict", True))
        if not return_dict:
            return logits
        return CausalLMOutputWithPast(None, cast("Any", logits), past if use_cache else None)

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor:
        batch = self.packed_batch(**self.training_row(states))
        route = self.attention_route(self.device.type)
        return self.network.lm_head(drafts_read(self.network, batch, num_drafts, route))

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> FeedbackTreeDrafter:
        return FeedbackTreeDrafter(
            self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        )

    def make_proposer(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> FeedbackProposer:
        """Entry i of its cache is token x[i+1] with the verifier's final norm of the state that predicted it."""
        embedding, nested = (
            cast("nn.Embedding", verifier_model.get_input_embeddings()),
            self.config.transformer_layer_config,
        )
        fitting_embedding(verifier_model, nested.vocab_size, nested.hidden_size)
        parts = verifier_parts(verifier_model)
        network = self.network_with(embedding, parts.head, parts.final_norm).snapshot(embedding.weight)
        return FeedbackProposer(
            network,
            CaptureSpec(last_hidden=True),
            None,
            network.lm_head.out_features,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )
