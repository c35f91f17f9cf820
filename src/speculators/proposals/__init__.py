"""Describes drafting in config.json: the token-proposal records of `speculators_config.proposal_methods`."""

from speculators.proposals.base import TokenProposalConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig

__all__ = ["GreedyTokenProposalConfig", "TokenProposalConfig"]
