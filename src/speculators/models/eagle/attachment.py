"""Attaches a drafter to its verifier: to nothing of it, to the layers it computes with, or to the whole model.

    detached      nothing
    train_only    embedding, head and final norm (read from the verifier's files), rope
    full          the same modules of a loaded verifier, and the verifier itself: needed to generate

None of these belong to the drafter: modules of a loaded verifier are not registered (so not cast, moved or trained),
and `state_dict` leaves all of them out.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.nn.norms import RMSNorm
from speculators.nn.rope import Rope
from speculators.verifier.capture import fitting_embedding, verifier_parts
from speculators.verifier.config import LogitTransform, logit_transform
from speculators.verifier.loading import load_verifier, read_verifier_weights

DETACHED, TRAIN_ONLY, FULL = "detached", "train_only", "full"
BORROWED = ("embed_tokens", "rotary_emb", "lm_head", "verifier_norm")

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class VerifierAttachment(_Base):
    """A mixin for the drafter's class; list it before the model base."""

    config: Any
    verifier_attachment_mode: str = DETACHED

    def detach_all(self) -> None:
        for name in (*BORROWED, "verifier"):
            self.set_unregistered(name, None)
        self.target_transform = LogitTransform()
        self.verifier_attachment_mode = DETACHED
        self.is_attached_for_loading = False

    def set_unregistered(self, name: str, value: Any) -> None:
        """Sets an attribute without registering it as a module of the drafter."""
        self._modules.pop(name, None)
        self.__dict__[name] = value

    def attach_verifier(self, verifier: Any, mode: str | None = None) -> PreTrainedModel:
        """Attaches a verifier (a model, its path or id), all of it or the part that training needs; returns it."""
        mode = mode or FULL
        if self.verifier_attachment_mode != DETACHED and not self.is_attached_for_loading:
            raise RuntimeError("a verifier is attached already; call detach_verifier() first")
        if mode not in (FULL, TRAIN_ONLY):
            raise ValueError(f"verifier_attachment_mode={mode!r} is neither 'full' nor 'train_only'")
        if not verifier and not isinstance(verifier, nn.Module):
            raise ValueError(f"verifier={verifier!r}: give a model, or the path or id of one")
        if isinstance(verifier, (str, os.PathLike)):
            verifier = load_verifier(os.fspath(verifier))
        if not isinstance(verifier, PreTrainedModel):
            raise TypeError(
                f"verifier is a {type(verifier).__name__}; give a PreTrainedModel, or the path or id of one"
            )
        parts = verifier_parts(verifier)
        self.detach_all()
        nested = self.config.transformer_layer_config
        fitting_embedding(verifier, nested.vocab_size, nested.hidden_size)
        decoder = getattr(verifier, "model", verifier)
        self.set_unregistered("embed_tokens", verifier.get_input_embeddings())
        self.set_unregistered("lm_head", parts.head)
        self.set_unregistered("verifier_norm", parts.final_norm)
        self.set_unregistered("rotary_emb", getattr(decoder, "rotary_emb", None) or Rope(nested))
        if mode == FULL:
            self.set_unregistered("verifier", verifier)
        self.target_transform = logit_transform(verifier.config)
        self.verifier_attachment_mode = mode
        return verifier

    def detach_verifier(self) -> None:
        if self.verifier_attachment_mode == DETACHED:
            raise RuntimeError("no verifier is attached")
        self.detach_all()

    def attach_files(self, path: str) -> None:
        """What training needs from the verifier's files, as frozen modules of our own: the verifier is not loaded."""
        nested = self.config.transformer_layer_config
        weights = read_verifier_weights(path, vocab_size=nested.vocab_size, hidden_size=nested.hidden_size)
        assert weights.embedding_VH is not None
        self.detach_all()
        like = next(self.parameters())
        embedding = nn.Embedding(nested.vocab_size, nested.hidden_size, device="meta")
        norm = weights.fill_norm(RMSNorm(nested.hidden_size))
        self.add_frozen("embed_tokens", embedding, weights.embedding_VH, like)
        self.add_frozen("lm_head", head_of(weights.head_VH), weights.head_VH, like)
        self.add_frozen("verifier_norm", norm.to(like), cast("Tensor", norm.weight), like)
        self.set_unregistered("rotary_emb", Rope(nested))
        self.target_transform = weights.logit_transform
        self.verifier_attachment_mode, self.is_attached_for_loading = TRAIN_ONLY, True

    def add_frozen(self, name: str, module: nn.Module, weight: Tensor, like: Tensor) -> None:
        module.weight = nn.Parameter(weight.to(like), requires_grad=False)
        self.__dict__.pop(name, None)
        self.add_module(name, module)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The drafter's tensors, without the verifier's weights."""
        tensors = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        owned = tuple(f"{prefix}{name}." for name in (*BORROWED, "verifier"))
        for name in [name for name in tensors if name.startswith(owned)]:
            del tensors[name]
        return tensors


def head_of(weight_VH: Tensor) -> nn.Linear:
    """Builds a head that shares a weight."""
    V, H = weight_VH.shape
    linear = nn.Linear(H, V, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_VH.detach(), requires_grad=False)
    return linear


def no_grad_weight(module: Any) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()
