"""Defines the root of the token proposals; `proposal_type` says which one a record is."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from speculators.utils.registry import PydanticClassRegistryMixin


class TokenProposalConfig(PydanticClassRegistryMixin):
    """Describes how a speculator proposes tokens. `TokenProposalConfig.model_validate(record)` returns an instance of
    the class that the record's `proposal_type` names."""

    auto_package: ClassVar[str] = "speculators.proposals"
    auto_ignore_modules: ClassVar[tuple[str, ...]] = ("base",)
    registry_auto_discovery: ClassVar[bool] = True
    schema_discriminator: ClassVar[str] = "proposal_type"

    proposal_type: str = Field(description="Which kind of token proposal this is")

    @classmethod
    def __pydantic_schema_base_type__(cls) -> type[Any]:
        # asked while the class is being made, when its global name is not bound yet
        return cls if cls.__name__ == "TokenProposalConfig" else TokenProposalConfig
