"""`CheckReport`: what a check found, what it checked, and what it could not check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from speculators.checkpoint.engine_profile import VLLM, EngineProfile, Serving
from speculators.checkpoint.findings import Finding
from speculators.deploy.engine import Engine, Unserved
from speculators.utils.report import TableReport, WorkFailedError, facts_table

RECORD = "as it was trained"
"""The step that compares with the record of training."""


class CheckError(WorkFailedError):
    """The checkpoint would fail in the engine, or draft there otherwise than it was trained to."""

    def __init__(self, report: CheckReport, hint: str = "") -> None:
        lines = [f"  {found.where}: {found.found}; {found.rule}. Fix: {found.fix}" for found in report.errors]
        super().__init__("\n".join([f"{report.path} is not what was trained, or cannot be served{hint}:", *lines]))


@dataclass
class CheckReport(TableReport):
    """The result of a check; `add` and `skip` fill it while the check runs."""

    path: Path
    engine: Engine
    """Whose reading of the checkpoint the rules describe."""
    format: str = "unknown"
    speculators_model_type: str | None = None
    verifier: str | None = None
    findings: list[Finding] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    not_done: dict[str, str] = field(default_factory=dict)
    """What could not be checked -> why."""
    serving: Serving | None = None
    unserved: Unserved | None = None
    """Why the engine does not serve the directory; None: it does, or the check did not come to it."""
    notes: tuple[str, ...] = ()

    def add(self, what: str, found: Iterable[Finding]) -> None:
        """Records that `what` was checked, and its findings."""
        self.done.append(what)
        self.note(found)

    def note(self, found: Iterable[Finding]) -> None:
        """Records findings, with the release's name; not those of vLLM alone when another engine is asked about."""
        is_vllm = self.profile.engine == VLLM
        self.findings += [each.naming(self.profile.title) for each in found if is_vllm or not each.is_of_vllm_alone]

    def skip(self, what: str, why: str) -> None:
        """Records that `what` could not be checked."""
        self.not_done[what] = why

    @property
    def profile(self) -> EngineProfile:
        return self.engine.profile

    @property
    def options_step(self) -> str:
        return f"what {self.profile.title} makes of the options"

    @property
    def errors(self) -> list[Finding]:
        return [found for found in self.findings if found.severity == "error"]

    @property
    def ok(self) -> bool:
        return not self.errors

    def raise_for_errors(self, hint: str = "") -> None:
        """Raises `CheckError`, with every error and its fix, when the checkpoint must not be served."""
        if not self.ok:
            raise CheckError(self, hint)

    @property
    def verdict(self) -> str:
        num_errors = len(self.errors)
        if num_errors:
            return f"{num_errors} error{'s' * (num_errors > 1)}: do not serve it"
        if self.unserved is not None:
            return f"no errors; {self.unserved.why}"
        return "ready to serve" + (", as far as can be told without its record" if RECORD in self.not_done else "")

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "profile": self.profile.name,
            "ok": self.ok,
            "format": self.format,
            "speculators_model_type": self.speculators_model_type,
            "verifier": self.verifier,
            "findings": [found.as_dict() for found in self.findings],
            "checked": self.done,
            "not_checked": self.not_done,
            "serve_with": self.command,
        }

    def findings_tables(self) -> list[Table]:
        """None or one."""
        if not self.findings:
            return []
        table = Table(title="findings", title_justify="left", show_lines=True)
        for column in ("", "what", "where", "found, and the rule", "fix"):
            table.add_column(column, overflow="fold")
        for found in self.findings:
            colour = "red" if found.severity == "error" else "yellow"
            words = (found.code, found.where, f"{found.found}; {found.rule}", found.fix)
            table.add_row(f"[{colour}]{found.severity}[/]", *map(escape, words))
        return [table]

    def tables(self) -> list[Table]:
        facts = {
            "checkpoint": self.path,
            "format": f"{self.format} ({self.speculators_model_type})",
            "verifier": self.verifier,
            "engine": self.engine,
            "checked": ", ".join(self.done),
        }
        for what, why in self.not_done.items():
            facts[f"not checked: {what}"] = why
        if self.notes:
            facts["note"] = "\n".join(self.notes)
        if self.ok:
            facts["serve with"] = self.served_by
        return [*self.findings_tables(), facts_table("check", facts)]

    def sentence(self) -> str:
        return self.verdict

    def __rich__(self) -> Group:
        return Group(*self.tables(), self.verdict)

    def told(self, **settings: Any) -> CheckReport:
        """The same checkpoint, served with these settings of the engine's speculative config."""
        return self if self.serving is None else replace(self, serving=self.serving.told(settings))

    @property
    def command(self) -> str | None:
        """The command that serves the checkpoint; None: see `served_by`."""
        return None if self.serving is None else self.profile.command(self.serving)

    @property
    def served_by(self) -> str:
        """The command that serves the checkpoint, or what is missing."""
        if self.command is not None:
            return self.command
        return "nothing" if self.unserved is None else self.unserved.instead
