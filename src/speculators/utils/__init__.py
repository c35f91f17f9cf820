"""Helpers that know nothing of models: registries, pydantic bases, weight lookup, files, devices. Names load lazily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculators.utils.pydantic_utils import PydanticClassRegistryMixin, ReloadableBaseModel
    from speculators.utils.registry import ClassRegistryMixin

__all__ = ["ClassRegistryMixin", "PydanticClassRegistryMixin", "ReloadableBaseModel"]

_HOME = {
    "ClassRegistryMixin": "registry",
    "PydanticClassRegistryMixin": "pydantic_utils",
    "ReloadableBaseModel": "pydantic_utils",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
