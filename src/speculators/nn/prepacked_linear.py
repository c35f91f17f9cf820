"""Linear layers for decoding: oneDNN's prepacked kernels on a CPU, and several layers of one input as one product.

torch's stock fp32 linear re-reads the weight in its storage order; for 2 to 16 rows (one verification) that is far from
memory speed, and 5 rows cost three times 1 row. With the weight reordered (prepacked) once they cost nearly the same,
which is what makes speculative decoding fast. Prepacked weights are copies, so their total is bounded, and they are
made again when a weight changes. One row of a small layer stays with the stock kernel: a oneDNN call takes 10 us before
it computes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators.utils.util import NestedContext

MAX_PREPACKED_BYTES = 4 << 30
"""Linears of a module beyond this total stay as they are: prepacking keeps a second copy of every weight."""
MAX_STOCK_PRODUCTS = 300_000
"""Rows times weight entries up to which torch's own kernel is the faster one."""

Apply = Callable[[Tensor], Tensor]


class PrepackedLinears(NestedContext):
    """Inside, the fp32 CPU linears of `modules` run prepacked. Entering again is cheap and nests."""

    def __init__(self, *modules: nn.Module, max_bytes: int = MAX_PREPACKED_BYTES):
        self.linears: list[_PrepackedLinear] = []
        if not torch.backends.mkldnn.is_available():
            return
        linears = (m for module in modules for m in module.modules() if isinstance(m, nn.Linear) and _can_replace(m))
        for linear in dict.fromkeys(linears):
            max_bytes -= linear.weight.numel() * linear.weight.element_size()
            if max_bytes < 0:
                break
            self.linears.append(_PrepackedLinear(linear))

    def set_up(self, stack: ExitStack) -> None:
        for linear in self.linears:
            linear.install()
            stack.callback(linear.remove)


def can_prepack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def is_installed(module: nn.Module) -> bool:
    """Whether `PrepackedLinears` has replaced a module's forward (until its block ends)."""
    return getattr(vars(module).get("forward"), "__module__", None) == __name__


def version_of(weights: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """A value that changes with the weights: an optimizer step raises the counter, load_state_dict(assign=True) changes
    the address."""
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)


def apply_linear(weight: Tensor, bias: Tensor | None, *, prepack: bool) -> Apply:
    """x -> x W' + b, by whichever kernel is faster for the rows of x. `prepack`: keep a reordered copy (CPU, fp32)."""
    if not prepack:
        return lambda x: F.linear(x, weight, bias)
    with torch.no_grad():
        prepacked_weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    kernel = torch.ops.mkldnn._linear_pointwise.default
    most_inputs = MAX_STOCK_PRODUCTS // weight.shape[0]

    def forward(x: Tensor) -> Tensor:
        if x.numel() <= most_inputs:
            return F.linear(x, weight, bias)
        return kernel(x, prepacked_weight, bias, "none", [], "")

    return forward


def joined(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters' rows as one tensor. They become views of it: weights are held once, under their own names."""
    whole = _whole_of(parameters)
    if whole is None:
        # not an inference tensor: the parameters go on living outside of decoding
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
                parameter.data = part
    return whole


def _whole_of(parameters: Sequence[Tensor]) -> Tensor | None:
    """The tensor that `joined` made of them before, if they still lie side by side in it."""
    first = parameters[0]
    end = first.storage_offset()
    for parameter in parameters:
        is_next = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (is_next and parameter.is_contiguous() and parameter.storage_offset() == end):
            return None
        end += parameter.numel()
    num_rows = sum(len(parameter) for parameter in parameters)
    return first.detach().as_strided((num_rows, *first.shape[1:]), first.stride())


def _can_replace(module: nn.Linear) -> bool:
    return type(module) is nn.Linear and can_prepack(module.weight) and "forward" not in vars(module)


class _PrepackedLinear:
    """One linear: its prepacked weight, and the version of the weight it was made from."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.prepacked: Any = None
        self.prepacked_from: Any = None

    def install(self) -> None:
        now = version_of((self.linear.weight,))
        if now != self.prepacked_from:
            self.prepacked = apply_linear(self.linear.weight.detach(), self.linear.bias, prepack=True)
            self.prepacked_from = now
        self.linear.__dict__["forward"] = self.prepacked

    def remove(self) -> None:
        self.linear.__dict__.pop("forward", None)
