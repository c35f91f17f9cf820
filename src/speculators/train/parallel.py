"""How the ranks of a run train one draft model, by PyTorch's own parts. A single process pays nothing for it.

    Alone         one process: the model as it is
    Replicated    DistributedDataParallel: every rank holds everything; gradients are summed in buckets during the
                  backward pass
    Sharded       FSDP2, `fully_shard` on each of `layers` and on the rest: every rank holds a part of the fp32 weights,
                  gradients and optimizer state. The weights are gathered once per step, in the type of the forward

A step of several rows communicates in the backward pass of its last row only.
"""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from speculators.model import SpeculatorModel
from speculators.nn.decoder import recompute_mlps
from speculators.train.distributed import ESTIMATING, Ranks, hearing_others, own_part, whole_tensor
from speculators.train.records import TrainerConfig

MIXED_TENSORS = "mixed torch.Tensor and DTensor"
"""What torch says of a product with a weight that is split over the ranks."""
RETURNS_VIEW = "FSDP2-wrapped module"
"""Begins the warning that a view is returned, which matters to operations in place alone."""

NO_BUFFERS: dict[str, Any] = next(
    {name: False}
    for name in ("forward_sync_buffers", "broadcast_buffers")  # the second until torch 2.12
    if name in inspect.signature(DistributedDataParallel).parameters
)


def own_bucket(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Answers for other ranks that are not there: a bucket's sum is what this rank has."""
    answer: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    answer.set_result(bucket.buffer())
    return answer


class Alone:
    """Trains the model in one process."""

    keeps_gradients = False
    """Whether gradients have memory of their own all the time, not from their first backward pass to the step."""

    def __init__(self, model: SpeculatorModel, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self.module: nn.Module = model
        """What is called to train; the model itself is called to validate."""

    @contextmanager
    def row(self, is_last: bool) -> Iterator[None]:
        """Forward and backward of one row. `is_last`: of its step, so that gradients are summed over the ranks."""
        yield

    def divide_gradients(self, params: Sequence[nn.Parameter], weight: float) -> None:
        """Divides by the weight of the rows of all ranks, in place.

        `weight`: of this rank's rows in the step, whose gradients are summed with it. So several ranks, or several rows
        per step on one, learn the same from the same rows.
        """
        grads = [own_part(param.grad) for param in params if param.grad is not None]
        total = torch.tensor([weight], dtype=torch.float32, device=self.ranks.device)
        self.ranks.add_up(total)
        # DistributedDataParallel and FSDP2 divide by the number of ranks, which has to be taken back
        torch._foreach_div_(grads, (total.clamp(min=1.0) / self.ranks.world_size)[0])

    @contextmanager
    def whole(self, device: torch.device | None = None, *, on_main_alone: bool = False) -> Iterator[SpeculatorModel]:
        """The model with all its weights, e.g. to draft with it or to save it: see `Sharded`."""
        yield self.model


class Replicated(Alone):
    """Every rank holds the whole model."""

    keeps_gradients = True  # the buckets

    def __init__(self, model: SpeculatorModel, ranks: Ranks):
        super().__init__(model, ranks)
        torch._dynamo.config.optimize_ddp = False  # it cuts graphs at buckets, and cannot cut flex attention
        with hearing_others():
            self.replicas = DistributedDataParallel(
                model, find_unused_parameters=not model.uses_every_weight, gradient_as_bucket_view=True, **NO_BUFFERS
            )
        self.module = self.replicas
        if dist.get_backend() == ESTIMATING:
            self.replicas.register_comm_hook(None, lambda _, bucket: own_bucket(bucket))

    @contextmanager
    def row(self, is_last: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(hearing_others(beside_work=True))
            if not is_last:
                stack.enter_context(self.replicas.no_sync())
            yield


class Sharded(Alone):
    """Every rank holds a part of each trained weight. Frozen weights, which are the verifier's, stay whole: gathering a
    head for every step would cost more than it saves."""

    def __init__(self, model: SpeculatorModel, ranks: Ranks, dtype: torch.dtype):
        super().__init__(model, ranks)
        self.twin = without_weights(model)
        frozen = {param for param in model.parameters() if not param.requires_grad}
        with hearing_others():
            mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for part in (*cast("Sequence[nn.Module]", model.layers), model):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen)
            if part is not model:
                for name in model.layer_methods:
                    register_fsdp_forward_method(part, name)
        self.shards = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for shard in self.shards:
            # A layer may run several times in a forward: its weights stay until the last gradient of the step is there.
            shard.set_reshard_after_backward(False, recurse=False)

    @contextmanager
    def row(self, is_last: bool) -> Iterator[None]:
        for shard in self.shards:
            shard.set_requires_gradient_sync(is_last, recurse=False)
        with hearing_others(beside_work=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", RETURNS_VIEW, UserWarning)
            try:
                yield
            except RuntimeError as error:
                if MIXED_TENSORS not in str(error):
                    raise
                raise self.used_outside(f"{self.called(error)} needs weights that are split over ranks") from error
        if is_last:
            self.refuse_lost_gradients()
            for shard in self.shards:
                shard.reshard()

    def refuse_lost_gradients(self) -> None:
        """Raises `ValueError` when a gradient was made after its layer had sent what it had."""
        lost = [
            name
            for name, param in self.model.named_parameters()
            if param.grad is not None and not isinstance(param, DTensor)
        ]
        if lost:
            raise self.used_outside(f"the gradient of {lost[0]} would be lost")

    def used_outside(self, what: str) -> ValueError:
        return ValueError(
            f"--fsdp-shard: {what}, as it is used outside of its layer's forward: name the layer's method that uses it "
            f"in `layer_methods` of {type(self.twin).__name__}, or leave --fsdp-shard out"
        )

    def called(self, error: BaseException) -> str:
        """Names the method of a layer in which an error was raised."""
        layers = {id(layer): number for number, layer in enumerate(cast("Sequence[nn.Module]", self.model.layers))}
        for frame, _ in traceback.walk_tb(error.__traceback__):
            number = layers.get(id(frame.f_locals.get("self")))
            if number is not None:
                return f"layers.{number}.{frame.f_code.co_name}"
        return "a layer"

    @contextmanager
    def whole(self, device: torch.device | None = None, *, on_main_alone: bool = False) -> Iterator[SpeculatorModel]:
        """A copy of the model with all its weights, on every rank or on the main one alone. All ranks call it."""
        for shard in self.shards:
            shard.reshard()
        weights = {}
        with hearing_others(beside_work=True):
            for name, param in self.model.named_parameters():
                if param.requires_grad:
                    gathered = whole_tensor(param.detach())
                    if self.ranks.is_main or not on_main_alone:
                        weights[name] = gathered.to(device or self.ranks.device)
        self.twin.load_state_dict(weights, assign=True, strict=False)
        try:
            yield self.twin.train(self.model.training)
        finally:
            freed = {name: tensor.to("meta") for name, tensor in weights.items()}
            self.twin.load_state_dict(freed, assign=True, strict=False)


def parallelise(model: SpeculatorModel, ranks: Ranks, config: TrainerConfig, tell: Callable[[str], None]) -> Alone:
    """Makes the way in which the ranks train `model`. Raises `RankError` when a rank does not answer, and `ValueError`
    where nothing of the model can be recomputed as --gradient-checkpointing asks."""
    if config.gradient_checkpointing and not recompute_mlps(model):
        if not model.supports_gradient_checkpointing:
            raise ValueError(
                f"--gradient-checkpointing: {type(model).__name__} has no feed-forward layer to recompute; leave it out"
            )
        model.gradient_checkpointing_enable()  # of its own kind
    if ranks.world_size > 1:
        return Sharded(model, ranks, config.hidden_states_dtype) if config.fsdp_shard else Replicated(model, ranks)
    if config.fsdp_shard:
        tell("--fsdp-shard has no effect: this process is the only rank; torchrun starts several")
    return Alone(model, ranks)


def without_weights(model: SpeculatorModel) -> SpeculatorModel:
    """Returns a copy whose trained weights take no memory, to be filled later; it shares all other tensors."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta")) if param.requires_grad else param
    return copy.deepcopy(model, memo)
