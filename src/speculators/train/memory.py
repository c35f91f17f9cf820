"""The memory of each rank, measured before the run and not calculated: the drafter takes a step on two short rows of
random states, on the device and by the route of the run, and the tensors that live at once are counted. Both memory and
time grow with the row: what the whole row takes is on the line through the two.

Shapes: T tokens of a row, H hidden size, A aux layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from speculators.data_generation.configs import parse_bytes
from speculators.losses.chunks import FEWEST_ROWS, elements_per_chunk, rows_per_chunk
from speculators.model import SpeculatorModel
from speculators.nn.decoder import recompute_mlps
from speculators.train.config import TrainConfig
from speculators.train.data import ArrowDataset, Batch, CollateFn
from speculators.train.distributed import own_part
from speculators.train.optimizers import suits_muon
from speculators.train.records import BYTES_FP32, checkpoint_bytes
from speculators.train.trainer import Trainer
from speculators.utils.report import human_bytes
from speculators.utils.util import LiveBytes

PROBE_TOKENS = 512
"""Shorter row of the probe; the other is twice as long. A row of the run that is no longer is measured itself."""
LEAST_CHUNK = 1 << 16
"""Logits of the smallest chunks that --max-memory tries, where these are `FEWEST_ROWS` of them or more."""


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
    model_flop: int | None = None
    """Of a row; None where the algorithm counts none."""


def probe(trainer: Trainer, config: TrainConfig, num_tokens: int, hidden_size: int, supervised: float) -> Probe:
    """Measures forward and backward; weights and random numbers stay as they are."""
    batch = random_row(trainer.model, config, num_tokens, hidden_size, supervised)
    device, kept = trainer.ranks.device, trainer.ranks.random_state()
    trainer.model.train()
    inputs = trainer.ranks.moved(batch, left_out=("error_records",), on_host=trainer.model.columns_on_host)
    before = [*trainer.model.parameters(), *trainer.model.buffers(), *inputs.values()]
    counted = LiveBytes(before)
    try:
        with counted if device.type == "cpu" else nullcontext():  # and on a GPU the step that compiles
            row_of_step(trainer, inputs)
        trainer.optimizers.zero_grad()
        base = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            base = torch.cuda.memory_allocated(device)
        time_s = row_of_step(trainer, inputs)
        peak = counted.peak if device.type == "cpu" else torch.cuda.max_memory_allocated(device) - base
    finally:
        trainer.optimizers.zero_grad()
        trainer.ranks.set_random_state(kept)
    return Probe(num_tokens, peak, time_s, trainer.model.row_flop)


def row_of_step(trainer: Trainer, inputs: Batch) -> float:
    """Takes a row, beside the gradients of the rows before it where a step has several, and returns its seconds."""
    if trainer.rows_a_step > 1:
        one_row(trainer, inputs, is_last=False)
    start = time.perf_counter()
    one_row(trainer, inputs, is_last=True)
    return time.perf_counter() - start


def one_row(trainer: Trainer, inputs: Batch, *, is_last: bool) -> None:
    with trainer.parallel.row(is_last):
        loss, _ = trainer.forward(trainer.parallel.module, inputs, trainer.config.train_call_kwargs)
        loss.backward()
    if trainer.ranks.device.type == "cuda":
        torch.cuda.synchronize(trainer.ranks.device)


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
    length, num_anchors = config.data.total_seq_len, trainer.config.train_call_kwargs.get("max_anchors") or 0
    chunk_rows = rows_per_chunk(trainer.ranks.device, logits_width(trainer.model), trainer.chunk_elements)
    fills_a_chunk = chunk_rows < supervised * length
    lengths = probe_lengths(length, max(num_anchors, chunk_rows if fills_a_chunk else 0), supervised)
    return [probe(trainer, config, num_tokens, hidden_size, supervised) for num_tokens in lengths]


def logits_width(model: SpeculatorModel) -> int:
    widest = max(param.shape[0] for param in model.parameters() if param.ndim == 2)
    return getattr(model, "draft_vocab_size", None) or widest


def probe_lengths(length: int, num_asked: int, supervised: float) -> list[int]:
    """Both rows have all the anchors that are sampled and fill a chunk of logits: until then a step grows faster with
    the row than after. `num_asked`: supervised tokens that this takes."""
    short = max(PROBE_TOKENS, math.ceil(1.25 * num_asked / supervised))
    return [length] if length <= 2 * short else [short, 2 * short]


def at_length(points: Sequence[tuple[int, float]], length: int) -> float:
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


def measure_memory(
    trainer: Trainer, config: TrainConfig, train_set: ArrowDataset, hidden_size: int, verifier_bytes: int
) -> tuple[list[Probe], MemoryEstimate]:
    """Measures what a rank needs. With --max-memory the trainer's steps take less from here on, if they have to: the
    largest chunks of logits that fit, without recomputing where that is enough. Raises `ValueError` where it is not.
    """

    def measure(chunk_elements: int | None) -> tuple[list[Probe], MemoryEstimate]:
        trainer.chunk_elements = chunk_elements
        probes = probes_of(trainer, config, train_set, hidden_size)
        return probes, estimate_memory(trainer, config, probes, hidden_size, verifier_bytes)

    if config.trainer.max_memory is None:
        return measure(trainer.chunk_elements)
    limit_bytes, given = parse_bytes(config.trainer.max_memory), trainer.chunk_elements
    fewest = max(LEAST_CHUNK, FEWEST_ROWS * logits_width(trainer.model))
    sizes = chunk_sizes(given or elements_per_chunk(trainer.ranks.device), fewest)
    last: tuple[list[Probe], MemoryEstimate] | None = None

    def fitting(chunk_elements: int | None) -> tuple[list[Probe], MemoryEstimate] | None:
        """None where it does not fit on every rank: probes are taken together."""
        nonlocal last
        try:
            last = measure(chunk_elements)
        except torch.OutOfMemoryError:
            if trainer.ranks.world_size > 1:  # others may wait for this one inside the step
                raise
            last = None
            return None
        return None if trainer.ranks.any(last[1].total_bytes > limit_bytes) else last

    def shrunk() -> tuple[list[Probe], MemoryEstimate] | None:
        return fitting(sizes[-1]) if len(sizes) > 1 else None

    if (found := fitting(given)) is not None:
        return found
    best = shrunk()
    if best is None and recompute_mlps(trainer.model):
        if (found := fitting(given)) is not None:
            return found
        best = shrunk()
    if best is None:
        raise ValueError(too_large(None if last is None else last[1], config))
    low, high = 0, len(sizes) - 1  # sizes[low] is too large, sizes[high] fits
    while high - low > 1:
        middle = (low + high) // 2
        found = fitting(sizes[middle])
        best, low, high = (best, middle, high) if found is None else (found, low, middle)
    trainer.chunk_elements = sizes[high]
    return best


def chunk_sizes(largest: int, smallest: int) -> list[int]:
    """Logits of a chunk that are tried: halves, until chunks cannot have fewer."""
    sizes = [largest]
    while sizes[-1] > smallest:
        sizes.append(max(sizes[-1] // 2, smallest))
    return sizes


def too_large(found: MemoryEstimate | None, config: TrainConfig) -> str:
    """Says what does not fit, by use, and what would. `found`: None where the device could not hold a step at all."""
    limit_bytes, length = parse_bytes(str(config.trainer.max_memory)), config.data.total_seq_len
    tried = (
        f"--max-memory {config.trainer.max_memory}: with the smallest chunks of logits, "
        "and what can be recomputed recomputed, "
    )
    if found is None:
        needs = f"the device has no memory left for a step on a row of --total-seq-len {length}"
        return f"{tried}{needs}. Ways out: a smaller --total-seq-len, --fsdp-shard over the ranks of torchrun"
    with_row = found.states_bytes + found.activations_bytes
    kept = found.total_bytes - with_row
    if kept > limit_bytes:
        what = f"what stays between steps takes {human_bytes(kept)} alone, whatever the length of a row"
        ways = []
    else:
        what = f"a row of --total-seq-len {length} takes {human_bytes(with_row)} beside {human_bytes(kept)} that stay"
        ways = ["a smaller --total-seq-len"]
    ways += ["--fsdp-shard over the ranks of torchrun", "a smaller --draft-vocab-size"]
    ways += ["the verifier on a server (--vllm-endpoint)"] if found.verifier_bytes else []
    return f"{tried}each rank needs {found}. {what[0].upper()}{what[1:]}. Ways out: {', '.join(ways)}"


def weights_of(config: PretrainedConfig, dtype: str, num_ranks: int = 1) -> int:
    """Bytes of a verifier, without its weights, on each of the ranks that split it: all have the embedding whole."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    embedding = sum(param.numel() for param in model.get_input_embeddings().parameters())
    split = sum(param.numel() for param in model.parameters()) - embedding
    return (embedding + split // num_ranks) * getattr(torch, dtype).itemsize
