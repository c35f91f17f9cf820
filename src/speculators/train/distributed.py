"""Runs one training run in several processes that torchrun started. A single process pays nothing for it.

Gradients are averaged after the backward pass: every rank holds the whole drafter, which is small beside the verifier.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run, and the collective operations that training needs."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add_up(self, values: Tensor) -> None:
        """Sums `values` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)

    def average_gradients(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Averages the gradients over all ranks, in place, with one collective call."""
        if self.world_size == 1:
            return
        grads = [param.grad for param in params if param.grad is not None]
        packed = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(packed)
        packed /= self.world_size
        for grad, mean in zip(grads, packed.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def any(self, flag: bool) -> bool:
        """Says whether the flag is set on any rank, so that all ranks stop together."""
        if self.world_size == 1:
            return flag
        values = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(values)
        return bool(values > 0)

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def pick_device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def ranks_from_environment() -> Iterator[Ranks]:
    """Joins the ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or runs this process alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(local_rank)
    if world_size == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()
