"""The memory of each rank, measured before the run and not calculated: the drafter takes a step on two short rows of
random states, on the device and by the route of the run, and the tensors that live at once are counted. Both memory and
time grow with the row: what the whole row takes is on the line through the two.

Shapes: T tokens of a row, H hidden size, A aux layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators.model import SpeculatorModel
from speculators.train.config import TrainConfig
from speculators.train.data import ArrowDataset, CollateFn
from speculators.train.distributed import own_part
from speculators.train.optimizers import suits_muon
from speculators.train.records import BYTES_FP32, checkpoint_bytes
from speculators.train.trainer import Trainer
from speculators.utils.report import human_bytes
from speculators.utils.util import LiveBytes

PROBE_TOKENS = 512
"""Shorter row of the probe; the other is twice as long. A row of the run that is no longer is measured itself."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of one rank, by use. `str()` is a sentence."""

    weights_bytes: int
    """fp32 masters of what is trained."""
    frozen_bytes: int
    """Copies of verifier weights that the drafter reads."""
    gradients_bytes: int
    optimizer_bytes: int
    verifier_bytes: int
    """0: it is not in this process."""
    states_bytes: int
    """Verifier states of one packed row."""
    activations_bytes: int
    """All else that lives at the peak of a step: kept activations, a chunk of logits, casts and gathered weights."""
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(vars(self).values()) - self.checkpoint_bytes

    def uses(self) -> dict[str, int]:
        return {name.removesuffix("_bytes"): value for name, value in vars(self).items() if name != "checkpoint_bytes"}

    def __str__(self) -> str:
        uses = ", ".join(f"{use} {human_bytes(num_bytes)}" for use, num_bytes in self.uses().items() if num_bytes)
        disk = human_bytes(self.checkpoint_bytes)
        return f"about {human_bytes(self.total_bytes)} of memory: {uses}; {disk} of disk per checkpoint"


@dataclass(frozen=True)
class Probe:
    """A step of the drafter alone, on a row of `num_tokens`."""

    num_tokens: int
    peak_bytes: int
    """Of what the step makes, gradients included."""
    time_s: float


def probe(trainer: Trainer, config: TrainConfig, num_tokens: int, hidden_size: int, supervised: float) -> Probe:
    """Measures forward and backward; weights and random numbers stay as they are."""
    batch = random_row(trainer.model, config, num_tokens, hidden_size, supervised)
    device, kept = trainer.ranks.device, trainer.ranks.random_state()
    trainer.model.train()
    inputs = trainer.ranks.moved(batch, left_out=("error_records",), on_host=trainer.model.columns_on_host)
    before = [*trainer.model.parameters(), *trainer.model.buffers(), *inputs.values()]
    counted = LiveBytes(before)
    with counted if device.type == "cpu" else nullcontext():  # and on a GPU the step that compiles
        row_of_step(trainer, inputs)
    trainer.optimizers.zero_grad()
    base = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    time_s = row_of_step(trainer, inputs)
    peak = counted.peak if device.type == "cpu" else torch.cuda.max_memory_allocated(device) - base
    trainer.optimizers.zero_grad()
    trainer.ranks.set_random_state(kept)
    return Probe(num_tokens, peak, time_s)


def row_of_step(trainer: Trainer, inputs: Mapping[str, Any]) -> float:
    """Takes a row, beside the gradients of the rows before it where a step has several, and returns its seconds."""
    if trainer.rows_a_step > 1:
        one_row(trainer, inputs, is_last=False)
    start = time.perf_counter()
    one_row(trainer, inputs, is_last=True)
    return time.perf_counter() - start


def one_row(trainer: Trainer, inputs: Mapping[str, Any], *, is_last: bool) -> None:
    device, dtype = trainer.ranks.device, trainer.config.hidden_states_dtype
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with trainer.parallel.row(is_last):
        with autocast:
            _, loss, metrics = trainer.model(**inputs, **trainer.config.train_call_kwargs)
        (metrics["loss"] if loss is None else loss).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_row(
    model: SpeculatorModel, config: TrainConfig, num_tokens: int, hidden_size: int, supervised: float
) -> dict[str, Tensor]:
    """Two documents of random tokens and states, collated as rows of the run are."""
    dtype, num_aux = getattr(torch, config.data.hidden_states_dtype), len(model.capture.aux_layer_ids)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (num_tokens // 2, num_tokens - num_tokens // 2):
        states = torch.randn(length, (num_aux + 1) * hidden_size, generator=generator).to(dtype)
        samples.append(
            {
                "hidden_states": states[:, : num_aux * hidden_size],
                "verifier_last_hidden_states": states[:, num_aux * hidden_size :],
                "input_ids": torch.randint(0, 8, (length,), generator=generator),
                "loss_mask": (torch.arange(length) >= length * (1 - supervised)).long(),
                "lengths": torch.tensor([length]),
                "position_ids": torch.arange(length),
            }
        )
    return CollateFn(num_tokens, hidden_size, num_aux, dtype, model.align)(samples)


def probes_of(trainer: Trainer, config: TrainConfig, train_set: ArrowDataset, hidden_size: int) -> list[Probe]:
    """With the share of supervised tokens that the data have."""
    supervised = float(train_set.trained_per_row(train_set.max_len).sum() / sum(train_set.lengths))
    num_anchors = trainer.config.train_call_kwargs.get("max_anchors") or 0
    lengths = probe_lengths(config.data.total_seq_len, num_anchors, supervised)
    return [probe(trainer, config, num_tokens, hidden_size, supervised) for num_tokens in lengths]


def probe_lengths(length: int, num_anchors: int, supervised: float) -> list[int]:
    """Both rows have all the anchors that are sampled: with more of them a step grows faster than with tokens."""
    short = max(PROBE_TOKENS, math.ceil(1.25 * num_anchors / supervised))
    return [length] if length <= 2 * short else [short, 2 * short]


def at_length(points: list[tuple[int, float]], length: int) -> float:
    """The value at that length, on the line through the points."""
    if len(points) == 1:
        return points[0][1]
    (x0, y0), (x1, y1) = points
    return y1 + (y1 - y0) / (x1 - x0) * (length - x1)


def estimate_memory(
    trainer: Trainer, config: TrainConfig, probes: Sequence[Probe], hidden_size: int, verifier_bytes: int
) -> MemoryEstimate:
    model, length = trainer.model, config.data.total_seq_len
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    num_trained = sum(own_part(param).numel() for _, param in trained)
    by_muon = config.optimizer.optimizer == "muon"
    num_moments = [1 if by_muon and suits_muon(name, param) else 2 for name, param in trained]
    moments = sum(own_part(param).numel() * num for (_, param), num in zip(trained, num_moments, strict=True))
    frozen = [param for param in model.parameters() if not param.requires_grad]
    num_states = len(model.capture.aux_layer_ids) + 1
    peak = round(at_length([(probe.num_tokens, probe.peak_bytes) for probe in probes], length))
    peak -= 0 if trainer.parallel.keeps_gradients else num_trained * BYTES_FP32  # what is kept was there before
    return MemoryEstimate(
        weights_bytes=num_trained * BYTES_FP32,
        frozen_bytes=sum(param.numel() * param.element_size() for param in frozen),
        gradients_bytes=num_trained * BYTES_FP32,
        optimizer_bytes=moments * BYTES_FP32,
        verifier_bytes=verifier_bytes,
        states_bytes=length * hidden_size * num_states * getattr(torch, config.data.hidden_states_dtype).itemsize,
        activations_bytes=max(0, peak),
        checkpoint_bytes=checkpoint_bytes(model),
    )
