"""Losses by name, mixes of them, and their reduction over positions.

The exported functions work on [..., V] logits on any device. Each exists twice: here in closed form, and in
`losses.eager` as plain autograd. Training gives neither of them [T, V] logits: see `losses.chunked`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from speculators.losses import eager, gradients
from speculators.losses.divergence import LK_HYBRID_ETA
from speculators.losses.gradients import ClosedForm, LossKernel

LossFunction = Callable[..., Tensor]
LossConfig = dict[str, tuple[LossFunction, float]]
"""name -> (function of (logits, targets), weight); weights are not normalised."""

MASK_EPSILON = 1e-5
"""Added to the number of supervised positions: a row without any has loss 0, not NaN."""


def kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return ClosedForm.apply(gradients.kl_div, logits, targets)


def reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return ClosedForm.apply(gradients.reverse_kl, logits, targets)


def js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return ClosedForm.apply(gradients.js_div, logits, targets)


def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return ClosedForm.apply(gradients.ce, logits, targets)


def tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return ClosedForm.apply(gradients.tv, logits, targets)


def neg_log_acceptance_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return ClosedForm.apply(gradients.neg_log_acceptance, logits, targets)


def lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = LK_HYBRID_ETA) -> Tensor:
    def kernel(draft, target, wants_grad):
        return gradients.lk_hybrid(draft, target, wants_grad, eta)

    return ClosedForm.apply(kernel, logits, targets)


FUSED: dict[str, LossFunction] = {
    "kl_div": kl_div_loss,
    "rkl": reverse_kl_div_loss,
    "jsd": js_div_loss,
    "ce": ce_loss,
    "tv": tv_loss,
    "nla": neg_log_acceptance_loss,
    "lk_hybrid": lk_hybrid_loss,
}
EAGER: dict[str, LossFunction] = {name: getattr(eager, function.__name__) for name, function in FUSED.items()}
IMPLEMENTATIONS = {"fused": FUSED, "eager": EAGER}

KERNELS: dict[LossFunction, LossKernel] = {
    kl_div_loss: gradients.kl_div,
    reverse_kl_div_loss: gradients.reverse_kl,
    js_div_loss: gradients.js_div,
    ce_loss: gradients.ce,
    tv_loss: gradients.tv,
    neg_log_acceptance_loss: gradients.neg_log_acceptance,
    lk_hybrid_loss: gradients.lk_hybrid,
}


def is_reference(function: LossFunction) -> bool:
    return function in EAGER.values()


def resolve_loss_config(
    spec: str | Mapping[str, float] | LossFunction | LossConfig, implementation: str = "fused"
) -> LossConfig:
    """{name: (function, weight)} of a name, a JSON object of weights, a mapping, a function, or a resolved config."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"loss_implementation={implementation!r} is unknown; use one of {sorted(IMPLEMENTATIONS)}")
    functions = IMPLEMENTATIONS[implementation]
    if callable(spec):
        return {_name_of(spec): (spec, 1.0)}
    if isinstance(spec, str):
        if not spec.lstrip().startswith(("{", "[", '"')):
            return {_known(spec, functions): (functions[spec], 1.0)}
        try:
            spec = json.loads(spec)
        except json.JSONDecodeError as error:
            raise ValueError(f"loss_fn={spec!r} is neither a loss name nor JSON ({error})") from None
    if not isinstance(spec, Mapping) or not spec:
        raise ValueError(f'loss_fn={spec!r} must be a name or a non-empty object like {{"ce": 0.1, "tv": 0.9}}')
    return {name: _weighted(name, value, functions) for name, value in spec.items()}


def _weighted(name: str, value: Any, functions: dict[str, LossFunction]) -> tuple[LossFunction, float]:
    if isinstance(value, tuple):  # already resolved
        return value
    _known(name, functions)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"the weight of loss {name!r} is {value!r}; it must be a number")
    return functions[name], float(value)


def _known(name: str, functions: Mapping[str, LossFunction]) -> str:
    if name not in functions:
        raise ValueError(f"loss {name!r} is unknown; use one of {sorted(functions)} or a JSON object of weights")
    return name


def _name_of(function: LossFunction) -> str:
    for functions in IMPLEMENTATIONS.values():
        for name, known in functions.items():
            if known is function:
                return name
    return getattr(function, "__name__", "custom")


def resolve_loss_fn(name: str) -> LossFunction:
    return FUSED[_known(name, FUSED)]


def loss_keywords(*, loss_fn: Any, loss_implementation: str = "fused", **_: Any) -> dict[str, Any]:
    """What training keys say of the loss, as forwards take it: `loss_config`, and `loss_fn` (the function of the only
    loss, or what was given)."""
    config = resolve_loss_config(loss_fn, loss_implementation)
    functions = [function for function, _ in config.values()]
    return {"loss_config": config, "loss_fn": functions[0] if len(functions) == 1 else loss_fn}


def choose_loss_config(loss_config: LossConfig | None, loss_fn: Any, default: str) -> LossConfig:
    """What a forward was told: `loss_config` wins over `loss_fn` (name, JSON, function), both may be absent."""
    return resolve_loss_config(loss_config or loss_fn or default)


def loss_function(
    logits: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    pos_idx: Tensor,
    loss_fn: LossFunction = kl_div_loss,
    decay_fn: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Mean over the batch of sum(loss * mask * decay) / (sum(mask) + 1e-5). The denominator carries no decay."""
    loss = loss_fn(logits, targets)
    mask = loss_mask.to(loss.dtype)
    weight = mask
    if decay_fn is not None:
        keywords = {}
        if "elementwise_loss" in inspect.signature(decay_fn).parameters:
            keywords["elementwise_loss"] = loss.detach() * mask
        weight = mask * decay_fn(pos_idx, **keywords)
    return ((loss * weight).sum(-1) / (mask.sum(-1) + MASK_EPSILON)).mean()


def compound_loss(
    logits: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    pos_idx: Tensor,
    loss_config: LossConfig,
    decay_fn: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted sum, {"<name>_loss": term} when there are several)."""
    terms = {
        name: loss_function(logits, targets, loss_mask, pos_idx, function, decay_fn)
        for name, (function, _) in loss_config.items()
    }
    total = sum((weight * terms[name] for name, (_, weight) in loss_config.items()), start=logits.new_zeros(()))
    return total, {f"{name}_loss": term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
