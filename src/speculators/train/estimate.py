"""What a run is estimated to need, before it: memory and disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from speculators.model import SpeculatorModel
from speculators.train.config import TrainConfig
from speculators.utils.report import human_bytes

BYTES_FP32, BYTES_BF16 = 4, 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of a run, by use. `str()` is a sentence."""

    weights_bytes: int
    """Masters, gradients and optimizer moments of the drafter, and its frozen copies of verifier weights."""
    verifier_bytes: int
    states_bytes: int
    """Verifier states of one packed row."""
    activations_bytes: int
    """Drafter activations and one block of logits, for the backward pass."""
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.verifier_bytes + self.states_bytes + self.activations_bytes

    def __str__(self) -> str:
        parts = {
            "drafter and optimizer": self.weights_bytes,
            "verifier": self.verifier_bytes,
            "states": self.states_bytes,
            "activations": self.activations_bytes,
        }
        uses = ", ".join(f"{use} {human_bytes(num_bytes)}" for use, num_bytes in parts.items())
        checkpoint = human_bytes(self.checkpoint_bytes)
        return f"about {human_bytes(self.total_bytes)} of memory: {uses}; {checkpoint} of disk per checkpoint"


def estimate_memory(
    model: SpeculatorModel, *, num_tokens: int, hidden_size: int, num_states: int, num_unrolls: int, verifier_bytes: int
) -> MemoryEstimate:
    """Estimates a run on packed rows of `num_tokens`.

    `num_unrolls`: forwards of the draft layers per row; `num_states`: verifier states kept per token.
    """
    num_trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
    num_frozen = sum(param.numel() for param in model.parameters() if not param.requires_grad)
    num_layers = len(list(model.layers))  # type: ignore[arg-type]
    # A gated decoder layer keeps about 16 vectors of its hidden width for the backward pass, in 16 bits.
    activations = num_tokens * hidden_size * 16 * num_layers * num_unrolls * BYTES_BF16
    return MemoryEstimate(
        weights_bytes=num_trainable * 4 * BYTES_FP32 + num_frozen * BYTES_FP32,
        verifier_bytes=verifier_bytes,
        states_bytes=num_tokens * hidden_size * num_states * BYTES_BF16,
        activations_bytes=activations,
        checkpoint_bytes=num_trainable * 3 * BYTES_FP32 + (num_trainable + num_frozen) * BYTES_BF16,
    )


def estimate(
    config: TrainConfig, model: SpeculatorModel, verifier_model: PreTrainedModel | None, hidden_size: int
) -> MemoryEstimate:
    methods = model.config.speculators_config.proposal_methods if model.config.speculators_config else []
    num_unrolls = max([getattr(method, "speculative_tokens", 1) for method in methods], default=1)
    params = [] if verifier_model is None else list(verifier_model.parameters())
    return estimate_memory(
        model,
        num_tokens=config.data.total_seq_len,
        hidden_size=hidden_size,
        num_states=len(model.capture.aux_layer_ids) + 1,
        num_unrolls=num_unrolls,
        verifier_bytes=sum(param.numel() * param.element_size() for param in params),
    )


def check_disk_space(path: Path, num_bytes: int) -> None:
    """Raises `OSError` if the disk cannot hold a checkpoint: an error now is cheaper than one after an epoch."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            f"a checkpoint takes {human_bytes(num_bytes)} but {existing} has {human_bytes(free)} free: free some "
            "space, or choose another --output"
        )
