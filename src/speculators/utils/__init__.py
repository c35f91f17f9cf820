"""Helpers that know nothing of models: registries, pydantic bases, weight lookup, files, devices. Names load lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speculators.utils.names import lazy_attributes

if TYPE_CHECKING:
    from speculators.utils.registry import ClassRegistryMixin, PydanticClassRegistryMixin, ReloadableBaseModel

__all__ = ["ClassRegistryMixin", "PydanticClassRegistryMixin", "ReloadableBaseModel"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {"ClassRegistryMixin": "registry", "PydanticClassRegistryMixin": "registry", "ReloadableBaseModel": "registry"},
)
