"""Runs one training run in several processes that torchrun started. A single process pays nothing for it.

`parallel` has how the ranks share a draft model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from speculators.train.keys import TrainerKeys
from speculators.training_keys import default_of

T = TypeVar("T")
RandomState = dict[str, list[Tensor] | Tensor]
"""{"cpu": state, "cuda": [state of this rank's device] or []}"""
ESTIMATING = "fake"
"""PyTorch's backend of ranks that are not there."""


class RankError(OSError):
    """Another rank ended or does not answer."""


@contextmanager
def hearing_others(*, beside_work: bool = False) -> Iterator[None]:
    """Turns what a collective raises into one clear error. `beside_work`: other errors may come from the block too."""
    try:
        yield
    except RuntimeError as error:
        if beside_work and not is_of_a_collective(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise RankError(
            f"another rank ended or did not answer within --rank-timeout ({reason}): its own output says why; the "
            "same command continues from the newest checkpoint"
        ) from error


def is_of_a_collective(error: RuntimeError) -> bool:
    """Gloo raises a plain `RuntimeError` that begins with the place in its source."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run, and the collective operations that training needs."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def moved(self, batch: Mapping[str, Tensor], left_out: Sequence[str], on_host: Sequence[str]) -> dict[str, Tensor]:
        """The batch on this rank's device, but for the columns that stay on the host."""
        kept = {key: value for key, value in batch.items() if key not in left_out}
        return {k: v if k in on_host else v.to(self.device, non_blocking=True) for k, v in kept.items()}

    def add_up(self, values: Tensor) -> None:
        """Sums `values` over all ranks, in place."""
        if self.world_size > 1:
            with hearing_others():
                dist.all_reduce(values)

    def any(self, flag: bool) -> bool:
        """Says whether the flag is set on any rank, so that all ranks stop together."""
        if self.world_size == 1:
            return flag
        values = torch.tensor(float(flag), device=self.device)
        with hearing_others():
            dist.all_reduce(values)
        return bool(values > 0)

    def wait(self) -> None:
        if self.world_size > 1:
            with hearing_others():
                dist.barrier()

    def main_first(self, work: Callable[[], T]) -> T | None:
        """Runs `work` on the main rank while the others wait. When it raises, every rank raises."""
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as raised:
                error = raised
        if self.any(error is not None):
            raise error or ValueError("the main rank does not start; its own output says why")
        return result

    def first_error(self, error: ValueError | None) -> ValueError | None:
        """Returns, on every rank, the error of the first rank that has one."""
        return next((of_rank for of_rank in self.gather_objects(error) if of_rank is not None), None)

    def gather_objects(self, value: T) -> list[T]:
        """Returns the value of every rank, by pickle."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with hearing_others():
                dist.all_gather_object(values, value)
        return values

    def told_by_main(self, value: T | None) -> T:
        """Returns the main rank's value on every rank."""
        values = [value]
        if self.world_size > 1:
            with hearing_others():
                dist.broadcast_object_list(values, src=0, device=self.device)
        assert values[0] is not None
        return values[0]

    def gather(self, values: Tensor) -> list[Tensor]:
        """Returns the values of every rank, on the CPU. They have one shape and type."""
        if self.world_size == 1:
            return [values.cpu()]
        mine = values.to(self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        with hearing_others():
            dist.all_gather(gathered, mine)
        return [theirs.cpu() for theirs in gathered]

    def random_state(self) -> RandomState:
        """Returns the state of this process's generators."""
        is_cuda = self.device.type == "cuda"
        return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(self.device)] if is_cuda else []}

    def set_random_state(self, state: RandomState) -> None:
        assert isinstance(state["cpu"], Tensor)
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and len(state["cuda"]):
            torch.cuda.set_rng_state(state["cuda"][0], self.device)

    def random_states(self) -> list[RandomState]:
        """Returns the states of every rank: each draws numbers of its own."""
        state = self.random_state()
        assert isinstance(state["cpu"], Tensor)
        on_device = [self.gather(device) for device in state["cuda"]]
        return [
            {"cpu": cpu, "cuda": [states[rank] for states in on_device]}
            for rank, cpu in enumerate(self.gather(state["cpu"]))
        ]


@contextmanager
def ranks_to_estimate(num_ranks: int | None, timeout_s: float) -> Iterator[Ranks]:
    """Runs this process as the first of so many ranks, of which the others are not there: collectives do nothing, so
    it holds what a rank holds, and its numbers mean nothing. None: the ranks that torchrun started."""
    if num_ranks is not None and "WORLD_SIZE" in os.environ:
        raise ValueError(f"--estimate-ranks {num_ranks}: torchrun's ranks are estimated as they are; leave it out")
    if num_ranks is None or num_ranks == 1:
        with ranks_from_environment(timeout_s) as ranks:
            yield ranks
        return
    dist.init_process_group(ESTIMATING, rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield Ranks(0, num_ranks, pick_device())
    finally:
        dist.destroy_process_group()


def own_part(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor; all ranks call it. Returns any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(other: Tensor, tensor: Tensor) -> Tensor:
    """Returns this rank's part of a whole tensor where `other` is sharded; all ranks have the same whole one."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def pick_device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


KEPT_GROUPS: list[Any] = []
"""Process groups of this process, until it ends. DistributedDataParallel's reducer holds the group too. Where it is the
last that does, it joins gloo's thread while it holds Python's lock; that thread may need the lock to free a tensor, and
both wait for ever (seen in the native stack of a rank whose run was over)."""


@contextmanager
def ranks_from_environment(timeout_s: float = default_of(TrainerKeys, "rank_timeout")) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or runs this process alone.

    A rank that does not answer the others for `timeout_s` ends the run.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(local_rank)
    if world_size == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with hearing_others():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    KEPT_GROUPS.append(dist.group.WORLD)
    try:
        with hearing_others(beside_work=True):  # collectives of PyTorch's own parts too, e.g. of an optimizer
            yield Ranks(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()
