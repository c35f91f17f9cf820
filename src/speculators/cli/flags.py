"""Flags of all verbs: their one name each, the old names that are still accepted, and help and completion of the verbs
that read their flags by argparse, in the form of the others; `--threads`."""

from __future__ import annotations

import argparse
import inspect
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from speculators.cli.shared import say
from speculators.data_generation.configs import refuse_missing_source, refuse_missing_states, refuse_unprepared
from speculators.decoding.method import parse_method
from speculators.deploy.process import interpreter_of
from speculators.evaluation.config import refuse_missing_prompts
from speculators.utils.names import (
    refuse_missing_checkpoint,
    refuse_missing_path,
    refuse_missing_verifier,
    refuse_path_without_model,
)

OLD_NAMES: dict[str, dict[str, str]] = {
    "prepare-data": {"--verifier": "--model", "--limit": "--max-samples"},
    "inspect-mask": {"--verifier": "--model"},
    "regenerate-responses": {
        "--verifier": "--model",
        "--data": "--dataset",
        "--output": "--outfile",
        "--batch-size": "--concurrency",
    },
    "generate-offline-data": {"--verifier": "--model", "--data": "--preprocessed-data", "--limit": "--max-samples"},
    "convert": {"--output": "--output-path"},
    "stitch-mtp": {"--output": "--output-path"},
    "verify": {"--data": "--prompts", "--python": "--vllm-python", "--limit": "--num-prompts"},
    "evaluate": {"--limit": "--num-prompts"},
}
"""Verb -> flag -> its name in earlier releases: accepted, not shown. Those of `train` are in `train/flags.py`."""

HELP_FLAGS = ("-h", "--help")


def refuse_missing_drafter(drafter: str) -> None:
    parse_method(drafter)


def refuse_missing_report(file: str) -> None:
    refuse_missing_path(file, "the report", "name what `evaluate --output` wrote by --report")


def refuse_missing_result(file: str) -> None:
    refuse_missing_path(file, "the result", "name what `evaluate --output` wrote")


def refuse_verifier_without_model(verifier: str) -> None:
    refuse_path_without_model(verifier, "verifier", "a saved causal LM")


CHECKS: dict[str, Callable[[str], Any]] = {
    "verifier": refuse_missing_verifier,
    **dict.fromkeys(("checkpoint", "finetuned", "model", "draft"), refuse_missing_checkpoint),
    "data": refuse_missing_source,
    "method": refuse_missing_drafter,
    "report": refuse_missing_report,
    "python": interpreter_of,
}
"""Argument of a verb -> what raises `ValueError` for a path that does not exist, without importing what is slow."""
OTHER_CHECKS: dict[str, dict[str, Callable[[str], Any]]] = {
    "generate-offline-data": {
        "data": lambda data: refuse_unprepared(Path(data)),
        "verifier": lambda name: None,  # compared with what the server serves
    },
    "store": {"states": lambda states: refuse_missing_states(Path(states))},
    "check": {"verifier": refuse_missing_checkpoint},
    "evaluate": {"data": refuse_missing_prompts},
    "compare": dict.fromkeys(("first", "second"), refuse_missing_result),
    "plan": {"results": refuse_missing_result},
    "report": {"results": refuse_missing_result},
    "serve": {"verifier": refuse_verifier_without_model, "method": lambda method: None},  # the server may reach the hub
}


def check_paths(verb: str, values: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first argument of a verb that names what does not exist."""
    checks = {**CHECKS, **OTHER_CHECKS.get(verb, {})}
    if values.get("server"):  # then --method is any name of its row
        del checks["method"]
    for name in checks:
        given = values.get(name) or []
        for value in [given] if isinstance(given, str | Path) else given:
            checks[name](str(value))


def accept_old_names(command: Any, old_names: Mapping[str, str]) -> None:
    """Lets a command's parser take `--old VALUE` for `--new VALUE`; help and completion know the new names only."""
    for parameter in command.params:
        old = [old_names[name] for name in parameter.opts if name in old_names]
        if old:
            parameter.add_to_parser = adding(parameter, old)


def adding(parameter: Any, old: list[str]) -> Callable[[Any, Any], None]:
    add, shown = parameter.add_to_parser, parameter.opts

    def add_with_old_names(parser: Any, context: Any) -> None:
        parameter.opts = [*shown, *old]
        try:
            add(parser, context)
        finally:
            parameter.opts = shown

    return add_with_old_names


def shown_command(parser: argparse.ArgumentParser, verb: str, help: str, epilog: str, *, all_names: bool) -> Any:
    """Makes a command that has the arguments of an argparse parser, to show its help, or, with `all_names`, to complete
    its flags. It is never run."""

    def command(**values: Any) -> None: ...

    parameters = [
        inspect.Parameter(f"p{number}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for number, annotation in enumerate(options_of(parser, all_names))
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(verb, help=help, epilog=epilog, context_settings={"help_option_names": list(HELP_FLAGS)})(command)
    return get_command(app)


def options_of(parser: argparse.ArgumentParser, all_names: bool) -> Iterator[Any]:
    for group in parser._action_groups:
        panel = None if group.title in ("options", "positional arguments") else group.title
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS or set(action.option_strings) & set(HELP_FLAGS):
                continue
            text = (action.help or "").replace("%%", "%").replace("[", "\\[")
            shared: dict[str, Any] = {"help": text, "show_default": False}
            if not action.option_strings:
                yield Annotated[str | None, typer.Argument(metavar=str(action.metavar), **shared)]
            elif isinstance(action, argparse.BooleanOptionalAction) and all_names:
                yield Annotated[bool | None, typer.Option("/".join(action.option_strings), **shared)]
            elif isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
                yield Annotated[bool, typer.Option(action.option_strings[0], rich_help_panel=panel, **shared)]
            else:
                metavar = "N..." if action.nargs == "+" else metavar_of(action)
                option = typer.Option(*action.option_strings, rich_help_panel=panel, metavar=metavar, **shared)
                yield Annotated[str | None, option]


def metavar_of(action: argparse.Action) -> str:
    """As narrow as the types of the other verbs."""
    metavar = str(action.metavar or getattr(action.type, "__name__", "str")).lower()
    return "<choice>" if "|" in metavar or action.choices else f"<{metavar}>"


# -- threads: where other programs keep CPUs busy, threads wait for one another and are slower than a single one

VERBS_COMPUTING = (
    *("quickstart", "build", "regenerate-responses", "generate-offline-data", "store"),
    *("train", "generate", "verify", "diagnose", "evaluate", "serve-local", "playground"),
)
"""Verbs that run a model in this process, with `--threads`."""
CHOOSING_THEMSELVES = ("quickstart", "build", "train")
"""When they know what they continue: with as many threads as it was begun with."""
THREADS: ContextVar[int | None] = ContextVar("THREADS", default=None)
"""What `--threads` says."""
OMP_VARIABLE = "OMP_NUM_THREADS"
CPU_TIMES, CGROUPS, OWN_CGROUPS = Path("/proc/stat"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SAMPLE_S = 0.3
"""How long CPUs are watched: 30 ticks of the kernel's clock."""


def without_threads(args: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--threads N`, and the last N; None where it was not given."""
    args, given = list(args), None
    for place in reversed([place for place, arg in enumerate(args) if arg.partition("=")[0] == "--threads"]):
        words = args[place : place + (1 if "=" in args[place] else 2)]
        given = given or words[-1].removeprefix("--threads").removeprefix("=")
        del args[place : place + len(words)]
    return args, given


def num_threads(verb: str, threads: str | None) -> int | None:
    """The number of `--threads`. Raises `typer.BadParameter` for another word, and where no model would run with it."""
    if threads is None:
        return None
    if not threads.isdecimal() or int(threads) < 1:
        raise typer.BadParameter(f"--threads {threads}: a number of CPU threads, 1 or more")
    if verb not in VERBS_COMPUTING:
        raise typer.BadParameter(
            f"--threads: `{verb}` runs no model in this process; {', '.join(VERBS_COMPUTING)} take it"
        )
    return int(threads)


@contextmanager
def choosing_threads(begun: int | None = None) -> Iterator[None]:
    """Inside, torch computes with the threads of `--threads`, else of OMP_NUM_THREADS, else as many as the run to be
    continued `begun` with, as sums depend on how they are split, else with no more than there are idle CPUs."""
    import torch

    before = torch.get_num_threads()
    chosen = THREADS.get()
    if chosen is None:
        chosen = before if OMP_VARIABLE in os.environ else begun or idle_threads(before)
    if begun is not None and chosen == begun != before:
        say(f"CPU threads: {begun}, as when the run began, so that its result is the same bit for bit", "dim")
    torch.set_num_threads(chosen)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def idle_threads(most: int) -> int:
    """How many of `most` threads find a CPU; one at least."""
    cpus, quota = usable_cpus(), cpu_quota(CGROUPS, OWN_CGROUPS)
    idle = idle_cpus(cpus)
    chosen = max(1, min(most, round(idle), most if quota is None else int(quota)))
    if chosen < most:
        found = f"{idle:.1f} of {len(cpus)} CPUs are idle"
        limit = "" if quota is None else f", the container may use {quota:g}"
        say(f"{found}{limit}: computing with {chosen} of {most} threads; --threads N or {OMP_VARIABLE} decides", "dim")
    return chosen


def usable_cpus() -> Collection[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def idle_cpus(cpus: Collection[int]) -> float:
    """The idle time of these CPUs, in CPUs, during a moment; by the load average where the kernel does not count it."""
    if CPU_TIMES.is_file():
        before = CPU_TIMES.read_text()
        time.sleep(SAMPLE_S)
        idle = idle_between(before, CPU_TIMES.read_text(), cpus)
        if idle is not None:
            return idle
    return len(cpus) - os.getloadavg()[0] if hasattr(os, "getloadavg") else float(len(cpus))


def idle_between(before: str, after: str, cpus: Collection[int]) -> float | None:
    """Idle CPUs between two readings of /proc/stat; None where its clocks stand still."""
    then, now = ticks(before), ticks(after)
    shares = []
    for cpu in cpus:
        total = sum(now.get(cpu, [])) - sum(then.get(cpu, []))
        if total > 0:
            shares.append((sum(now[cpu][3:5]) - sum(then[cpu][3:5])) / total)  # idle, and waiting for a disk
    return sum(shares) if shares else None


def ticks(stat: str) -> dict[int, list[float]]:
    """CPU -> user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user already."""
    rows = [line.split() for line in stat.splitlines() if line.startswith("cpu") and not line.startswith("cpu ")]
    return {int(row[0][3:]): list(map(float, row[1:9])) for row in rows}


def cpu_quota(root: Path, groups: Path) -> float | None:
    """CPUs that the cgroups of this process may use together (version 2: `cpu.max`, 1: `cpu.cfs_quota_us`)."""
    limits = []
    lines = groups.read_text().splitlines() if groups.is_file() else []
    own = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    for folder in [root / own, *(root / own).parents]:
        if folder.is_relative_to(root) and (folder / "cpu.max").is_file():
            limits.append((folder / "cpu.max").read_text().split())
    old = root / "cpu"
    if (old / "cpu.cfs_quota_us").is_file():
        limits.append([(old / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")])
    return min((int(quota) / int(period) for quota, period in limits if quota not in ("max", "-1")), default=None)
