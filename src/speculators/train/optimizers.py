"""Makes the optimizers (AdamW for everything, or Muon for the matrices and AdamW for the rest) and the learning-rate
schedule, a pure function of the step.

Muon orthogonalises the momentum of a matrix (Jordan et al. 2024). It suits weights that map features to features, not
tables indexed by token (embeddings, heads, codebooks): those, vectors and scalars always go to AdamW.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

from speculators.train.data import BatchLoader
from speculators.train.distributed import split_like, whole_tensor
from speculators.train.records import TrainerConfig

NOT_FOR_MUON = ("embed_tokens", "lm_head", "codebook", "markov_w1", "markov_w2")
MAX_GRAD_NORM = 1.0
FUSED_ON = ("cuda",)
"""Devices of parameters that one kernel updates together. On a CPU the loop's bits are those of earlier releases."""


class ShardedMuon(Muon):
    """Muon for matrices of which every rank holds some rows. Momentum stays split; one matrix at a time is gathered and
    orthogonalised whole by every rank, so that the step is that of one rank."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.step_matrix(param, group)

    def step_matrix(self, param: Any, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(param.grad, 1 - group["momentum"])
        update = param.grad.lerp(momentum, group["momentum"])
        whole = nn.Parameter(torch.zeros(param.shape, dtype=param.dtype, device=param.device))
        whole.grad = update.full_tensor()
        settings = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        Muon([whole], weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()
        step = distribute_tensor(whole.detach(), param.device_mesh, param.placements, src_data_rank=None)
        param.mul_(1 - group["lr"] * group["weight_decay"]).add_(step)


class Optimizers:
    """One or two optimizers that step together. The caller scales each peak learning rate at every step."""

    def __init__(self, optimizers: Iterable[Optimizer]):
        self.optimizers = tuple(optimizers)
        self.peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self, lr_scale: float) -> None:
        for optimizer, peaks in zip(self.optimizers, self.peak_lrs, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_scale
            optimizer.step()

    def clipped_step(self, params: Sequence[nn.Parameter], lr_scale: float) -> None:
        """Steps with gradients whose norm is at most `MAX_GRAD_NORM`, and forgets them."""
        norm = nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        nn.utils.clip_grads_with_norm_(params, MAX_GRAD_NORM, whole_tensor(norm))
        self.step(lr_scale)
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def params(self) -> dict[str, list[nn.Parameter]]:
        """Those of each optimizer, in the order in which its state numbers them."""
        return {
            name_of(optimizer): [param for group in optimizer.param_groups for param in group["params"]]
            for optimizer in self.optimizers
        }

    def state_dict(self) -> dict[str, Any]:
        return {name_of(optimizer): optimizer.state_dict() for optimizer in self.optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [name_of(optimizer) for optimizer in self.optimizers]
        if set(names) != set(state):
            raise ValueError(
                f"the checkpoint was trained with {sorted(state)}, this run uses {sorted(names)}: "
                "continue with the same --optimizer, or start anew with --no-resume-from-checkpoint"
            )
        for name, optimizer in zip(names, self.optimizers, strict=True):
            own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            params = self.params()[name]
            of_params = {
                index: {key: split_like(params[index], value) for key, value in values.items()}
                for index, values in state[name]["state"].items()
            }
            # this run's settings: torch would take over the checkpoint's, and place what a fused step reads by them
            groups = [{**old, **new} for old, new in zip(state[name]["param_groups"], own, strict=True)]
            optimizer.load_state_dict({"state": of_params, "param_groups": groups})


def name_of(optimizer: Optimizer) -> str:
    """Its name in a checkpoint, however many ranks share it."""
    return "Muon" if isinstance(optimizer, Muon) else type(optimizer).__name__


def make_optimizers(model: nn.Module, config: TrainerConfig, *, fused: bool | None = None) -> Optimizers:
    """Assigns every trainable parameter to an optimizer. Raises `ValueError` when the model has none to train.

    `fused`: one kernel updates many parameters of AdamW. None: where they are on a GPU (`FUSED_ON`).
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: nothing to train")
    if config.optimizer == "adamw":
        return Optimizers([adamw([param for _, param in trainable], config, fused)])
    matrices = [param for name, param in trainable if suits_muon(name, param)]
    rest = [param for name, param in trainable if not suits_muon(name, param)]
    parts: list[Optimizer] = []
    if matrices:
        kind = ShardedMuon if isinstance(matrices[0], DTensor) else Muon
        parts.append(
            kind(
                matrices,
                lr=config.muon_lr,
                weight_decay=config.muon_weight_decay,
                momentum=config.muon_momentum,
                ns_steps=config.muon_ns_steps,
                adjust_lr_fn=config.muon_adjust_lr_fn,
            )
        )
    if rest:
        parts.append(adamw(rest, config, fused))
    return Optimizers(parts)


def adamw(params: list[torch.nn.Parameter], config: TrainerConfig, fused: bool | None) -> AdamW:
    if fused is None:
        fused = all(param.device.type in FUSED_ON for param in params)
    # None: torch's own choice of a loop, which gives the same bits in every run on one machine
    return AdamW(params, lr=config.lr, weight_decay=config.weight_decay, fused=fused or None)


def suits_muon(name: str, param: torch.nn.Parameter) -> bool:
    return param.ndim == 2 and min(param.shape) > 1 and not any(part in name for part in NOT_FOR_MUON)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step: a resumed run needs only the step."""

    kind: Literal["linear", "cosine", "none"]
    num_warmup_steps: int
    num_steps: int
    num_cosine_cycles: float = 0.5

    def scale(self, step: int) -> float:
        """Returns the multiplier of the peak rate at a step (0 = the first): it rises to 1, then decays to 0."""
        if step < self.num_warmup_steps:
            return (step + 1) / (self.num_warmup_steps + 1)
        if self.kind == "none":
            return 1.0
        progress = min(1.0, (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps))
        if self.kind == "linear":
            return 1.0 - progress
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * self.num_cosine_cycles * progress)))


def make_schedule(
    kind: Literal["linear", "cosine", "none"],
    num_run_steps: int,
    *,
    total_steps: int | None = None,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    num_cosine_cycles: float = 0.5,
) -> Schedule:
    """Makes a schedule for a run of `num_run_steps`.

    `total_steps` wins over the run's own length, `warmup_steps` over `warmup_ratio`, and that over the default of 1 %.
    Raises `ValueError` for a ratio outside 0..1.
    """
    num_steps = total_steps if total_steps is not None else num_run_steps
    if warmup_ratio is not None and not 0.0 <= warmup_ratio <= 1.0:
        raise ValueError(f"scheduler_warmup_ratio={warmup_ratio} is a share of all steps, so it must be within 0..1")
    if warmup_steps is not None and warmup_ratio is not None:
        warnings.warn("scheduler_warmup_steps and scheduler_warmup_ratio are both given: using the steps", stacklevel=2)
    if warmup_steps is None:
        warmup_steps = int(num_steps * warmup_ratio) if warmup_ratio is not None else num_steps // 100
    return Schedule(kind, warmup_steps, num_steps, num_cosine_cycles)


def schedule_of(config: TrainerConfig, num_run_steps: int) -> Schedule:
    return make_schedule(
        config.scheduler_type,
        num_run_steps,
        total_steps=config.scheduler_total_steps,
        warmup_steps=config.scheduler_warmup_steps,
        warmup_ratio=config.scheduler_warmup_ratio,
        num_cosine_cycles=config.scheduler_num_cosine_cycles,
    )


def num_steps_of(loader: BatchLoader, num_epochs: int, rows_a_step: int = 1) -> int:
    """Counts the steps of all epochs; rows are packed anew each epoch, so their number varies a little."""
    total = 0
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)
        total += -(-len(loader) // rows_a_step)
    loader.set_epoch(0)
    return total
