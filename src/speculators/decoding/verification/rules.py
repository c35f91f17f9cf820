"""The acceptance rules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from speculators.decoding.verification.chain import BlockRule, GreedyRule, StandardRule, StrictRule
from speculators.decoding.verification.lossy import SyntheticRule, ToleranceRule, TypicalRule
from speculators.interfaces import AcceptanceRule

RULES: dict[str, Callable[..., AcceptanceRule]] = {
    "greedy": GreedyRule,
    "strict": StrictRule,
    "standard": StandardRule,
    "probabilistic": StandardRule,  # its name before vLLM 0.32
    "block": BlockRule,
    "tolerance": ToleranceRule,
    "typical": TypicalRule,
    "synthetic": SyntheticRule,
}


def resolve_rule(name: str, **options: Any) -> AcceptanceRule:
    """The rule called `name`; `options` are its dataclass's fields. Raises ValueError for unknown names or options."""
    if name not in RULES:
        raise ValueError(f"acceptance rule {name!r} does not exist; choose one of {sorted(RULES)}")
    try:
        return RULES[name](**options)
    except TypeError as error:
        raise ValueError(f"acceptance rule {name!r} does not take these options: {error}") from error
