"""`MedusaDraftModel`: the weights under the names of the checkpoint, hooks of training and serving, and the network:
K heads side by side, all on the same verifier state. The alignment of training is in `models.last_state_model`.

Shapes: H hidden size, V vocabulary.

    f = final norm of y;   head k:  r = f;  repeat: r = r + SiLU(W r + b);   logits = L_k r
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from speculators.checkpoint.formats import ForeignCheckpoint
from speculators.model import SpeculatorModel
from speculators.model_training import DrafterArgs
from speculators.models.last_state_model import LastStateModel, check_whole_vocabulary
from speculators.models.last_state_proposer import LastStateProposer, snapshot
from speculators.models.medusa.checkpoint import MedusaContract, save_native
from speculators.models.medusa.config import TRAINING_DEFAULTS, MedusaSpeculatorConfig, MedusaTrainingArgs
from speculators.models.tree_drafting import SlotTreeDrafter
from speculators.nn.flops import product_flop
from speculators.training_keys import NO_BLOCKS, NO_VOCABULARY_OF_ITS_OWN
from speculators.verifier.capture import fitting_embedding, verifier_parts
from speculators.verifier.config import get_verifier_config, norm_kind


class MedusaBlock(nn.Module):
    """The residual layers of one head; starts as the identity."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size, hidden_size) for _ in range(num_layers)])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        return hidden


@dataclass(frozen=True)
class MedusaNetwork:
    """Owns nothing."""

    verifier_norm: nn.Module
    blocks: Sequence[nn.Module]
    heads: Sequence[nn.Linear]

    def start(self, states: Tensor) -> Tensor:
        return self.verifier_norm(states)

    def step(self, k: int, carried: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Heads do not see each other's tokens."""
        return self.blocks[k](carried), carried

    def step_flop(self, k: int, num_rows: int) -> int:
        first, *others = (layer.weight for layer in self.blocks[k].layers)  # type: ignore[union-attr]
        total = product_flop(first, num_rows, input_learns=False)
        return total + sum(product_flop(weight, num_rows) for weight in others)


@SpeculatorModel.register("medusa")
class MedusaDraftModel(LastStateModel):
    config_class = MedusaSpeculatorConfig  # type: ignore[assignment]
    config: MedusaSpeculatorConfig
    training_args = MedusaTrainingArgs
    training_defaults = TRAINING_DEFAULTS
    unread_keys = ("target_layer_ids", "draft_attn_impl", *NO_VOCABULARY_OF_ITS_OWN, *NO_BLOCKS)
    contract = MedusaContract()

    def __init__(self, config: MedusaSpeculatorConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        heads = range(config.num_heads)
        self.blocks = nn.ModuleList([MedusaBlock(config.hidden_size, config.num_hidden_layers) for _ in heads])
        self.lm_heads = nn.ModuleList([nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in heads])
        self.add_verifier_tail()
        self.post_init()
        for parameter in self.blocks.parameters():
            nn.init.zeros_(parameter)

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    @property
    def network(self) -> MedusaNetwork:
        return MedusaNetwork(self.verifier_norm, self.blocks, self.lm_heads)  # type: ignore[arg-type]

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        """Of the verifier's own config, whatever was given."""
        name, trust_remote_code = args.verifier.verifier_name_or_path, args.verifier.trust_remote_code
        verifier, num_heads = get_verifier_config(name, trust_remote_code), args.own.num_heads
        check_whole_vocabulary(args.draft.draft_vocab_size, verifier.vocab_size)
        return {
            "hidden_size": verifier.hidden_size,
            "vocab_size": verifier.vocab_size,
            "num_heads": num_heads,
            "num_hidden_layers": args.draft.num_layers,
            "rms_norm_eps": norm_kind(verifier).eps,
        }

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        return args.own.num_heads

    def initialise(self, args: DrafterArgs[Any]) -> None:
        """Every head starts as the verifier's own."""
        self.start_from_verifier_head()

    @torch.no_grad()
    def start_from_verifier_head(self) -> None:
        scale, _ = self.target_transform
        for head in self.lm_heads:
            head.weight.copy_(scale * self.verifier_lm_head.weight)  # type: ignore[operator]

    # -- serving -----------------------------------------------------------------------------------------------------

    def make_proposer(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> LastStateProposer:
        weight = fitting_embedding(verifier_model, self.config.vocab_size, self.config.hidden_size)
        blocks, heads = snapshot(self.blocks, weight), snapshot(self.lm_heads, weight)
        norm = verifier_parts(verifier_model).final_norm
        return LastStateProposer(MedusaNetwork(norm, blocks, heads), [blocks, heads])

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> SlotTreeDrafter:
        """Heads do not see each other's tokens: below all parents stand the same best tokens."""
        chain = self.make_proposer(verifier_model, max_batch_size=max_batch_size, max_length=max_length)
        return SlotTreeDrafter(chain.head_log_probs, chain.capture, max_depth=len(chain.network.heads))

    def save_native(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """The directory that vLLM serves with `{"method": "medusa", "model": path}`."""
        return save_native(self.config, {k: t.to(dtype or t.dtype) for k, t in self.state_dict().items()}, path)

    @classmethod
    def from_native(cls, path: str | Path, verifier: str | None = None) -> MedusaDraftModel:
        """The drafter of a directory in vLLM's format or the Medusa repository's."""
        converted = cls.contract.format_named("medusa").read(ForeignCheckpoint(Path(path)), verifier)
        return cls.from_pretrained(None, config=converted.config, state_dict=converted.tensors)
