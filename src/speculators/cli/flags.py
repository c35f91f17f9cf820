"""Flags of all verbs: their one name each, the old names that are still accepted, and help and completion of the verbs
that read their flags by argparse, in the form of the others."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from speculators.data_generation.configs import refuse_missing_source, refuse_unprepared
from speculators.decoding.method import parse_method
from speculators.deploy.process import interpreter_of
from speculators.utils.names import (
    refuse_missing_checkpoint,
    refuse_missing_path,
    refuse_missing_verifier,
    refuse_path_without_model,
)

OLD_NAMES: dict[str, dict[str, str]] = {
    "prepare-data": {"--verifier": "--model"},
    "inspect-mask": {"--verifier": "--model"},
    "regenerate-responses": {
        "--verifier": "--model",
        "--data": "--dataset",
        "--output": "--outfile",
        "--batch-size": "--concurrency",
    },
    "generate-offline-data": {"--verifier": "--model", "--data": "--preprocessed-data"},
    "convert": {"--output": "--output-path"},
    "stitch-mtp": {"--output": "--output-path"},
    "verify": {"--data": "--prompts", "--python": "--vllm-python"},
}
"""Verb -> flag -> its name in earlier releases: accepted, not shown. Those of `train` are in `train/flags.py`."""

HELP_FLAGS = ("-h", "--help")


def refuse_missing_drafter(drafter: str) -> None:
    parse_method(drafter)


def refuse_missing_report(file: str) -> None:
    refuse_missing_path(file, "the report", "name what `evaluate --output` wrote by --report")


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
    "check": {"verifier": refuse_missing_checkpoint},
    "serve": {"verifier": refuse_verifier_without_model, "method": lambda method: None},  # the server may reach the hub
}


def check_paths(verb: str, values: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first argument of a verb that names what does not exist."""
    checks = {**CHECKS, **OTHER_CHECKS.get(verb, {})}
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
