"""Metrics as (numerator, denominator) pairs, so that ranks, batches and runs can be added before dividing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def counted(name: str, numerator: Tensor | float, denominator: Tensor | float) -> dict[str, Tensor]:
    """{name_sum, name_total}, detached, in fp32 or wider."""
    pair = {f"{name}_sum": torch.as_tensor(numerator), f"{name}_total": torch.as_tensor(denominator)}
    return {key: (x if x.dtype == torch.float64 else x.float()).detach() for key, x in pair.items()}


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
