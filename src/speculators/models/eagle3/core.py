"""`Eagle3DraftModel`: the weights under the names of the checkpoint, and the hooks of training and serving.

Shapes: D = aux layers * H, H hidden size, V verifier vocabulary. What is computed with the weights is in `network`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from speculators.interfaces import CaptureSpec, LossOutput, PackedBatch, TreeDrafter, VerifierStates
from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs, LossArgs
from speculators.models.draft_model import DraftModel
from speculators.models.eagle3.checkpoint import Eagle3Contract, complete_transformer_layer_config
from speculators.models.eagle3.config import DEFAULT_NUM_AUX, Eagle3SpeculatorConfig
from speculators.models.eagle3.keys import TRAINING_DEFAULTS, Eagle3TrainingArgs, FusionArgs
from speculators.models.eagle3.layouts import Eagle3HeadContract
from speculators.models.eagle3.network import Eagle3Network
from speculators.models.eagle3.training import drafts_read, shift_batch, train_unrolled, unroll_everywhere
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.models.supervision import VerifierHead
from speculators.models.tree_drafting import FeedbackTreeDrafter
from speculators.nn.attention import layer_window
from speculators.nn.decoder import DecoderLayer, FusionDecoderLayer
from speculators.nn.draft_tokens import logits_over_verifier
from speculators.nn.norms import RMSNorm
from speculators.nn.packed_row import padded_row
from speculators.nn.rope import Rope
from speculators.nn.routes import Route
from speculators.training_keys import NO_BLOCKS
from speculators.verifier.config import resolve_target_layer_ids


@SpeculatorModel.register("eagle3")
class Eagle3DraftModel(DraftModel):
    """Owns the weights under the names of the checkpoint."""

    config_class = Eagle3SpeculatorConfig  # type: ignore[assignment]
    contract: ClassVar[Eagle3Contract] = Eagle3HeadContract()
    training_args: ClassVar[type[BaseModel]] = Eagle3TrainingArgs
    training_defaults = TRAINING_DEFAULTS
    unread_keys: ClassVar[tuple[str, ...]] = NO_BLOCKS
    recorded_keys: ClassVar[Mapping[str, str]] = {"target_layer_ids": "eagle_aux_hidden_state_layer_ids"}
    forward_keys: ClassVar[Mapping[str, str]] = {"ttt_steps": "ttt_steps", "ttt_step_loss_decay": "ttt_step_loss_decay"}
    first_position = 1
    align = staticmethod(shift_batch)

    def __init__(self, config: Eagle3SpeculatorConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        nested = config.transformer_layer_config
        size, eps = nested.hidden_size, nested.rms_norm_eps
        num_aux = config.num_aux
        self.fc = nn.Linear(num_aux * size, size, bias=False)
        self.input_norm = RMSNorm(num_aux * size, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList([RMSNorm(size, eps) for _ in range(num_aux)]) if config.fc_norm else None
        first = FusionDecoderLayer(nested, 0, config.norm_before_residual)
        self.layers = nn.ModuleList([first, *[DecoderLayer(nested, i) for i in range(1, nested.num_hidden_layers)]])
        self.norm = RMSNorm(size, eps)
        self.verifier_norm = RMSNorm(size, eps)
        self.verifier_norm.requires_grad_(False)
        self.post_init()

    @property
    def network(self) -> Eagle3Network:
        nested = self.config.transformer_layer_config
        layers = cast("list[DecoderLayer]", list(self.layers))
        return Eagle3Network(
            self.embed_tokens,
            self.input_norm,
            self.fc_norm,
            self.fc,
            layers,
            self.norm,
            self.lm_head,
            Rope(nested),
            [layer_window(nested, i) for i in range(len(layers))],
            self.config.norm_output,
        )

    @property
    def target_layer_ids(self) -> list[int]:
        ids = self.config.eagle_aux_hidden_state_layer_ids
        if ids is None:
            raise ValueError(
                "eagle_aux_hidden_state_layer_ids is null and no verifier is recorded to choose them by; set it in "
                f"config.json to {DEFAULT_NUM_AUX} ids, [2, n // 2, n - 3] for a verifier of n layers by convention"
            )
        return list(ids)

    def load_verifier_weights(self) -> None:
        super().load_verifier_weights()
        self.embed_tokens.requires_grad_(self.config.embed_requires_grad)
        verifier = self.config.recorded_verifier
        if verifier is not None and self.config.eagle_aux_hidden_state_layer_ids is None:
            # what engines choose where a config is silent, written down from here on
            self.config.eagle_aux_hidden_state_layer_ids = resolve_target_layer_ids(None, verifier)

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        verifier, own = args.verifier.verifier_name_or_path, args.own
        trust_remote_code = args.verifier.trust_remote_code
        ids = resolve_target_layer_ids(args.draft.target_layer_ids, verifier, trust_remote_code=trust_remote_code)
        nested = complete_transformer_layer_config(layer_config, num_aux=len(ids))
        args.choose_attention(nested)
        return {
            "transformer_layer_config": nested,
            "draft_vocab_size": args.draft.draft_vocab_size or nested.vocab_size,
            "eagle_aux_hidden_state_layer_ids": ids,
            **{name: getattr(own, name) for name in FusionArgs.model_fields},
        }

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        return args.own.ttt_steps

    @property
    def verifier_head(self) -> VerifierHead:
        return VerifierHead(self.verifier_norm, self.verifier_lm_head, self.target_transform, self.outside_head())

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        return train_unrolled(self.network, batch, self.verifier_head, args)

    def forward_without_targets(self, batch: PackedBatch, args: LossArgs[Any]) -> list[Tensor]:
        """The draft ids of each step alone, [1, S] over the draft vocabulary."""
        steps = unroll_everywhere(self.network, batch, args.own.ttt_steps, args.attention)
        return [padded_row(self.lm_head(normed_TH).argmax(-1), batch.row_length) for normed_TH in steps]

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor:
        batch = self.packed_batch(**self.training_row(states))
        read_KH = self.drafts_read(batch, num_drafts, self.attention_route(self.device.type))
        return logits_over_verifier(self.lm_head(read_KH), self.t2d)

    def drafts_read(self, batch: PackedBatch, num_drafts: int, attention: Route) -> Tensor:
        return drafts_read(self.network, batch, num_drafts, attention)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> FeedbackProposer:
        model = self.beside(verifier_model)
        return FeedbackProposer(
            model.network.fused(),
            CaptureSpec(aux_layer_ids=tuple(model.target_layer_ids)),
            model.d2t,
            model.verifier_vocab_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> TreeDrafter:
        return FeedbackTreeDrafter(
            self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        )
