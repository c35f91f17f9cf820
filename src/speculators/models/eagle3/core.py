"""`Eagle3DraftModel`: the weights under the names of the checkpoint, and the hooks of training and serving.

Shapes: D = aux layers * H, H hidden size, V verifier vocabulary. What is computed with the weights is in `network`.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from speculators.interfaces import CaptureSpec, TreeDrafter, VerifierStates
from speculators.losses.registry import loss_keywords
from speculators.model import SpeculatorModel
from speculators.models.draft_model import DraftModel
from speculators.models.eagle3.arguments import TRAINING_DEFAULTS, Eagle3TrainingArgs
from speculators.models.eagle3.checkpoint import Eagle3Contract, complete_transformer_layer_config
from speculators.models.eagle3.config import DEFAULT_NUM_AUX, Eagle3SpeculatorConfig
from speculators.models.eagle3.network import Eagle3Network
from speculators.models.eagle3.training import PackedBatch, drafts_read, shift_batch, train_forward
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.models.tree_drafting import FeedbackTreeDrafter
from speculators.nn.attention import layer_window
from speculators.nn.decoder import DecoderLayer, FusionDecoderLayer
from speculators.nn.draft_vocab import logits_over_verifier
from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope
from speculators.verifier.config import make_speculators_config, resolve_target_layer_ids


@SpeculatorModel.register("eagle3")
class Eagle3DraftModel(DraftModel):
    """Owns the weights under the names of the checkpoint."""

    config_class = Eagle3SpeculatorConfig  # type: ignore[assignment]
    contract = Eagle3Contract()
    training_args = Eagle3TrainingArgs
    training_defaults = TRAINING_DEFAULTS
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
    def config_values(  # type: ignore[override]
        cls,
        verifier_config: Any,
        *,
        draft_vocab_size: int | None,
        verifier_name_or_path: str,
        norm_before_residual: bool = Eagle3TrainingArgs.model_fields["norm_before_residual"].default,
        ttt_steps: int = Eagle3TrainingArgs.model_fields["ttt_steps"].default,
        target_layer_ids: list[int] | None = None,
        norm_before_fc: bool | None = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        embed_requires_grad: bool = False,
        draft_attn_impl: str | None = None,
        trust_remote_code: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Config fields of a new drafter from what the command line knows."""
        ids = resolve_target_layer_ids(target_layer_ids, verifier_name_or_path, trust_remote_code=trust_remote_code)
        nested = complete_transformer_layer_config(verifier_config, num_aux=len(ids))
        if draft_attn_impl is not None:
            nested._attn_implementation = draft_attn_impl
        algorithm = cls.config_class.model_fields["speculators_model_type"].default
        return {
            "transformer_layer_config": nested,
            "draft_vocab_size": draft_vocab_size or nested.vocab_size,
            "norm_before_residual": norm_before_residual,
            "eagle_aux_hidden_state_layer_ids": ids,
            "norm_before_fc": not fc_norm if norm_before_fc is None else norm_before_fc,
            "fc_norm": fc_norm,
            "norm_output": norm_output,
            "embed_requires_grad": embed_requires_grad,
            "speculators_config": make_speculators_config(
                algorithm, ttt_steps, verifier_name_or_path, trust_remote_code
            ),
        }

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {
            **loss_keywords(**kwargs),
            "ttt_steps": kwargs["ttt_steps"],
            "ttt_step_loss_decay": kwargs["ttt_step_loss_decay"],
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
        **kwargs: Any,
    ) -> Any:
        """(draft ids of each step, loss, metrics), or the draft ids alone without the verifier's last states. Unknown
        keywords of the batch are ignored. See `training.train_forward`."""
        return train_forward(
            self, hidden_states, input_ids, document_ids, loss_mask, position_ids, verifier_last_hidden_states, **kwargs
        )

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor:
        row = self.training_row(states)
        batch = PackedBatch.of(
            row["hidden_states"], row["input_ids"], row["document_ids"], row["loss_mask"], row["position_ids"], None
        )
        return logits_over_verifier(self.lm_head(self.drafts_read(self, batch, num_drafts)), self.t2d)

    drafts_read: ClassVar[Any] = staticmethod(drafts_read)

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> FeedbackProposer:
        model = self.beside(verifier_model)
        return FeedbackProposer(
            model.network.fused(),
            CaptureSpec(aux_layer_ids=tuple(model.target_layer_ids)),
            model.d2t,
            model.verifier_vocab_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def make_tree_drafter(self, verifier_model: Any, *, max_batch_size: int, max_length: int) -> TreeDrafter:
        return FeedbackTreeDrafter(
            self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        )
