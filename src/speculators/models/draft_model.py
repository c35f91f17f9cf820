"""What drafters share that have an embedding, a head and perhaps a vocabulary of their own (`DraftVocabMixin`).

Shapes: V verifier vocabulary, H hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from typing_extensions import Self

from speculators.draft_vocab import DraftVocabMixin, was_never_loaded
from speculators.model import SpeculatorModel
from speculators.nn.draft_vocab import select_rows
from speculators.verifier.capture import fitting_embedding


class DraftModel(DraftVocabMixin, SpeculatorModel):  # type: ignore[misc]
    """Subclasses define `fc`, which reads the verifier's states."""

    fc: nn.Linear

    def beside(self, verifier_model: Any) -> Self:
        """This drafter in the verifier's dtype, on its device, complete with its embedding and head."""
        source = fitting_embedding(verifier_model, self.verifier_vocab_size, self.hidden_size)
        model = self
        if self.fc.weight.dtype != source.dtype or self.fc.weight.device != source.device:
            model = copy.deepcopy(self)  # training keeps its own
            model.to(device=source.device, dtype=source.dtype)  # type: ignore[call-arg]
        if was_never_loaded(model.embed_tokens.weight):
            model.embed_tokens.weight.data.copy_(source)
        if was_never_loaded(model.lm_head.weight):
            model.lm_head.weight.data.copy_(select_rows(verifier_model.get_output_embeddings().weight, model.t2d))
        return model
