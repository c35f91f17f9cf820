"""Registers classes by decorator and finds them by name; imports classes of our own package on first use.

A family (model configs, models, token proposals) is a root class with its own `registry`. `find` looks in the
registry, then for a module of that name in `auto_package`, then for an installed entry point of that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

T = TypeVar("T", bound=type)


class ClassRegistryMixin:
    """Gives a class a registry of its own and the decorators `register(name)` and `register_decorator`."""

    registry: ClassVar[dict[str, Any] | None] = None
    """name -> class in registration order; None until the first class is registered."""
    registry_auto_discovery: ClassVar[bool] = False
    """True: `find` and `registered_classes` also look in `auto_package` and the entry points."""
    registry_populated: ClassVar[bool] = False
    """True once everything that can be discovered was imported."""
    auto_package: ClassVar[str | tuple[str, ...] | None] = None
    auto_ignore_modules: ClassVar[tuple[str, ...]] = ()
    """Modules of `auto_package` that register nothing."""
    entry_point_group: ClassVar[str | None] = None
    """Installed distributions register through this group: entry-point name = registered name."""

    @classmethod
    def register(cls, name: str | None = None) -> Callable[[T], T]:
        """Returns a class decorator that registers under `name`, or under the class's own name.

        Raises `ValueError` for a name that is not a string or is taken, `TypeError` for anything but a class.
        """
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{cls.__name__}.register: name must be a string or None, got {name!r}")
        return lambda clazz: cls.register_decorator(clazz, name)

    @classmethod
    def register_decorator(cls, clazz: T, name: str | None = None) -> T:
        """Registers `clazz` under `name`, or under its own name, and returns it. Raises as `register` does."""
        if not isinstance(clazz, type):
            raise TypeError(f"{cls.__name__}.register must be used as a class decorator, got {clazz!r}")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{cls.__name__}.register: name must be a string or None, got {name!r}")
        # A class owns its mapping: unrelated families, and sub-families that register, never share one.
        if cls.__dict__.get("registry") is None:
            cls.registry = {}
        assert cls.registry is not None
        key = name or clazz.__name__
        if key in cls.registry:
            raise ValueError(f"'{key}' is already registered in {cls.__name__} by {cls.registry[key]!r}")
        cls.registry[key] = clazz
        return clazz

    @classmethod
    def registered_classes(cls) -> tuple[type, ...]:
        """Returns every registered class, in registration order. Raises `ValueError` when nothing was registered."""
        if cls.registry_auto_discovery:
            cls.auto_populate_registry()
        if cls.registry is None:
            raise ValueError(f"{cls.__name__}.registered_classes() must be called after registering classes with it")
        return tuple(cls.registry.values())

    @classmethod
    def find(cls, name: str) -> Any | None:
        """Returns the class registered as `name`, importing its module if needed; None when no class has the name."""
        if name not in (cls.registry or {}) and cls.registry_auto_discovery:
            cls._import_provider(name)
        return (cls.registry or {}).get(name)

    @classmethod
    def find_all(cls) -> tuple[dict[str, Any], dict[str, Exception]]:
        """Returns (name -> class, name -> import error): a broken module does not hide the others."""
        errors: dict[str, Exception] = {}
        for name in cls.available_names():
            try:
                cls.find(name)
            except Exception as error:  # whatever a module does when it is imported
                errors[name] = error
        return dict(cls.registry or {}), errors

    @classmethod
    def available_names(cls) -> list[str]:
        """Lists registered names and those that could be imported, sorted; imports only the package itself."""
        names = set(cls.registry or {})
        if cls.registry_auto_discovery:
            names.update(name.rpartition(".")[2] for name in cls._discoverable_modules())
            names.update(point.name for point in cls._entry_points())
        return sorted(names)

    @classmethod
    def auto_populate_registry(cls) -> bool:
        """Imports everything discoverable. Returns True the first time, False when it was done before.

        Raises `ValueError` when the class does not discover (`registry_auto_discovery`).
        """
        if not cls.registry_auto_discovery:
            raise ValueError(f"{cls.__name__}.auto_populate_registry() needs registry_auto_discovery = True")
        if cls.registry_populated:
            return False
        cls.registry_populated = True  # before the imports: one of them may ask again
        try:
            for module in cls._discoverable_modules():
                importlib.import_module(module)
            for point in cls._entry_points():
                point.load()
        except BaseException:
            cls.registry_populated = False
            raise
        return True

    @classmethod
    def _import_provider(cls, name: str) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            return
        for package in cls._auto_packages():
            if importlib.util.find_spec(f"{package}.{name}") is not None:
                importlib.import_module(f"{package}.{name}")
        for point in cls._entry_points():
            if point.name == name:
                point.load()

    @classmethod
    def _auto_packages(cls) -> tuple[str, ...]:
        if cls.auto_package is None:
            raise ValueError(f"{cls.__name__} discovers its classes but has no auto_package to look in")
        return (cls.auto_package,) if isinstance(cls.auto_package, str) else tuple(cls.auto_package)

    @classmethod
    def _discoverable_modules(cls) -> list[str]:
        """Lists the sub-packages of `auto_package`, or its modules when it has no sub-packages."""
        found: list[str] = []
        for package in cls._auto_packages():
            modules = list(pkgutil.iter_modules(importlib.import_module(package).__path__))
            folders = [module.name for module in modules if module.ispkg]
            names = folders or [module.name for module in modules]
            found += [f"{package}.{name}" for name in names if name not in cls.auto_ignore_modules]
        return found

    @classmethod
    def _entry_points(cls) -> list[Any]:
        return list(entry_points(group=cls.entry_point_group)) if cls.entry_point_group else []
