"""Pydantic base classes: schemas that can be rebuilt, and families of models distinguished by a tag field.

Validating the root of a family returns an instance of the class that its tag names. The tag is looked up in the
registry at validation time, so a newly registered (or discovered) class is known at once: no schema goes stale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from speculators.utils.registry import ClassRegistryMixin

T = TypeVar("T", bound=type)


class ReloadableBaseModel(BaseModel):
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
            context = {"discriminator": discriminator, "tag": str(tag), "expected_tags": expected}
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
