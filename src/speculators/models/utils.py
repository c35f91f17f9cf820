"""Public names of earlier releases. The code is in `speculators.verifier`; the library does not use this module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from speculators.verifier.config import (
    flatten_rope_parameters,
    get_verifier_config,
    resolve_draft_intermediate_size,
    resolve_target_layer_ids,
)
from speculators.verifier.loading import resolve_verifier_norm_class

__all__ = [
    "conditional_torch_compile",
    "flatten_rope_parameters",
    "get_verifier_config",
    "resolve_draft_intermediate_size",
    "resolve_target_layer_ids",
    "resolve_verifier_norm_class",
]


def conditional_torch_compile(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile` where it pays (an accelerator); the function itself elsewhere. Also `@...(dynamic=True)`."""
    if function is None:
        return lambda decorated: conditional_torch_compile(decorated, **options)
    return torch.compile(function, **options) if torch.cuda.is_available() else function
