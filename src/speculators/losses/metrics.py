"""Metrics as (numerator, denominator) pairs, so that ranks, batches and runs can be added before dividing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speculators.interfaces import Ratio


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
