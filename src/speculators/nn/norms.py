"""RMSNorm with statistics in fp32, in the two gains found in the wild (`w` and `1 + w`), and LayerNorm beside it; and
what lets training keep less of such cheap parts: `recomputed` and `cast_once`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns `function(*inputs)`, of which training keeps the inputs alone: the backward pass computes the rest again,
    except the last operation. The gradients are the same to the last bit. For cheap functions without random numbers.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler decides by itself what is kept
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def cast_once(x: Tensor, num_uses: int) -> tuple[Tensor, ...]:
    """Returns what that many products under autocast make of the same fp32 input: one copy, which each of them keeps,
    instead of one for each. Their gradients are added in fp32, the last use first, as autograd adds those of casts."""
    kind = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(kind) or torch.compiler.is_compiling():
        return (x,) * num_uses
    return CastOnce.apply(x, torch.get_autocast_dtype(kind), num_uses)


class CastOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, num_uses: int) -> tuple[Tensor, ...]:
        low = x.to(dtype)
        return (low, *(low.detach() for _ in range(num_uses - 1)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        total = grads[-1].float()
        for grad in reversed(grads[:-1]):
            total += grad
        return total, None, None


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps); the result keeps the dtype of x (also under autocast with fp32 weights)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return recomputed(self.normed, hidden_states)

    def normed(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype == hidden_states.dtype:
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        wide = F.rms_norm(hidden_states.float(), weight.shape, weight.float(), self.variance_epsilon)
        return wide.to(hidden_states.dtype)

    def frozen(self) -> RMSNorm | FrozenRMSNorm:
        """Returns a snapshot for decoding."""
        weight = self.weight.detach()
        if type(self) is RMSNorm and weight.device.type == "cpu" and weight.dtype == torch.float32:
            return FrozenRMSNorm(weight, self.variance_epsilon)
        return copy.deepcopy(self).requires_grad_(False)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class FrozenRMSNorm(nn.Module):
    """A norm with the weight fixed at its present value."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.forward = rms_norm(weight.clone(), eps)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.forward(hidden_states)  # a snapshot has no hooks

    def frozen(self) -> FrozenRMSNorm:
        return self


def rms_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """The norm over the last axis as a function. `weight` is [d], or [N, d] for N heads; it must not change."""
    size = weight.shape[-1]
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        if weight.dim() == 1:
            return lambda x: F.rms_norm(x, (size,), weight, eps)
        return lambda x: F.rms_norm(x, (size,), None, eps) * weight
    # torch has no kernel of its own for it on a CPU: half the time in four steps, sqrt(sum + c^2) being a hypotenuse
    scaled_weight, root = weight * math.sqrt(size), torch.tensor(math.sqrt(size * eps))
    return lambda x: x.div(torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), root)).mul_(scaled_weight)


class RMSNormPlusOne(RMSNorm):
    """Gain 1 + w, weights start at zero (gemma, qwen3_next, qwen3_5): a plain `w` would silently wreck the targets."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps)
        nn.init.zeros_(self.weight)

    def normed(self, hidden_states: Tensor) -> Tensor:
        gain = 1.0 + self.weight.float()
        return F.rms_norm(hidden_states.float(), gain.shape, gain, self.variance_epsilon).to(hidden_states.dtype)


class LayerNorm(RMSNorm):
    """w * (x - mean(x)) / sqrt(var(x) + eps) + b, the bias where there is one (Cohere has none, GPT-2 has)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, has_bias: bool = False):
        super().__init__(hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if has_bias else None

    def normed(self, hidden_states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        wide = F.layer_norm(hidden_states.float(), self.weight.shape, self.weight.float(), bias, self.variance_epsilon)
        return wide.to(hidden_states.dtype)
