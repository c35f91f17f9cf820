"""Errors of configs that people read: pydantic models whose errors say a line for each value, with its rule, by every
door: the constructor, `model_validate`, inside another config. Imports nothing heavy, for `--help`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from speculators.utils.names import did_you_mean

MOST_SHOWN = 200
"""Characters of a wrong value."""


class ReadableError(ValidationError):
    """Says what is wrong with a config as the command line does: a line for each value, with its rule."""

    def __str__(self) -> str:
        return "\n".join(map(validation_line, self.errors(include_url=False)))

    __repr__ = __str__


class ReadableModel(BaseModel):
    """Base of configs whose errors people read."""

    retired_keys: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier releases -> what to use instead."""

    @model_validator(mode="before")
    @classmethod
    def refuse_retired_keys(cls, values: Any) -> Any:
        given = values if isinstance(values, Mapping) else {}
        found = [f"{key} is retired: {reason}" for key, reason in cls.retired_keys.items() if key in given]
        if found:
            raise ValueError("; ".join(found))
        return values

    def __init__(self, **values: Any) -> None:
        with readable(type(self)):
            super().__init__(**values)

    @classmethod
    def model_validate(cls, *args: Any, **options: Any) -> Self:
        with readable(cls):
            return super().model_validate(*args, **options)

    @classmethod
    def model_validate_json(cls, *args: Any, **options: Any) -> Self:
        with readable(cls):
            return super().model_validate_json(*args, **options)

    if not TYPE_CHECKING:  # a type checker would allow every attribute

        def __setattr__(self, name: str, value: Any) -> None:
            if self.model_config.get("frozen"):
                with readable(type(self)):
                    super().__setattr__(name, value)
            else:
                super().__setattr__(name, value)


@contextmanager
def readable(model: type[BaseModel]) -> Iterator[None]:
    """Turns a `ValidationError` of the block into a readable one of the same kinds and places."""
    try:
        yield
    except ReadableError:
        raise
    except ValidationError as error:
        lines = [line_of(detail, model) for detail in error.errors(include_url=False)]
        raise ReadableError.from_exception_data(error.title, lines) from None


def line_of(detail: Any, model: type[BaseModel]) -> InitErrorDetails:
    """A line of an error as pydantic takes it back; an unknown key is given the nearest name of the model."""
    line: dict[str, Any] = {name: detail[name] for name in ("type", "loc", "input", "ctx") if name in detail}
    if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1 and detail["msg"].endswith("permitted"):
        message = f"{detail['msg']}.{did_you_mean(str(detail['loc'][0]), model.model_fields)}".removesuffix(".")
        line["type"] = custom("extra_forbidden", message)
    elif detail["type"] == "extra_forbidden":  # made here, by a model inside this one
        line["type"] = custom("extra_forbidden", detail["msg"])
    return line  # type: ignore[return-value]


def custom(kind: Any, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{message}", {"message": message})


def validation_line(detail: Any) -> str:
    """`key: rule, got value`; rules of our own say their value themselves."""
    where, rule = ".".join(str(part) for part in detail["loc"]), rule_of(detail)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return f"{where} is required"
    if kind == "union_tag_not_found":
        return ".".join(part for part in (where, context["discriminator"].strip("'")) if part) + " is required"
    if kind == "frozen_instance":
        return f"{where} cannot be set: this config does not change; make another one"
    if kind in ("value_error", "union_tag_invalid", "extra_forbidden"):
        return (f"{where}: " if where else "") + rule
    return f"{where}: {rule}, got {shown(detail['input'])}"


def rule_of(detail: Any) -> str:
    """What a value must be, in the words of the command line."""
    if detail["type"] == "union_tag_invalid":
        context = detail["ctx"]
        names = context["expected_tags"].replace("'", "").split(", ")
        tag = f"{context['discriminator'].strip(chr(39))} {context['tag']!r}"
        expected = f"does not match any of the expected tags: {context['expected_tags']}"
        return f"{tag} {expected}.{did_you_mean(context['tag'], names)}".removesuffix(".")
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    if detail["type"].endswith("_parsing"):
        message = message.partition(", unable to")[0]
    return message.replace("Input should be", "must be").replace("Input should have", "must have")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
