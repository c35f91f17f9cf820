"""Metrics as (numerator, denominator) pairs until they are shown, so that steps, ranks and runs can be added.

A forward reports `X_sum` and `X_total`; keys without such a pair are averaged over the forwards that reported them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from speculators.interfaces import Ratio

Item = TypeVar("Item")


def ratio(numerator: Tensor | float, denominator: Tensor | float = 1.0) -> Ratio:
    """Detached, in fp32 or wider."""
    return Ratio(_number(numerator), _number(denominator))


def as_pairs(metrics: Mapping[str, Ratio]) -> dict[str, Tensor]:
    """X -> X_sum and X_total, as forwards report them; X itself where the denominator is the number of forwards."""
    pairs: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        if metric.denominator is None:
            pairs[name] = metric.numerator
        else:
            pairs |= {f"{name}_sum": metric.numerator, f"{name}_total": metric.denominator}
    return pairs


def _number(value: Tensor | float) -> Tensor:
    value = torch.as_tensor(value)
    return (value if value.dtype == torch.float64 else value.float()).detach()


def normalize_counted_metrics(metrics: Mapping[str, Any], world_size: int = 1) -> dict[str, Any]:
    """X_sum / X_total -> X (0 when nothing was counted); a lone X_total is dropped; the rest are divided by world_size.

    Pairs must already be summed over ranks; other values are sums over ranks of values that each rank averaged.
    """
    out: dict[str, Any] = {}
    for key, value in metrics.items():
        name = key.removesuffix("_sum")
        if key.endswith("_sum") and f"{name}_total" in metrics:
            total = metrics[f"{name}_total"]
            out[name] = value / total if float(total) != 0.0 else value * 0.0
        elif not key.endswith("_total") and key not in out and f"{key}_sum" not in metrics:
            out[key] = value / world_size
    return out


def expected_acceptance_length(metrics: Mapping[str, float]) -> float | None:
    """Tokens per round: what the model says (`eal`), else 1 + the chances that the first 1, 2, .. drafts are right."""
    if "eal" in metrics:
        return metrics["eal"]
    chances = [value for key, value in metrics.items() if re.fullmatch(r"full_acc_\d+", key)]
    return 1.0 + sum(chances) if chances else None


class MetricSums:
    """Adds up the metrics of several forwards. Nothing leaves the device before `values`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_forwards = 0

    def add(self, metrics: Mapping[str, Any], *, counts: bool = True) -> None:
        """`counts=False`: only their names are taken, for a rank whose row is another's too."""
        self.num_forwards += counts
        for key, value in metrics.items():
            value = torch.as_tensor(value).detach().double()
            value = value if counts else torch.zeros_like(value)
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def values(self, all_reduce: Any = None) -> dict[str, float]:
        """Means so far, over all ranks when `all_reduce` (in place, on a float64 tensor) is given."""
        return self.reading(all_reduce)()

    def reading(self, all_reduce: Any = None) -> Callable[[], dict[str, float]]:
        """Returns a function that returns `values`: they are copied to the host until it is called."""
        if not self.sums:
            return dict
        keys = list(self.sums)
        arriving = HostCopy(self.packed(all_reduce))

        def read() -> dict[str, float]:
            *sums, num_forwards = arriving.values()
            means = normalize_counted_metrics(dict(zip(keys, sums, strict=True)), world_size=int(num_forwards))
            return {name: float(mean) for name, mean in means.items()}

        return read

    def packed(self, all_reduce: Any = None) -> Tensor:
        """The sums, and last the number of forwards: on the device of those that are on one."""
        values = [*self.sums.values(), torch.tensor(float(self.num_forwards)).double()]
        device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
        packed = torch.stack([value.to(device, non_blocking=True) for value in values])
        if all_reduce is not None:
            all_reduce(packed)
        return packed


class HostCopy:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.arrived = None
        self.on_host = tensor
        if tensor.device.type == "cuda":
            self.on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.on_host.copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def values(self) -> list[float]:
        """Waits until it has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.on_host.tolist()


class RecentSteps:
    """Training steps since the last report: their metrics, how fast they were, and what they waited for."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.sums = MetricSums()
        self.num_tokens = 0
        self.model_flop: int | None = 0
        self.waited_s = 0.0
        self.since = time.perf_counter()

    def add(self, metrics: Mapping[str, Any], *, num_tokens: int, model_flop: int | None = None) -> None:
        """`model_flop`: None where the algorithm counts none."""
        self.sums.add(metrics)
        self.num_tokens += num_tokens
        self.model_flop = None if model_flop is None or self.model_flop is None else self.model_flop + model_flop

    def timed(self, batches: Iterator[Item]) -> Generator[Item]:
        """Yields the same batches, and counts how long each is waited for. Closes what it reads from."""
        with ending(batches):
            while True:
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self.waited_s += time.perf_counter() - asked
                yield batch

    def leave_out(self, time_s: float) -> None:
        """Time that was spent between the steps, on a validation or a checkpoint."""
        self.since += time_s

    @property
    def time_s(self) -> float:
        return max(time.perf_counter() - self.since, 1e-9)

    def tokens_per_s(self) -> float:
        return self.num_tokens / self.time_s

    def waiting(self) -> float:
        """Share of the time."""
        return min(self.waited_s / self.time_s, 1.0)


@contextmanager
def ending(iterator: Iterator[Any]) -> Iterator[None]:
    """Closes a generator when the block ends, in the thread that runs it, and not when it is collected."""
    try:
        yield
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
