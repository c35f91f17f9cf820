"""Linear layers on CPU through oneDNN's prepacked kernels: the same numbers, two to three times sooner for few rows.

torch's stock fp32 linear re-reads the weight in its storage order; for 1 to 16 rows (one decode step, one verification)
that is far from memory speed, and 5 rows cost 1.5 times 1 row. With the weight reordered once they cost the same, which
is what speculative decoding lives on. Weights are copied, so packing is bounded, and repacked when a weight changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MAX_PACKED_BYTES = 4 << 30
"""Linears of a module beyond this total stay as they are: packing keeps a second copy of every weight."""


class PackedLinears:
    """Context manager: inside, the fp32 CPU linears of `modules` run prepacked. Re-entering is cheap and nests."""

    def __init__(self, *modules: nn.Module, max_bytes: int = MAX_PACKED_BYTES):
        self.linears: list[_PackedLinear] = []
        if not torch.backends.mkldnn.is_available():
            return
        linears = (m for module in modules for m in module.modules() if isinstance(m, nn.Linear) and _can_pack(m))
        for linear in dict.fromkeys(linears):
            max_bytes -= linear.weight.numel() * linear.weight.element_size()
            if max_bytes < 0:
                break
            self.linears.append(_PackedLinear(linear))
        self._depth = 0

    def __enter__(self) -> PackedLinears:
        if self.linears:
            self._depth += 1
            if self._depth == 1:
                for linear in self.linears:
                    linear.install()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.linears:
            self._depth -= 1
            if self._depth == 0:
                for linear in self.linears:
                    linear.remove()


def _can_pack(module: nn.Linear) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and "forward" not in vars(module)
    )


class _PackedLinear:
    """One linear: its packed weight, and the state of the weight it was packed from."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.packed_weight: Tensor | None = None
        self.packed_from: tuple[int, int] | None = None

    def install(self) -> None:
        weight = self.linear.weight
        # An optimizer step bumps the version counter; load_state_dict(assign=True) changes the storage.
        now = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if now != self.packed_from:
            with torch.no_grad():
                self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            self.packed_from = now
        self.linear.__dict__["forward"] = _packed_forward(self.packed_weight, self.linear.bias)

    def remove(self) -> None:
        self.linear.__dict__.pop("forward", None)


def _packed_forward(packed_weight: Tensor | None, bias: Tensor | None) -> Any:
    kernel = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        return kernel(x, packed_weight, bias, "none", [], "")

    return forward
