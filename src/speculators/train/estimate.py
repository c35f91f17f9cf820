"""What a run needs, said before it: memory of each rank, time, disk, tokens; and what acceptance such data gave.

The memory and the time of a step are measured, not calculated: the drafter takes a step on two short rows of random
states, on the device and by the route of the run, and the tensors that live at once are counted. Both grow with the
row: what the whole row takes is on the line through the two.

Shapes: T tokens of a row, H hidden size, A aux layers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from speculators.model import SpeculatorModel
from speculators.train.checkpoint_files import is_saved_epoch
from speculators.train.config import TrainConfig
from speculators.train.data import ArrowDataset, CollateFn
from speculators.train.distributed import own_part
from speculators.train.optimizers import num_steps_of, suits_muon
from speculators.train.records import BYTES_FP32, checkpoint_bytes
from speculators.train.sources import computes_in_process
from speculators.train.trainer import Trainer
from speculators.utils.report import TableReport, facts_table, human_bytes
from speculators.utils.util import LiveBytes

PROBE_TOKENS = 512
"""Shorter row of the probe; the other is twice as long. A row of the run that is no longer is measured itself."""
NEAR = 4.0
"""Records of up to so many times more or fewer trained tokens are near."""


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
    """All else that lives at the peak of a step: kept activations, a chunk of logits, casts of weights."""
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
        one_step(trainer, inputs)
    trainer.optimizers.zero_grad()
    base = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    one_step(trainer, inputs)
    peak = counted.peak if device.type == "cpu" else torch.cuda.max_memory_allocated(device) - base
    time_s = time.perf_counter() - start
    trainer.optimizers.zero_grad()
    trainer.ranks.set_random_state(kept)
    return Probe(num_tokens, peak, time_s)


def one_step(trainer: Trainer, inputs: Mapping[str, Any]) -> None:
    device, dtype = trainer.ranks.device, trainer.config.hidden_states_dtype
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with trainer.parallel.row(is_last=True):
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


@dataclass(frozen=True)
class RunEstimate(TableReport):
    """What a run needs. Times and bytes of each rank."""

    speculator_type: str
    device: str
    memory: MemoryEstimate
    probes: tuple[Probe, ...]
    tokens_per_epoch: int
    supervised_per_epoch: int
    num_epochs: int
    num_steps: int
    step_s: float
    num_checkpoints: int
    stored_states_bytes: int
    """0: states are computed and forgotten."""
    records: tuple[dict[str, Any], ...]

    @property
    def num_trained_tokens(self) -> int:
        """Supervised tokens, counted each time they are trained on."""
        return self.supervised_per_epoch * self.num_epochs

    @property
    def disk_bytes(self) -> int:
        return self.num_checkpoints * self.memory.checkpoint_bytes + self.stored_states_bytes

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["memory"] |= {"total_bytes": self.memory.total_bytes}
        return values | {"time_s": self.step_s * self.num_steps, "disk_bytes": self.disk_bytes}

    def tables(self) -> list[Table]:
        measured = " and ".join(f"{probe.num_tokens:,}" for probe in self.probes)
        memory = {use: human_bytes(num_bytes) for use, num_bytes in self.memory.uses().items()}
        states = f", stored states {human_bytes(self.stored_states_bytes)}" if self.stored_states_bytes else ""
        checkpoints = f"{self.num_checkpoints} checkpoints of {human_bytes(self.memory.checkpoint_bytes)}"
        facts: dict[str, object] = {
            "memory of each rank": human_bytes(self.memory.total_bytes),
            **{f"  {use}": shown for use, shown in memory.items()},
            "time": f"{self.step_s * self.num_steps / 3600:.2f} h: {self.num_steps:,} steps of {self.step_s:.3g} s",
            "  measured": f"a step of the drafter alone on {self.device}, on rows of {measured} tokens; computing or "
            "waiting for verifier states, validations and checkpoints come on top",
            "disk": f"{human_bytes(self.disk_bytes)}: {checkpoints}{states}",
            "tokens": f"{self.tokens_per_epoch:,} per epoch, {self.supervised_per_epoch:,} of them supervised; "
            f"{self.num_epochs} epochs",
        }
        return [facts_table(f"Estimate: {self.speculator_type}", facts), self.records_table()]

    def records_table(self) -> Table:
        table = Table(title="Acceptance on record", title_justify="left")
        for name in ("verifier", "data", "tokens per round", "command"):
            table.add_column(name, overflow="fold")
        for record in self.records:
            length = f"{record['acceptance_length']:.2f} at K = {record['num_drafts']}"
            table.add_row(record["verifier"], record["data"], length, record["command"])
        return table

    def sentence(self) -> str:
        near = "" if self.records else f"; no record of {self.speculator_type} near {self.num_trained_tokens:,} tokens"
        return f"about {human_bytes(self.memory.total_bytes)} of memory for each rank{near}"


def estimate_run(
    trainer: Trainer, config: TrainConfig, train_set: ArrowDataset, verifier_config: PretrainedConfig, hidden_size: int
) -> RunEstimate:
    """Estimates without training and without the verifier's weights; of those the drafter reads its own copies."""
    is_here = computes_in_process(config.data) or config.trainer.eval_prompts
    verifier_bytes = weights_of(verifier_config, config.data.hidden_states_dtype) if is_here else 0
    supervised, num_tokens = int(train_set.trained_per_row(train_set.max_len).sum()), sum(train_set.lengths)
    probes = probes_of(trainer, config, train_set, hidden_size)
    memory = estimate_memory(trainer, config, probes, hidden_size, verifier_bytes)
    kept = config.data.cache_hidden_states * num_tokens * memory.states_bytes // config.data.total_seq_len
    keys, times = config.trainer, [(probe.num_tokens, probe.time_s) for probe in probes]
    num_epochs = math.ceil(
        keys.epochs * trainer.num_steps / num_steps_of(trainer.train_loader, keys.epochs, trainer.rows_a_step)
    )
    saved = [n for n in range(num_epochs) if is_saved_epoch(keys.checkpoint_freq, n) or n == num_epochs - 1]
    return RunEstimate(
        speculator_type=config.speculator_type,
        device=str(trainer.ranks.device),
        memory=memory,
        probes=tuple(probes),
        tokens_per_epoch=num_tokens,
        supervised_per_epoch=supervised,
        num_epochs=num_epochs,
        num_steps=trainer.num_steps,
        step_s=trainer.rows_a_step * max(at_length(times, config.data.total_seq_len), 0.0),
        num_checkpoints=1 if keys.save_best else len(saved),  # a later one of an epoch replaces the one before
        stored_states_bytes=kept,
        records=tuple(records_near(config.speculator_type, supervised * num_epochs)),
    )


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
    return MemoryEstimate(
        weights_bytes=num_trained * BYTES_FP32,
        frozen_bytes=sum(param.numel() * param.element_size() for param in frozen),
        gradients_bytes=num_trained * BYTES_FP32,
        optimizer_bytes=moments * BYTES_FP32,
        verifier_bytes=verifier_bytes,
        states_bytes=length * hidden_size * num_states * getattr(torch, config.data.hidden_states_dtype).itemsize,
        activations_bytes=max(0, peak - num_trained * BYTES_FP32),
        checkpoint_bytes=checkpoint_bytes(model),
    )


def weights_of(config: PretrainedConfig, dtype: str) -> int:
    """Bytes of a verifier, without its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return sum(param.numel() for param in model.parameters()) * getattr(torch, dtype).itemsize


def records_near(speculator_type: str, num_trained_tokens: int) -> list[dict[str, Any]]:
    """Measured trainings of this algorithm on about as many trained tokens, nearest first."""
    records = json.loads(files("speculators.assets").joinpath("acceptance.json").read_text())
    near = [
        (distance, record)
        for record in records
        if record["speculator_type"] == speculator_type
        and (distance := abs(math.log(record["num_trained_tokens"] / max(num_trained_tokens, 1)))) <= math.log(NEAR)
    ]
    return [record for _, record in sorted(near, key=lambda pair: pair[0])]
