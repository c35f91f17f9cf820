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

from speculators.losses.chunks import OutsideHead
from speculators.nn.draft_tokens import select_rows
from speculators.verifier.config import LogitTransform
from speculators.verifier.loading import read_verifier_weights

logger = logging.getLogger(__name__)

VERIFIER_ONLY_KEYS = ["verifier_lm_head.weight", "verifier_norm.weight", "verifier_norm.bias"]

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
    target_transform = LogitTransform()
    """What the verifier does to the numbers its head gives."""
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
        self._outside_head: OutsideHead | None = None
        self._is_flattery_said = False
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
        self._outside_head = None

    def load_verifier_weights(self) -> None:
        """Fill from the verifier: its norm and head always, the embedding and the draft head where nothing was loaded.

        Nothing to do when the config names no verifier."""
        self.freeze_verifier_weights()
        path = self.config.recorded_verifier
        if path is None:
            return
        norm = getattr(self, "verifier_norm", None)
        weights = read_verifier_weights(
            path, vocab_size=self.verifier_vocab_size, hidden_size=self.hidden_size, needs_norm=norm is not None
        )
        if self.use_draft_vocab and not bool(self.t2d.any()):  # type: ignore[union-attr]
            raise ValueError(
                "t2d tensor hasn't been set, so the rows of the verifier's head cannot be chosen; call "
                "load_vocab_mappings(t2d, d2t) first, or pass both to from_pretrained"
            )
        head_DH = select_rows(weights.head_VH, self.t2d)
        _fill(self.verifier_lm_head.weight, head_DH)
        if was_never_loaded(self.lm_head.weight):
            _fill(self.lm_head.weight, head_DH)
        if was_never_loaded(self.embed_tokens.weight):
            assert weights.embedding_VH is not None
            _fill(self.embed_tokens.weight, weights.embedding_VH)
        if norm is not None:
            self.verifier_norm = weights.fill_norm(norm)
        self.target_transform = weights.logit_transform

    def outside_head(self) -> OutsideHead | None:
        """The rows of the verifier's head outside the draft vocabulary: read when training asks, never saved. None for
        the whole vocabulary, and for a config that names no verifier."""
        path = self.config.recorded_verifier
        if not self.use_draft_vocab:
            return None
        if path is None:
            if not self._is_flattery_said:
                logger.warning(
                    "the config names no verifier, so tokens outside the draft vocabulary of %d are not known: "
                    "accuracies and acceptance lengths count them as the best token inside, and are too high; set "
                    "speculators_config.verifier.name_or_path",
                    self.draft_vocab_size,
                )
                self._is_flattery_said = True
            return None
        device = self.verifier_lm_head.weight.device
        if self._outside_head is None or self._outside_head.weight_OH.device != device:
            weights = read_verifier_weights(
                path,
                vocab_size=self.verifier_vocab_size,
                hidden_size=self.hidden_size,
                needs_embedding=False,
                needs_norm=False,
            )
            assert self.t2d is not None
            kept_V = self.t2d.to(weights.head_VH.device)
            parts = weights.head_VH[~kept_V], (~kept_V).nonzero().flatten(), kept_V.nonzero().flatten()
            self._outside_head = OutsideHead(*(part.to(device) for part in parts))
        return self._outside_head

    def freeze_verifier_weights(self) -> None:
        """Excludes the verifier's weights from training."""
        for name in ("embed_tokens", "lm_head", "verifier_lm_head", "verifier_norm"):
            module = getattr(self, name, None)
            if module is not None:
                module.requires_grad_(False)

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor | None:
        return torch.zeros(size, dtype=dtype) if self.use_draft_vocab else None


def was_never_loaded(weight: Tensor) -> bool:
    return bool(torch.isnan(weight).any())


def _never_loaded(kind: type[nn.Module], *sizes: int, **options: Any) -> Any:
    """A frozen module whose weight is NaN, flagged so that transformers' initialisation leaves it that way."""
    device = torch.get_default_device()
    with torch.device("meta"):  # neither initialised nor, inside a caller's own meta device, ever in memory
        module: Any = kind(*sizes, **options)
    module.to_empty(device=device)
    nn.init.constant_(module.weight, math.nan)
    module.requires_grad_(False)
    module._is_hf_initialized = True
    return module


@torch.no_grad()
def _fill(weight: Tensor, values: Tensor) -> None:
    weight.copy_(values)
