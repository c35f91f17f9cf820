"""Reads the prepared dataset as training samples (tokens and masks from disk, verifier states from a
`HiddenStateSource`) and packs them into batches in the order of the sampler.

Threads read states ahead (`prefetch`); states computed in process are requested one packed row at a time.

Shapes: S tokens of a document, T tokens of the packed row, A aux layers, H hidden size. A sample is a dict of tensors
whose first axis is S.

    row index       0 .. cut-1   cut .. n-1         cut = int(n * train_ratio)
    split           train        val

    documents       a a a | b b                     document_ids   0 0 0 1 1 -1 -1
    position_ids    0 1 2   0 1                     (positions restart; padding is 0 everywhere else)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from speculators.data_generation import MissingStatesError, PreparedData
from speculators.interfaces import HiddenStateSource, VerifierStates
from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2
from speculators.train.prefetch import Batch, DeviceRows, read_ahead

logger = logging.getLogger(__name__)
Sample = dict[str, Tensor]
OnMissing = Literal["generate", "skip", "warn", "raise"]


class CollateFn:
    """Concatenate samples to one row of `max_len` tokens, padded or cut, with a leading axis of one."""

    def __init__(
        self,
        max_len: int,
        hidden_size: int,
        num_target_layers: int = 3,
        dtype: torch.dtype = torch.bfloat16,
        preprocess: Callable[[Sample], Sample] | None = None,
    ):
        self.max_len = max_len
        self.dtype = dtype
        self.preprocess = preprocess
        self.empty: Sample = {
            "hidden_states": torch.zeros(0, num_target_layers * hidden_size, dtype=dtype),
            "verifier_last_hidden_states": torch.zeros(0, hidden_size, dtype=dtype),
            "input_ids": torch.zeros(0, dtype=torch.int64),
            "loss_mask": torch.zeros(0, dtype=torch.int64),
            "position_ids": torch.zeros(0, dtype=torch.int64),
            "lengths": torch.zeros(1, dtype=torch.int64),
        }

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """`None` stands for a sample that could not be had; `error_records` counts them."""
        present = [sample for sample in samples if sample is not None]
        num_missing = len(samples) - len(present)
        present = present or [self.empty]
        if self.preprocess is not None and present[0] is not self.empty:
            present = [self.preprocess(sample) for sample in present]
        lengths = [int(sample["lengths"]) for sample in present]
        document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        row = {key: torch.cat([sample[key] for sample in present]) for key in present[0] if key != "lengths"}
        row = {key: self.fit(value.to(self.dtype) if "hidden_states" in key else value) for key, value in row.items()}
        row["document_ids"] = self.fit(document_ids, padding=-1)
        row["error_records"] = torch.tensor(num_missing)
        return row

    def fit(self, values: Tensor, padding: int = 0) -> Tensor:
        """[S, ...] -> [1, max_len, ...]"""
        values = values[: self.max_len]
        rest = values.new_full((self.max_len - len(values), *values.shape[1:]), padding)
        return torch.cat([values, rest])[None]


__all__ = ["ArrowDataset", "Batch", "BatchLoader", "CollateFn", "ListLoader", "PackedLoader", "Sample", "as_loader"]


class ArrowDataset(Dataset[Sample | None]):
    """The training or validation rows of a prepared directory."""

    def __init__(
        self,
        max_len: int,
        datapath: str | Path,
        source: HiddenStateSource | None = None,
        *,
        train_ratio: float = 1.0,
        split: Literal["train", "val"] = "train",
        hidden_states_dtype: torch.dtype = torch.bfloat16,
        on_missing: OnMissing = "generate",
    ):
        """Clips rows to `max_len` tokens. Without a `source`, only tokens and lengths are available.

        `on_missing` says what becomes of a row whose states the source does not have: "generate" leaves it to the
        source, "raise" raises `RuntimeError`, and the others give None in its place, quietly or with a warning.

        Raises `ValueError` for a ratio outside (0, 1], an empty split and another `on_missing`.
        """
        if not 0.0 < train_ratio <= 1.0:
            raise ValueError(f"train_ratio must be in (0.0, 1.0], not {train_ratio}")
        if split == "val" and train_ratio == 1.0:
            raise ValueError("train_ratio=1.0 leaves no validation split; use e.g. 0.9")
        if on_missing not in get_args(OnMissing):
            raise ValueError(f"on_missing={on_missing!r} is none of {', '.join(get_args(OnMissing))}")
        rows = PreparedData.open(datapath).dataset()
        cut = int(len(rows) * train_ratio)
        first, end = (0, cut) if split == "train" else (cut, len(rows))
        if first == end:
            raise ValueError(
                f"the {split} split is empty: {datapath} has {len(rows)} rows and train_ratio={train_ratio}"
            )
        self.split = split
        self.numbers = list(range(first, end))  # of the rows in the prepared dataset
        self.rows = rows.select(range(first, end))
        self.source, self.on_missing = source, on_missing
        self.max_len = max_len
        self.dtype = hidden_states_dtype
        self.lengths: list[int] = [min(int(length), max_len) for length in self.rows["seq_len"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample | None:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Sample | None]:
        """Reads several rows, with one request to the source for all of them."""
        rows = [self.rows[index] for index in indices]
        token_ids = [torch.as_tensor(row["input_ids"])[: self.max_len] for row in rows]
        return [
            None if of_row is None else self.sample(torch.as_tensor(row["loss_mask"])[: self.max_len], of_row)
            for row, of_row in zip(rows, self.states_of(token_ids), strict=True)
        ]

    def states_of(self, token_ids: list[Tensor]) -> Sequence[VerifierStates | None]:
        assert self.source is not None
        try:
            return self.source.read(token_ids)
        except MissingStatesError as error:
            if self.on_missing == "generate":
                raise
            if self.on_missing == "raise":
                raise RuntimeError(f"{error}, or skip such rows (on_missing)") from error
            if len(token_ids) > 1:  # which of them?
                return [self.states_of([ids])[0] for ids in token_ids]
            if self.on_missing == "warn":
                logger.warning("a row is left out: %s", error)
            return [None]

    def sample(self, loss_mask_S: torch.Tensor, states: VerifierStates) -> Sample:
        num_tokens = len(states.token_ids_T)
        last_SH = states.last_hidden_TH
        assert last_SH is not None
        aux_SD = last_SH[:, :0] if states.aux_TD is None else states.aux_TD
        return {
            "hidden_states": aux_SD.to(self.dtype),
            "verifier_last_hidden_states": last_SH.to(self.dtype),
            "input_ids": states.token_ids_T,
            "loss_mask": loss_mask_S,
            "lengths": torch.tensor([num_tokens]),
            "position_ids": torch.arange(num_tokens),
        }

    def keep_rows(self, usable: set[int] | None) -> None:
        """Keeps the rows of the prepared dataset that are in `usable`; None keeps all.

        Raises `ValueError` when no row is left.
        """
        if usable is None:
            return
        kept = [index for index, number in enumerate(self.numbers) if number in usable]
        if not kept:
            raise ValueError(f"no row of rows {self.numbers[0]}..{self.numbers[-1]} has stored verifier states")
        self.select(kept)

    def trained_tokens(self) -> Tensor:
        """All token ids that carry loss."""
        token_ids, mask = (self.column(name).to_numpy() for name in ("input_ids", "loss_mask"))
        return torch.from_numpy(token_ids[mask.astype(bool)].astype(np.int64))

    def trained_per_row(self, limit: int | None = None) -> np.ndarray:
        """How many of the first `limit` tokens of each row carry loss."""
        masks = pc.list_slice(self.rows.with_format("arrow")[:]["loss_mask"], 0, limit)
        ends = np.cumsum(pc.list_value_length(masks).to_numpy())
        before = np.cumsum(np.concatenate(([0], pc.list_flatten(masks).to_numpy().astype(bool))))
        return np.diff(before[ends], prepend=0)

    def select(self, kept: list[int]) -> None:
        self.rows = self.rows.select(kept)
        self.numbers, self.lengths = ([values[index] for index in kept] for values in (self.numbers, self.lengths))

    def column(self, name: str) -> pa.ChunkedArray:
        """Returns all values of a list column, concatenated, with rows clipped to `max_len`."""
        return pc.list_flatten(pc.list_slice(self.rows.with_format("arrow")[:][name], 0, self.max_len))


class BatchLoader(Protocol):
    """The batches that a trainer reads."""

    @property
    def num_repeated(self) -> int:
        """Batches at the end that are another rank's too."""

    def __len__(self) -> int:
        """Number of batches of the current epoch."""
        ...

    def set_epoch(self, epoch: int) -> None: ...

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yields the epoch's batches from number `first` on: a resumed epoch does not read what came before."""
        ...


class PackedLoader:
    """Reads, packs and collates the rows of a sampler."""

    def __init__(
        self,
        read: Callable[[Sequence[int]], list[Any]],
        sampler: MultipackDistributedBatchSamplerV2,
        collate: Callable[[Sequence[Any]], Batch],
        *,
        num_threads: int = 0,
        num_ahead: int = 4,
        device: torch.device | None = None,
        on_host: Collection[str] = (),
    ):
        """`read` returns the samples of one packed row; `num_threads=0` reads in the training thread. Threads also copy
        rows to `device`, where it is a GPU, but for the columns `on_host`."""
        self.read, self.sampler, self.collate = read, sampler, collate
        self.num_threads, self.num_ahead = num_threads, num_ahead
        self.device, self.on_host = device, on_host

    def __len__(self) -> int:
        return len(self.sampler)

    @property
    def num_repeated(self) -> int:
        return self.sampler.num_repeated

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def make(self, row: Sequence[int]) -> Batch:
        return self.collate(self.read(row))

    def batches(self, first: int = 0) -> Iterator[Batch]:
        rows, threads = self.sampler.rows()[first:], {"num_threads": self.num_threads, "num_ahead": self.num_ahead}
        if self.num_threads == 0:
            return map(self.make, rows)
        if self.device is None or self.device.type != "cuda":
            return read_ahead(self.make, rows, **threads)
        on_device = DeviceRows(self.device, self.make, self.on_host)
        return taking(on_device, read_ahead(on_device.make, rows, **threads))


def taking(on_device: DeviceRows, made: Generator[Any]) -> Generator[Batch]:
    with closing(made):
        for row in made:
            yield on_device.taken(row)


class ListLoader:
    """Serves a list of batches, the same every epoch."""

    num_repeated = 0

    def __init__(self, ready: Sequence[Batch]):
        self.ready = ready

    def __len__(self) -> int:
        return len(self.ready)

    def set_epoch(self, epoch: int) -> None:
        pass

    def batches(self, first: int = 0) -> Iterator[Batch]:
        return iter(self.ready[first:])


def as_loader(loader: BatchLoader | Sequence[Batch]) -> BatchLoader:
    return ListLoader(loader) if isinstance(loader, Sequence) else loader
