"""The table of losses by name, mixes of them, their reduction over positions and the weights of positions.

The exported functions work on [..., V] logits on any device. Each loss has two implementations: a closed form
(`losses.closed_form`) and plain autograd (`losses.eager`). Training gives neither of them [T, V] logits: see
`losses.chunked`. Weights never carry gradient; their `pos_idx` (of any shape) is the slot inside a block or the unroll
step.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculators.losses import closed_form, eager
from speculators.losses.closed_form import ClosedForm, KernelOutput, LogitRows, LossKernel, TargetRows

LossFunction = Callable[..., Tensor]
LossConfig = dict[str, tuple[LossFunction, float]]
"""name -> (function of (logits, targets), weight); weights are not normalised."""
LossSpec = str | Mapping[str, float] | LossFunction | LossConfig
"""A name, weights by name (as JSON too), one function, or what was made of them."""

MASK_EPSILON = 1e-5
"""Added to the number of supervised positions: a row without any has loss 0, not NaN."""


class Loss(NamedTuple):
    reference: LossFunction
    """Plain autograd over logits."""
    kernel: Callable[..., KernelOutput]
    """The same in closed form, over rows: a `LossKernel`, perhaps with options of the reference."""


LOSSES = {
    "kl_div": Loss(eager.kl_div_loss, closed_form.kl_div),
    "rkl": Loss(eager.reverse_kl_div_loss, closed_form.reverse_kl),
    "jsd": Loss(eager.js_div_loss, closed_form.js_div),
    "ce": Loss(eager.ce_loss, closed_form.ce),
    "tv": Loss(eager.tv_loss, closed_form.tv),
    "nla": Loss(eager.neg_log_acceptance_loss, closed_form.neg_log_acceptance),
    "lk_hybrid": Loss(eager.lk_hybrid_loss, closed_form.lk_hybrid),
}


def fused(loss: Loss) -> LossFunction:
    """Makes a function of logits from the kernel, with the reference's name, signature and docstring."""

    @functools.wraps(loss.reference)
    def function(logits: Tensor, targets: Tensor, *options: float, **named_options: float) -> Tensor:
        def kernel(draft: LogitRows, target: TargetRows, wants_grad: bool) -> KernelOutput:
            return loss.kernel(draft, target, wants_grad, *options, **named_options)

        return ClosedForm.apply(kernel, logits, targets)

    function.__module__ = __name__
    return function


EAGER = {name: loss.reference for name, loss in LOSSES.items()}
FUSED = {name: fused(loss) for name, loss in LOSSES.items()}
IMPLEMENTATIONS = {"fused": FUSED, "eager": EAGER}
KERNELS: dict[LossFunction, LossKernel] = {FUSED[name]: loss.kernel for name, loss in LOSSES.items()}

kl_div_loss = FUSED["kl_div"]
reverse_kl_div_loss = FUSED["rkl"]
js_div_loss = FUSED["jsd"]
ce_loss = FUSED["ce"]
tv_loss = FUSED["tv"]
neg_log_acceptance_loss = FUSED["nla"]
lk_hybrid_loss = FUSED["lk_hybrid"]


def is_reference(function: LossFunction) -> bool:
    return function in EAGER.values()


def resolve_loss_config(spec: LossSpec, implementation: str = "fused") -> LossConfig:
    """Returns {name: (function, weight)} from a name, a JSON object of weights, a mapping, a function, or a resolved
    config. Raises `ValueError` on an unknown name or implementation, and on a weight that is no number."""
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


def loss_keywords(loss_fn: LossSpec, loss_implementation: str) -> dict[str, Any]:
    """Resolves the training keys of the loss into a forward's keywords: `loss_config`, and `loss_fn` (the function of
    the only loss, or what was given)."""
    config = resolve_loss_config(loss_fn, loss_implementation)
    functions = [function for function, _ in config.values()]
    return {"loss_config": config, "loss_fn": functions[0] if len(functions) == 1 else loss_fn}


def choose_loss_config(loss_config: LossConfig | None, loss_fn: LossSpec | None, default: str) -> LossConfig:
    """Resolves a forward's keywords: `loss_config` wins over `loss_fn` (name, JSON, function); both may be absent."""
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
    """Returns (weighted sum, {"<name>_loss": term} when there are several)."""
    terms = {
        name: loss_function(logits, targets, loss_mask, pos_idx, function, decay_fn)
        for name, (function, _) in loss_config.items()
    }
    total = sum((weight * terms[name] for name, (_, weight) in loss_config.items()), start=logits.new_zeros(()))
    return total, {f"{name}_loss": term.detach() for name, term in terms.items()} if len(terms) > 1 else {}


def dflash_loss_decay(pos_idx: Tensor, gamma: float, sample_from_anchor: bool = False) -> Tensor:
    """exp(-(k - 1) / gamma) with weight 0 at slot 0 (the bonus token); sampling from the anchor: exp(-k / gamma)."""
    pos_idx = pos_idx.float()
    if sample_from_anchor:
        return (-pos_idx / gamma).exp()
    return (-(pos_idx - 1.0) / gamma).exp().where(pos_idx >= 1, 0.0)


def exp_loss_decay(pos_idx: Tensor, gamma: float) -> Tensor:
    """gamma ** k"""
    return torch.pow(gamma, pos_idx.float())


@torch.no_grad()
def dpace_loss_decay(
    pos_idx: Tensor, loss_mask: Tensor, block_size: int, dpace_alpha: float, elementwise_loss: Tensor
) -> Tensor:
    """D-PACE: the weight of a slot is the summed chance that the chain reaches it and each slot after it.

    c_k = exp(-ce_k), s_k = (1 - alpha) c_k + alpha (1 where masked), P_k = prod_{j <= k} s_j,
    w_k = m_k sum_{j >= k} P_j m_j                                                     block by block
    """
    length = loss_mask.shape[-1]
    if length % block_size:
        raise ValueError(f"{length} positions do not divide into blocks of block_size={block_size}; pad to a multiple")
    mask = loss_mask.float().unflatten(-1, (-1, block_size))
    correct = (-elementwise_loss.float().unflatten(-1, (-1, block_size)) * mask).exp()
    survive = ((1.0 - dpace_alpha) * correct + dpace_alpha).where(mask > 0, 1.0)
    reach = survive.cumprod(-1) * mask
    return (mask * reach.flip(-1).cumsum(-1).flip(-1)).flatten(-2)
