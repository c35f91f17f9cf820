"""What can be wrong with a checkpoint, said and how to fix it. Records only: nothing here looks at files.

The check itself is `speculators.deploy.check_checkpoint`; algorithms add what only they know through
`CheckpointContract.findings`, formats through `CheckpointFormat.findings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

VLLM_PROFILE = "vllm-0.32"
"""The engine version whose reading of a checkpoint the rules describe."""

Severity = Literal["error", "warning"]
"""error: served, it would fail or be another drafter than the one that was trained. warning: look at it."""


@dataclass(frozen=True)
class Finding:
    severity: Severity
    code: str
    """Short and stable: scripts may compare it."""
    where: str
    """The key of config.json, the tensor or the file."""
    found: str
    rule: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity} {self.code}: {self.where}: {self.found}; {self.rule}. {self.fix}"


def error(code: str, where: str, found: str, rule: str, fix: str) -> Finding:
    return Finding("error", code, where, found, rule, fix)


def warning(code: str, where: str, found: str, rule: str, fix: str) -> Finding:
    return Finding("warning", code, where, found, rule, fix)


def null_mask_token(values: Mapping[str, Any]) -> Iterable[Finding]:
    """An error if `mask_token_id` is there without a value."""
    if values.get("mask_token_id", 0) is None:
        yield error(
            "mask-token-missing",
            "mask_token_id",
            "null",
            "masked slots need a token",
            "write the id the drafter was trained with",
        )


def missing_keys(values: Mapping[str, Any], meaning_of_absence: Mapping[str, str]) -> Iterable[Finding]:
    """Errors for keys of config.json that are absent; `meaning_of_absence` says what an engine then does."""
    for key, meaning in meaning_of_absence.items():
        if key not in values:
            yield error(
                "key-missing", key, "not in config.json", f"without it vLLM {meaning}", f"write {key} into config.json"
            )
