"""Packed rows in the order of the sampler. A resumed epoch starts in its middle without touching what came before.

States on disk are read ahead by threads; states computed in process are asked for one whole row at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2

Batch = dict[str, Any]


class BatchLoader(Protocol):
    """What the trainer needs of its data."""

    def __len__(self) -> int:
        """Batches of the current epoch."""
        ...

    def set_epoch(self, epoch: int) -> None: ...

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `first` on."""
        ...


class PackedLoader:
    def __init__(
        self,
        read: Callable[[Sequence[int]], list[Any]],
        sampler: MultipackDistributedBatchSamplerV2,
        collate: Callable[[Sequence[Any]], Batch],
        *,
        num_threads: int = 0,
        num_ahead: int = 4,
    ):
        """`read` gives the samples of one packed row; `num_threads=0` reads in the training thread."""
        self.read, self.sampler, self.collate = read, sampler, collate
        self.num_threads, self.num_ahead = num_threads, num_ahead

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def make(self, row: Sequence[int]) -> Batch:
        return self.collate(self.read(row))

    def batches(self, first: int = 0) -> Iterator[Batch]:
        rows = self.sampler.rows()[first:]
        if self.num_threads == 0:
            yield from map(self.make, rows)
            return
        with ThreadPoolExecutor(self.num_threads) as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for row in rows:
                    ahead.append(pool.submit(self.make, row))
                    if len(ahead) > self.num_ahead:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


class ListLoader:
    """Ready batches, the same every epoch."""

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


def num_steps_of(loader: BatchLoader, num_epochs: int) -> int:
    """Steps of all epochs; rows are packed anew each epoch, so their number varies a little."""
    total = 0
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)
        total += len(loader)
    loader.set_epoch(0)
    return total
