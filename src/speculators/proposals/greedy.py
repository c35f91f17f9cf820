"""Defines greedy drafting: a chain of draft tokens, each the drafter's most likely one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speculators.proposals.base import TokenProposalConfig


@TokenProposalConfig.register("greedy")
class GreedyTokenProposalConfig(TokenProposalConfig):
    """Drafts greedily; accepts tokens that agree with the verifier, or come near enough to its best token."""

    proposal_type: Literal["greedy"] = "greedy"
    speculative_tokens: int = Field(default=5, ge=1, description="Longest chain drafted per verifier pass")
    verifier_accept_k: int = Field(
        default=1, ge=1, description="A draft token is acceptable when it is among the verifier's k most likely tokens"
    )
    accept_tolerance: float = Field(
        default=0.0,
        ge=0.0,
        description="With k > 1: largest log-likelihood gap to the verifier's best token; 0 behaves like k = 1",
    )
