"""Describes what is wrong with a checkpoint and how to fix it. Records only: nothing here reads files.

The check itself is `speculators.deploy.check_checkpoint`; algorithms add what only they know through
`CheckpointContract.findings`, formats through `CheckpointFormat.findings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

CONVERTED = "converted"
"""Directory that a conversion writes unless told another."""

Severity = Literal["error", "warning"]
"""error: the served drafter would fail, or would not be the one that was trained. warning: worth a look."""
VLLM_HERE = "{vLLM}"
"""In a rule: the release of vLLM that a check is asked about. Such a rule is vLLM's alone: a check for another engine
leaves its finding out."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, the rule it breaks, and the fix."""

    severity: Severity
    code: str
    """Short and stable: scripts may compare it."""
    where: str
    """The key of config.json, the tensor or the file."""
    found: str
    rule: str
    fix: str
    """What to do about it."""

    @property
    def is_of_vllm_alone(self) -> bool:
        return VLLM_HERE in self.rule

    def naming(self, release: str) -> Finding:
        """The same finding with the name of the release, "vLLM 0.33", in its rule."""
        return replace(self, rule=self.rule.replace(VLLM_HERE, release))

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity} {self.code}: {self.where}: {self.found}; {self.rule}. {self.fix}"


def error(code: str, where: str, found: str, rule: str, fix: str) -> Finding:
    return Finding("error", code, where, found, rule, fix)


def warning(code: str, where: str, found: str, rule: str, fix: str) -> Finding:
    return Finding("warning", code, where, found, rule, fix)


def mask_token_findings(values: Mapping[str, Any], vocab_size: int) -> Iterable[Finding]:
    """Reports a `mask_token_id` that is null, or no row of the verifier's embedding."""
    token = values.get("mask_token_id", 0)
    fix = "write the id the drafter was trained with"
    if token is None:
        yield error("mask-token-missing", "mask_token_id", "null", "masked slots need a token", fix)
    elif isinstance(token, int) and not 0 <= token < vocab_size:
        rule = f"the verifier's embedding has the rows 0..{vocab_size - 1}"
        yield error("mask-token-range", "mask_token_id", str(token), rule, fix)


def missing_keys(values: Mapping[str, Any], meaning_of_absence: Mapping[str, str]) -> Iterable[Finding]:
    """Reports keys that config.json lacks; `meaning_of_absence` says what vLLM does without each."""
    for key, meaning in meaning_of_absence.items():
        if key not in values:
            rule, fix = f"without it {VLLM_HERE} {meaning}", f"write {key} into config.json"
            yield error("key-missing", key, "not in config.json", rule, fix)


# -- the fault of a drafter behind a finding, by the names of `diagnose`

NAME_OF_CODE = {
    "verifier-precision": "quantised-target",
    "embedding-differs": "embedding",
    "head-rows-differ": "head",
    "head-rows-shifted": "vocabulary-map",
    "aux-ids-order": "aux-order",
    "aux-ids-range": "aux-layers",
}
NAME_OF_PLACE = {
    "rope": "rope",
    "layer_ids": "aux-layers",
    "norm": "norms",
    "d2t": "vocabulary-map",
    "t2d": "vocabulary-map",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "window": "context",
}
"""Part of the name of a key or tensor -> cause."""
SUSPECT_WARNINGS = ("verifier-precision", "verifier-edited", "tensor-edited")


def fault_of(found: Finding) -> str:
    """Returns the name of the cause of low acceptance that a finding is; "checkpoint" where it has no other."""
    if found.code in NAME_OF_CODE:
        return NAME_OF_CODE[found.code]
    if found.code.startswith("verifier-"):
        return "verifier"
    places = (name for part, name in NAME_OF_PLACE.items() if part in found.where)
    return next(places, "checkpoint")
