"""`MLPSpeculator`: the weights under the names of the released checkpoints, and the hooks of training and serving.

Shapes: H hidden size, D width of the state, V vocabulary. What is computed with the weights is in `network`; the
alignment of training in `models.last_state_model`.

    emb.{i}.weight [V, D]   proj.{i}.weight [D, H] (i = 0) / [D, D]   ln.{i}.weight, .bias [D]   head.{i}.weight [V, D]
    tie_weights: emb.0, ln.0, head.0, proj.0, proj.1 are all there is
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs
from speculators.models.last_state_model import LastStateModel, check_whole_vocabulary
from speculators.models.last_state_proposer import LastStateProposer, snapshot
from speculators.models.mlp.checkpoint import MLPContract
from speculators.models.mlp.config import TRAINING_DEFAULTS, MLPSpeculatorConfig, MLPTrainingArgs
from speculators.models.mlp.network import BiasedRMSNorm, MLPNetwork
from speculators.models.tree_drafting import CarriedTreeDrafter
from speculators.training_keys import NO_BLOCKS, NO_VOCABULARY_OF_ITS_OWN
from speculators.verifier.capture import fitting_embedding, verifier_parts
from speculators.verifier.config import get_verifier_config, norm_kind


@SpeculatorModel.register("mlp")
class MLPSpeculator(LastStateModel):
    config_class = MLPSpeculatorConfig  # type: ignore[assignment]
    config: MLPSpeculatorConfig
    contract = MLPContract()
    training_args = MLPTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    unread_keys = ("target_layer_ids", "draft_attn_impl", *NO_VOCABULARY_OF_ITS_OWN, *NO_BLOCKS)
    recorded_keys: ClassVar[Mapping[str, str]] = {"n_predict": "num_layers", "inner_dim": "intermediate_size"}

    def __init__(self, config: MLPSpeculatorConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        size, vocab_size, num_steps = config.intermediate_size, config.vocab_size, config.num_layers
        num_own = 1 if config.tie_weights else num_steps
        widths = [config.hidden_size] + [size] * (min(num_steps, 2) - 1 if config.tie_weights else num_steps - 1)
        self.emb = nn.ModuleList([nn.Embedding(vocab_size, size) for _ in range(num_own)])
        self.proj = nn.ModuleList([nn.Linear(width, size, bias=False) for width in widths])
        self.ln = nn.ModuleList([BiasedRMSNorm(size) for _ in range(num_own)])
        self.head = nn.ModuleList([nn.Linear(size, vocab_size, bias=False) for _ in range(num_own)])
        self.add_verifier_tail()
        self.post_init()
        for module in (*self.emb, *self.proj, *self.head):
            nn.init.normal_(module.weight, std=size**-0.5)

    @property
    def layers(self) -> nn.ModuleList:
        return self.proj

    @property
    def network(self) -> MLPNetwork:
        return MLPNetwork(
            self.verifier_norm,
            list(self.emb),
            list(self.proj),
            list(self.ln),
            list(self.head),
            self.config.num_layers,
            self.config.scale_input,
        )

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        """Of the verifier's own config, whatever was given."""
        name, trust_remote_code = args.verifier.verifier_name_or_path, args.verifier.trust_remote_code
        verifier, own = get_verifier_config(name, trust_remote_code), args.own
        check_whole_vocabulary(args.draft.draft_vocab_size, verifier.vocab_size)
        return {
            "hidden_size": verifier.hidden_size,
            "intermediate_size": own.inner_dim or verifier.hidden_size,
            "vocab_size": verifier.vocab_size,
            "num_layers": own.n_predict,
            "tie_weights": own.tie_weights,
            "scale_input": own.scale_input,
            "rms_norm_eps": norm_kind(verifier).eps,
        }

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        return args.own.n_predict

    def make_proposer(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> LastStateProposer:
        weight = fitting_embedding(verifier_model, self.config.vocab_size, self.config.hidden_size)
        emb, proj, ln, head = (snapshot(part, weight) for part in (self.emb, self.proj, self.ln, self.head))
        norm = verifier_parts(verifier_model).final_norm
        network = MLPNetwork(norm, emb, proj, ln, head, self.config.num_layers, self.config.scale_input)
        return LastStateProposer(network, [proj, head])

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> CarriedTreeDrafter:
        return CarriedTreeDrafter(
            self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        )
