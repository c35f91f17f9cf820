"""Registers classes by decorator and finds them by name; imports classes of our own package on first use. For
families of pydantic models, the name is the tag field of the data.

A family (model configs, models, token proposals) is a root class with its own `registry`. `find` looks in the
registry, then for a module of that name in `auto_package`, then for an installed entry point of that name.

Validating the root of a pydantic family returns an instance of the class that its tag names. The tag is looked up in
the registry at validation time, so a newly registered (or discovered) class is known at once: no schema goes stale.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from speculators.utils.readable import ReadableModel

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
            raise ValueError(
                f"{cls.__name__}.register must be used as a class decorator with a name that is a string or None, got "
                f"{name!r}"
            )
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
                import_whole(module)
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
                import_whole(f"{package}.{name}")
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


def import_whole(module: str) -> None:
    """Imports a module, and what it offers lazily: classes register when they are defined."""
    imported = importlib.import_module(module)
    for name in getattr(imported, "__all__", ()):
        getattr(imported, name)


class ReloadableBaseModel(ReadableModel):
    """A pydantic model whose compiled schema can be rebuilt after the types it refers to changed."""

    @classmethod
    def reload_schema(cls) -> None:
        """Rebuilds the schema."""
        cls.model_rebuild(force=True)


class PydanticClassRegistryMixin(ReloadableBaseModel, ABC, ClassRegistryMixin):
    """Base of a family of pydantic models; `schema_discriminator` names the field that says which member it is.

    Calling the root as a constructor gives an object of the ROOT type with the member's fields (callers rely on it);
    `Root.model_validate(data)` gives the member itself.
    """

    schema_discriminator: ClassVar[str] = "model_type"

    @classmethod
    @abstractmethod
    def __pydantic_schema_base_type__(cls) -> type[Any]:
        """Returns the root type of the family."""

    @classmethod
    def __pydantic_generate_base_schema__(cls, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Returns the schema of the root while nothing is registered: it accepts anything."""
        return core_schema.any_schema()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if cls is not cls.__pydantic_schema_base_type__():
            return handler(source)
        return core_schema.no_info_wrap_validator_function(
            cls._validate_by_tag,
            cls.__pydantic_generate_base_schema__(handler),
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )

    @classmethod
    def register_decorator(cls, clazz: T, name: str | None = None) -> T:
        """Registers a pydantic model. Raises `TypeError` for another class, else as the base class does."""
        if not isinstance(clazz, type) or not issubclass(clazz, BaseModel):
            if isinstance(clazz, type):
                raise TypeError(f"{cls.__name__}.register: {clazz!r} is not a subclass of Pydantic BaseModel")
            raise TypeError(f"{cls.__name__}.register must be used as a class decorator, got {clazz!r}")
        return super().register_decorator(clazz, name)

    def __init__(self, **data: Any) -> None:
        if type(self) is not type(self).__pydantic_schema_base_type__():
            super().__init__(**data)
            return
        member = type(self).model_validate(data)
        is_model = isinstance(member, BaseModel)
        object.__setattr__(self, "__dict__", dict(member.__dict__ if is_model else data))
        object.__setattr__(self, "__pydantic_extra__", dict(member.model_extra or {}) if is_model else None)
        object.__setattr__(self, "__pydantic_fields_set__", set(member.model_fields_set if is_model else data))
        object.__setattr__(self, "__pydantic_private__", None)

    @classmethod
    def _validate_by_tag(cls, value: Any, validate_base: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not cls.registry and not cls.registry_auto_discovery:
            return validate_base(value)
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_attributes_type")
        discriminator = f"'{cls.schema_discriminator}'"
        if cls.schema_discriminator not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": discriminator})
        tag = value[cls.schema_discriminator]
        member = cls.find(tag) if isinstance(tag, str) else None
        if member is None:
            expected = ", ".join(f"'{name}'" for name in cls.available_names())
            named = str(tag).encode("ascii", "backslashreplace").decode()[:100]  # pydantic takes no lone surrogate
            context = {"discriminator": discriminator, "tag": named, "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", context)
        return member.model_validate(dict(value))


def _dump(value: Any, info: core_schema.SerializationInfo) -> Any:
    """Dumps every field of the actual member, whatever the annotation says."""
    if not isinstance(value, PydanticClassRegistryMixin):
        return value
    base = type(value).__pydantic_schema_base_type__()
    if type(value) is not base:
        return value.model_dump(mode=info.mode, exclude_none=info.exclude_none, exclude_unset=info.exclude_unset)
    # a root-typed object: its own serializer is this function, so hand over its plain values
    return {**value.__dict__, **(value.model_extra or {})}
