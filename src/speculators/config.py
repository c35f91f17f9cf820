"""Reads and writes config.json: which algorithm a speculator is, how it drafts, and which verifier it was made for.

A `SpeculatorModelConfig` is both a pydantic model (typed fields, families told apart by `speculators_model_type`) and
a transformers `PretrainedConfig` (saving, hub, model classes). Pydantic validates; transformers only stores.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
import transformers
from pydantic import ConfigDict, Field, PlainSerializer, field_validator, model_validator
from transformers import PretrainedConfig

from speculators.proposals import TokenProposalConfig
from speculators.utils.quantized import source
from speculators.utils.readable import ReadableModel
from speculators.utils.registry import PydanticClassRegistryMixin, ReloadableBaseModel
from speculators.utils.util import load_transformer_config, reading, refuse_huge

__all__ = ["SpeculatorModelConfig", "SpeculatorsConfig", "VerifierConfig", "reload_schemas"]

_TYPES = {"torch": torch}  # names that transformers' annotations use and only its type checker imports
# Keys that describe the writer's code or where a config was read from, not the speculator.
_KEYS_NOT_OURS = {"auto_map", "model_type", "_auto_class", "_commit_hash"}
_METADATA_KEYS = {
    *_KEYS_NOT_OURS,
    "model_config",
    "auto_package",
    "registry_auto_discovery",
    "schema_discriminator",
    "base_config_key",
    "sub_configs",
    "is_composition",
    "attribute_map",
    "base_model_tp_plan",
    "base_model_pp_plan",
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "has_no_defaults_at_init",
    "keys_to_ignore_at_inference",
}
_HF_FIELDS = {field.name for field in dataclasses.fields(PretrainedConfig)}


def installed_version() -> str:
    try:
        return version("speculators")
    except PackageNotFoundError:
        return "unknown"


class VerifierConfig(ReadableModel):
    """The verifier a speculator was made for."""

    name_or_path: str | None = Field(description="Hugging Face id or path; None when it is not recorded")
    architectures: list[str] = Field(description="The verifier's model classes, as its config.json names them")

    @classmethod
    def from_config(cls, config: PretrainedConfig, name_or_path: str | None = "UNSET") -> VerifierConfig:
        """From a config object. `name_or_path` defaults to what the config says of itself; None is kept as None."""
        values = config.to_dict()
        if name_or_path == "UNSET":
            name_or_path = (
                getattr(config, "name_or_path", None) or values.get("_name_or_path") or values.get("name_or_path")
            )
        return cls(name_or_path=name_or_path, architectures=values.get("architectures") or [])

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> VerifierConfig:
        """From the verifier's published config.json; the given name is recorded as it is."""
        values, _ = PretrainedConfig.get_config_dict(**source(name_or_path), **kwargs)
        return cls(name_or_path=str(name_or_path), architectures=values.get("architectures") or [])


class SpeculatorsConfig(ReloadableBaseModel):
    """Records how a speculator drafts and for whom: the `speculators_config` block that serving engines read."""

    algorithm: str = Field(description="Name of the algorithm; equals the config's speculators_model_type")
    proposal_methods: list[TokenProposalConfig] = Field(description="Supported ways to propose tokens, best first")
    default_proposal_method: str = Field(description="proposal_type of the method to use when none is asked for")
    verifier: VerifierConfig = Field(description="The verifier the speculator was made for")

    @model_validator(mode="after")
    def check_default_proposal_method(self) -> SpeculatorsConfig:
        available = [method.proposal_type for method in self.proposal_methods]
        if self.default_proposal_method not in available:
            raise ValueError(
                f"default_proposal_method '{self.default_proposal_method}' must match the proposal_type of one of the "
                f"configured proposal_methods; available: {available}"
            )
        return self


class _PydanticOwnsTheFields:
    """Stops `PretrainedConfig.__init_subclass__`, which makes a dataclass of every subclass and replaces `__init__`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class SpeculatorModelConfig(_PydanticOwnsTheFields, PydanticClassRegistryMixin, PretrainedConfig):
    """Root of the speculator configs. Subclass it, decorate with `@SpeculatorModelConfig.register("<name>")` and give
    `speculators_model_type` that name as its default; `from_dict` and `from_pretrained` then find your class by it.

    Unknown keys are kept as attributes and written back, so configs of other versions survive a round trip.
    """

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True, protected_namespaces=())

    auto_package: ClassVar[str] = "speculators.models"
    entry_point_group: ClassVar[str] = "speculators.models"
    registry_auto_discovery: ClassVar[bool] = True
    schema_discriminator: ClassVar[str] = "speculators_model_type"

    model_type: ClassVar[str] = "speculator_model"
    base_config_key: ClassVar[str] = ""
    sub_configs: ClassVar[dict[str, Any]] = {}
    is_composition: ClassVar[bool] = False
    attribute_map: ClassVar[dict[str, str]] = {}
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = None
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = None
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = None
    has_no_defaults_at_init: ClassVar[bool] = False
    keys_to_ignore_at_inference: ClassVar[list[str]] = []

    dtype: Any = None  # transformers annotates it with a name that only its type checker imports
    speculators_model_type: str = Field(default="", description="Which algorithm this is")
    speculators_version: str = Field(default_factory=installed_version, description="Version that wrote the config")
    speculators_config: SpeculatorsConfig | None = Field(
        default=None, description="How to draft with it; needed for serving, optional while building"
    )

    default_transformer_model_type: ClassVar[str] = "qwen3"
    """What a `transformer_layer_config` dict without `model_type` describes."""

    @classmethod
    def __pydantic_schema_base_type__(cls) -> type[Any]:
        # asked while the class is being made, when its global name is not bound yet
        return cls if cls.__name__ == "SpeculatorModelConfig" else SpeculatorModelConfig

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # As metadata of the field and not as a `field_serializer`: pydantic allows one per field, and a
        # subclass may bring its own, under any name, which wins.
        nested = cls.model_fields.get("transformer_layer_config")
        if nested is not None and _DUMP_NESTED not in nested.metadata:
            nested.metadata.append(_DUMP_NESTED)
            cls.model_rebuild(force=True, raise_errors=False, _types_namespace=_TYPES)
        # a field of type PretrainedConfig is incomplete until `torch`, which its annotations mention, is known
        if not cls.__pydantic_complete__:
            cls.model_rebuild(raise_errors=False, _types_namespace=_TYPES)

    @field_validator("transformer_layer_config", mode="before", check_fields=False)
    @classmethod
    def validate_transformer_config(cls, value: Any) -> PretrainedConfig:
        """For subclasses that have the field: a config stays, a dict becomes the class its `model_type` names."""
        return load_transformer_config(value, cls.default_transformer_model_type)

    def serialize_transformer_config(self, value: PretrainedConfig) -> dict[str, Any]:
        """Writes that field; a subclass with a `field_serializer` of its own for it writes it its way."""
        return dump_transformer_config(value)

    def __init__(self, **kwargs: Any) -> None:
        # what code of the writer put there is dropped, and what is computed: neither can be set on an instance
        super().__init__(**{key: value for key, value in kwargs.items() if self._can_set(key)})
        if type(self) is SpeculatorModelConfig:
            return  # carries the values of an object that went through the lines below
        refuse_huge(self.__dict__, "config.json")
        with reading("config.json"):
            PretrainedConfig.__init__(self, **{**self.__dict__, **(self.model_extra or {})})
            self.to_dict()
        self.transformers_version = transformers.__version__

    @classmethod
    def _can_set(cls, key: str) -> bool:
        if key in _KEYS_NOT_OURS or key in cls.__class_vars__:
            return False
        attribute = getattr(cls, key, None)
        return not (isinstance(attribute, property) and attribute.fset is None)

    @property
    def recorded_verifier(self) -> str | None:
        """Hub id or directory of the verifier it was made for."""
        return None if self.speculators_config is None else self.speculators_config.verifier.name_or_path

    def validate(self) -> None:  # type: ignore[override]
        """transformers calls this before saving; pydantic, whose own `validate` means another thing, has validated."""

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        """Keys, as a PretrainedConfig does; pydantic would give (key, value) pairs."""
        yield from {**self.__dict__, **(self.model_extra or {})}

    def __eq__(self, other: Any) -> bool:
        """Same class and same values; where a config was read from does not count."""
        if type(self) is not type(other):
            return False
        origin = {"_name_or_path": None}
        return self.to_dict() | origin == other.to_dict() | origin

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> SpeculatorModelConfig:
        """The config a dictionary describes, of the class its `speculators_model_type` names; kwargs win."""
        values = {**config_dict, **kwargs}
        if "speculators_model_type" not in values:
            raise ValueError(
                "The config dictionary must contain the 'speculators_model_type' field to say which algorithm it is; "
                f"available: {SpeculatorModelConfig.available_names()}"
            )
        return SpeculatorModelConfig.model_validate(values)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> SpeculatorModelConfig:
        """Read config.json from a directory, a file or the hub."""
        config_dict, leftover = cls.get_config_dict(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            **kwargs,
        )
        if "speculators_model_type" not in config_dict:
            raise NotImplementedError(
                "Loading a non-speculator model config is not supported yet. "
                f"'{pretrained_model_name_or_path}' has no 'speculators_model_type'; convert the checkpoint first."
            )
        return cls.from_dict(config_dict, **leftover)

    def to_dict(self) -> dict[str, Any]:
        """Every value, ready for JSON."""
        values = {**PretrainedConfig.to_dict(self), **self.model_dump(exclude={"transformers_version"})}
        values = {key: value for key, value in values.items() if key not in _METADATA_KEYS}
        self.dict_dtype_to_str(values)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns what config.json holds: every field of ours, and of transformers' what differs from its defaults."""
        values, defaults = self.to_dict(), PretrainedConfig().to_dict()
        own_fields = set(type(self).model_fields) - _HF_FIELDS
        return {
            key: value
            for key, value in values.items()
            if key != "_name_or_path"
            and (key in own_fields or key == "transformers_version" or key not in defaults or value != defaults[key])
        }

    @classmethod
    def reload_schema(cls) -> None:
        """Rebuild this class's schema; called on the root, also discover the installed algorithms and rebuild each."""
        cls.model_rebuild(force=True, _types_namespace=_TYPES)
        if cls is SpeculatorModelConfig:
            cls.auto_populate_registry()
            for member in (cls.registry or {}).values():
                member.model_rebuild(force=True, _types_namespace=_TYPES)


def reload_schemas() -> None:
    """Discover every installed algorithm and proposal, and rebuild the schemas that mention them.

    Registering a class is enough for `from_dict`, `from_pretrained` and validation to find it; call this to import
    everything discoverable, or after changing the fields of a registered class."""
    TokenProposalConfig.auto_populate_registry()
    TokenProposalConfig.reload_schema()
    SpeculatorsConfig.reload_schema()
    SpeculatorModelConfig.reload_schema()


def dump_transformer_config(config: PretrainedConfig) -> dict[str, Any]:
    """The dict that config.json holds for a nested config: complete, since vLLM reads it without class defaults."""
    values = config.to_diff_dict()
    values.pop("transformers_version", None)
    values.pop("_name_or_path", None)
    return {**values, "model_type": config.model_type}


_DUMP_NESTED = PlainSerializer(dump_transformer_config)
