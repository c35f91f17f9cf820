"""`CheckpointContract`: what an algorithm knows of its checkpoints and of the engine that serves them.

An algorithm's folder subclasses it where the defaults are not enough, and its model class names the object
(`SpeculatorModel.contract`). `speculators.deploy` and `speculators.convert` ask it; they know no algorithm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from speculators.checkpoint.findings import Finding
from speculators.checkpoint.formats import SPECULATORS, CheckpointFormat, Serving

if TYPE_CHECKING:
    from speculators.config import SpeculatorModelConfig
    from speculators.model import SpeculatorModel


class CheckpointContract:
    """The defaults fit an algorithm that is only trained and decoded here."""

    formats: ClassVar[tuple[CheckpointFormat, ...]] = ()
    """Formats of other projects."""
    served_format: ClassVar[str | None] = None
    """The format of the directory that vLLM serves (`findings.VLLM_PROFILE`); None: it serves no such drafter."""

    training_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of config.json that only training reads."""

    borrows_from_verifier: ClassVar[bool] = False
    """Whether `embed_tokens` and `lm_head` are the verifier's, as `DraftVocabMixin` has them."""

    def expected_tensors(self, model_class: type[SpeculatorModel], config: SpeculatorModelConfig) -> dict[str, Tensor]:
        """Name, shape and kind of every tensor on disk, without data."""
        with torch.device("meta"):
            model: Any = model_class.to_be_loaded(copy.deepcopy(config))
        left_out = set(model._keys_to_ignore_on_save or ())
        return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}

    def shared_tensors(self, config: SpeculatorModelConfig) -> frozenset[str]:
        """Tensors a checkpoint may leave out, because engines then use the verifier's: the embedding unless it is
        trained, the head unless it has rows of its own."""
        if not self.borrows_from_verifier:
            return frozenset()
        is_trained = getattr(config, "embed_requires_grad", False)
        is_whole = getattr(config, "draft_vocab_size", None) == getattr(config, "target_vocab_size", None)
        embedding = [] if is_trained else ["embed_tokens.weight"]
        return frozenset([*embedding, *(["lm_head.weight"] if is_whole else [])])

    def verifier_copies(self, config: SpeculatorModelConfig) -> Mapping[str, str]:
        """Tensors that are the verifier's, unchanged: name on disk -> name in the verifier (a head of fewer rows: its
        rows by `d2t`)."""
        if not self.borrows_from_verifier:
            return {}
        is_trained = getattr(config, "embed_requires_grad", False)
        names = ["lm_head.weight"] if is_trained else ["embed_tokens.weight", "lm_head.weight"]
        return {name: name for name in names}

    def findings(self, values: Mapping[str, Any], config: SpeculatorModelConfig) -> list[Finding]:
        """What vLLM would drop, misread or refuse. `values` is config.json as it is, `config` what we read in it."""
        return []

    def completed(self, config: SpeculatorModelConfig) -> SpeculatorModelConfig:
        """A copy of the config with every key written that engines read."""
        return copy.deepcopy(config)

    def format_named(self, name: str) -> CheckpointFormat:
        for known in self.formats:
            if known.name == name:
                return known
        raise ValueError(
            f"this drafter has no format {name!r}; it has {[SPECULATORS, *(known.name for known in self.formats)]}"
        )

    def serving(self, config: SpeculatorModelConfig, format_name: str, directory: str, verifier: str) -> Serving | None:
        """How vLLM serves a directory of that format; None: it does not."""
        if format_name == SPECULATORS:
            return Serving(directory) if self.served_format == SPECULATORS else None
        return self.format_named(format_name).serving(config, directory, verifier)
