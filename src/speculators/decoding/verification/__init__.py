"""Decides which draft tokens the verifier keeps: pure rules, no model, no cache. Start at `resolve_rule`."""

from speculators.decoding.verification.chain import BlockRule, GreedyRule, StandardRule, StrictRule
from speculators.decoding.verification.draws import (
    DRAFT_STREAM,
    UniformDraws,
    inverse_cdf,
    keyed_draws,
    keyed_uniform,
    seed_drafts,
    uniform_draws,
)
from speculators.decoding.verification.rules import SyntheticRule, ToleranceRule, TypicalRule, resolve_rule
from speculators.interfaces import Draws

__all__ = [
    "DRAFT_STREAM",
    "BlockRule",
    "Draws",
    "GreedyRule",
    "StandardRule",
    "StrictRule",
    "SyntheticRule",
    "ToleranceRule",
    "TypicalRule",
    "UniformDraws",
    "inverse_cdf",
    "keyed_draws",
    "keyed_uniform",
    "resolve_rule",
    "seed_drafts",
    "uniform_draws",
]
