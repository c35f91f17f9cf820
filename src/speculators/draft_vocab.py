"""`DraftVocabMixin`: the verifier's embedding and head inside a drafter, and the draft vocabulary between them.

Shapes: V verifier vocabulary, D draft vocabulary, H hidden size. List the mixin before the model base:

    class MyDraftModel(DraftVocabMixin, SpeculatorModel): ...
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from speculators.nn.draft_vocab import select_rows
from speculators.nn.norms import RMSNormPlusOne
from speculators.utils.files import refuse_missing_verifier
from speculators.utils.loading import find_key, list_checkpoint_keys, load_model_layers

logger = logging.getLogger(__name__)

# Families whose RMSNorm multiplies by 1 + w: their stored norm weights are gains minus one.
UNIT_OFFSET_NORM_FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "recurrent_gemma",
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
    }
)

VERIFIER_ONLY_KEYS = ["verifier_lm_head.weight", "verifier_norm.weight"]

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class DraftVocabMixin(_Base):
    """Adds to a model whose config has `transformer_layer_config` and `draft_vocab_size`:

    - `embed_tokens` [V, H], `lm_head` [D, H], `verifier_lm_head` [D, H]: frozen, NaN until loaded, so that a weight
      nobody loaded cannot pass for one;
    - buffers `t2d` bool [V] and `d2t` int64 [D] (offsets), or None when D == V.
    """

    _keys_to_ignore_on_save = list(VERIFIER_ONLY_KEYS)
    _keys_to_ignore_on_load_missing = ["embed_tokens.weight", "lm_head.weight", *VERIFIER_ONLY_KEYS]

    config: Any
    t2d: Tensor | None
    d2t: Tensor | None

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        nested = config.transformer_layer_config
        self.draft_vocab_size: int = config.draft_vocab_size
        self.verifier_vocab_size: int = nested.vocab_size
        self.hidden_size: int = nested.hidden_size
        self.use_draft_vocab: bool = self.draft_vocab_size != self.verifier_vocab_size
        if self.draft_vocab_size > self.verifier_vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} is larger than the verifier's vocabulary "
                f"({self.verifier_vocab_size}); give at most that many"
            )
        self.register_buffer("t2d", self._buffer(self.verifier_vocab_size, torch.bool))
        self.register_buffer("d2t", self._buffer(self.draft_vocab_size, torch.long))
        padding_idx = getattr(nested, "pad_token_id", None)
        self.embed_tokens = _never_loaded(
            nn.Embedding, self.verifier_vocab_size, self.hidden_size, padding_idx=padding_idx
        )
        self.lm_head = _never_loaded(nn.Linear, self.hidden_size, self.draft_vocab_size, bias=False)
        self.verifier_lm_head = _never_loaded(nn.Linear, self.hidden_size, self.draft_vocab_size, bias=False)

    @property
    def target_vocab_size(self) -> int:
        return self.verifier_vocab_size

    def load_vocab_mappings(self, t2d: Tensor | None, d2t: Tensor | None) -> None:
        """Set the draft vocabulary. Both or neither; ignored by a model that uses the whole vocabulary."""
        if t2d is None and d2t is None:
            return
        if t2d is None or d2t is None:
            raise ValueError("Both t2d and d2t must be provided together, or neither")
        if not self.use_draft_vocab:
            return
        if t2d.shape[0] != self.verifier_vocab_size:
            raise ValueError(f"t2d.shape[0]={t2d.shape[0]} must be the verifier vocabulary, {self.verifier_vocab_size}")
        num_kept = int(t2d.bool().sum())
        if num_kept != self.draft_vocab_size:
            raise ValueError(f"t2d has {num_kept} non-zero values; draft_vocab_size={self.draft_vocab_size} are needed")
        if d2t.shape[0] != self.draft_vocab_size:
            raise ValueError(f"d2t.shape[0]={d2t.shape[0]} must be draft_vocab_size={self.draft_vocab_size}")
        device = self.embed_tokens.weight.device
        self.t2d = t2d.to(device=device, dtype=torch.bool).clone()
        self.d2t = d2t.to(device=device, dtype=torch.long).clone()

    def load_verifier_weights(self) -> None:
        """Fill from the verifier: its norm and head always, the embedding and the draft head where nothing was loaded.

        Nothing to do when the config names no verifier."""
        self.freeze_verifier_weights()
        path = self.config.recorded_verifier
        if path is None:
            return
        refuse_missing_verifier(path)
        norm = getattr(self, "verifier_norm", None)
        names = ["embed_tokens.weight"] + (["model.norm.weight"] if norm is not None else [])
        if find_key("lm_head.weight", list_checkpoint_keys(path)) is not None:  # else it is tied to the embedding
            names.append("lm_head.weight")
        weights = load_model_layers(names, path)
        embed_VH, head_VH = self._embedding_and_head(weights, path)

        if self.use_draft_vocab and not bool(self.t2d.any()):  # type: ignore[union-attr]
            raise ValueError(
                "t2d tensor hasn't been set, so the rows of the verifier's head cannot be chosen; call "
                "load_vocab_mappings(t2d, d2t) first, or pass both to from_pretrained"
            )
        head_DH = select_rows(head_VH, self.t2d)
        _fill(self.verifier_lm_head.weight, head_DH)
        if was_never_loaded(self.lm_head.weight):
            _fill(self.lm_head.weight, head_DH)
        if was_never_loaded(self.embed_tokens.weight):
            _fill(self.embed_tokens.weight, embed_VH)
        if norm is not None:
            self._load_norm(norm, weights.get("model.norm.weight"), path)

    def freeze_verifier_weights(self) -> None:
        """What is the verifier's is not trained."""
        for name in ("embed_tokens", "lm_head", "verifier_lm_head", "verifier_norm"):
            module = getattr(self, name, None)
            if module is not None:
                module.requires_grad_(False)

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor | None:
        return torch.zeros(size, dtype=dtype) if self.use_draft_vocab else None

    def _embedding_and_head(self, weights: dict[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
        if "embed_tokens.weight" not in weights:
            raise ValueError(f"verifier '{path}' has no tensor embed_tokens.weight under any name known here")
        embed_VH = weights["embed_tokens.weight"]
        head_VH = weights.get("lm_head.weight", embed_VH)  # a tied head is stored once, as the embedding
        expected = (self.verifier_vocab_size, self.hidden_size)
        for name, weight in (("embedding", embed_VH), ("head", head_VH)):
            if tuple(weight.shape) != expected:
                raise ValueError(
                    f"the {name} of verifier '{path}' is {tuple(weight.shape)}; this drafter's vocabulary and hidden "
                    f"size are {expected}. Use the verifier it was made for, or train a drafter for this one"
                )
        return embed_VH, head_VH

    def _load_norm(self, norm: nn.Module, weight_H: Tensor | None, path: str) -> None:
        if weight_H is None:
            logger.warning("verifier '%s' has no final norm weight; its norm stays at ones", path)
            return
        if norm_is_unit_offset(path) and not isinstance(norm, RMSNormPlusOne):
            weight_H = 1.0 + weight_H.float()
        _fill(norm.weight, weight_H)  # type: ignore[arg-type]


def norm_is_unit_offset(verifier: str) -> bool:
    """Whether the verifier's norms multiply by 1 + w."""
    values, _ = PretrainedConfig.get_config_dict(verifier)
    model_types = {values.get("model_type"), (values.get("text_config") or {}).get("model_type")}
    return bool(model_types & UNIT_OFFSET_NORM_FAMILIES)


def was_never_loaded(weight: Tensor) -> bool:
    return bool(torch.isnan(weight).any())


def _never_loaded(kind: type[nn.Module], *sizes: int, **options: Any) -> Any:
    """A frozen module whose weight is NaN, flagged so that transformers' initialisation leaves it that way."""
    module = torch.nn.utils.skip_init(kind, *sizes, **options)
    nn.init.constant_(module.weight, math.nan)
    module.requires_grad_(False)
    module._is_hf_initialized = True
    return module


@torch.no_grad()
def _fill(weight: Tensor, values: Tensor) -> None:
    weight.copy_(values)
