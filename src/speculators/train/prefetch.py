"""Reads rows ahead of the training step, in threads, and on a GPU copies them there beside it.

    training thread      step r0   | step r1   | step r2
    reading thread       r1 ------> r2 -------> r3 ...        at most `num_ahead` rows beyond the one in use

On a GPU a row is made on a stream of its own: in-process states are computed there, and what is on the host is copied
from pinned memory without waiting. The training stream waits for that row's event, the host for nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

Row = TypeVar("Row")
Made = TypeVar("Made")
Batch = dict[str, Any]
ON_HOST = ("document_ids", "loss_mask", "error_records")
"""Columns that the trainer counts."""
POOL_NUMBERS = count()


def read_ahead(
    make: Callable[[Row], Made], rows: Iterable[Row], *, num_threads: int, num_ahead: int
) -> Generator[Made]:
    """Yields `make(row)` of each row in order; at most `num_ahead` rows beyond the one that is yielded are begun.

    What `make` raises is raised in the place of its row. Closing the generator drops the rows that were not begun and
    waits for those that were.
    """
    name = f"rows-{next(POOL_NUMBERS)}"
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=keep_autocast_cache)
    ahead: deque[Future[Made]] = deque()
    try:
        for row in rows:
            ahead.append(pool.submit(make, row))
            if len(ahead) > num_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        # a generator that nobody closed is ended by the garbage collector, in any thread: the pool's own cannot wait
        # for itself
        is_own = threading.current_thread().name.startswith(f"{name}_")
        pool.shutdown(wait=not is_own, cancel_futures=True)


def keep_autocast_cache() -> None:
    """Enters an autocast context that this thread never leaves.

    Whoever leaves its outermost one clears the casts of all threads: a training step that loses them halfway casts its
    weights again, and sums their gradients in another order.
    """
    torch.autocast("cpu", enabled=False).__enter__()


class DeviceRows:
    """Makes rows on a stream of its own and hands them to the stream that trains."""

    def __init__(self, device: torch.device, make: Callable[[Row], Batch], on_host: Collection[str]) -> None:
        """`on_host`: columns that stay in the host's memory."""
        self.device, self.make_batch, self.on_host = device, make, {*on_host, *ON_HOST}
        self.stream = torch.cuda.Stream(device)

    def make(self, row: Any) -> tuple[Batch, torch.cuda.Event]:
        """Runs in the reading thread."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            batch = {name: self.moved(name, value) for name, value in self.make_batch(row).items()}
            return batch, self.stream.record_event()

    def moved(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name in self.on_host:
            return value.cpu()
        return value.pin_memory().to(self.device, non_blocking=True) if value.device.type == "cpu" else value

    def taken(self, made: tuple[Batch, torch.cuda.Event]) -> Batch:
        """Runs in the training thread: what it launches from now on sees the row."""
        batch, ready = made
        training = torch.cuda.current_stream(self.device)
        training.wait_event(ready)
        for value in batch.values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(training)
        return batch
