"""The `speculators` command: finds the verb, imports that verb's file only, turns errors into a message and a code.

Exit codes: 0 done; 1 the work was begun and failed, or its result is a failure; 2 the command line, or what it names,
was wrong before work began; 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import typer
from typer.main import get_command

from speculators.cli import FILES, VERBS
from speculators.cli.flags import (
    CHOOSING_THEMSELVES,
    HELP_FLAGS,
    OLD_NAMES,
    THREADS,
    VERBS_COMPUTING,
    accept_old_names,
    check_paths,
    choosing_threads,
    num_threads,
    shown_command,
    without_threads,
)
from speculators.cli.shared import ONLY_JSON, Result, escape_warnings, say_error, say_warning, show
from speculators.utils.names import did_you_mean
from speculators.utils.report import WRONG_INPUT, ReaderGoneError, discard, exit_code_of, is_first_rank, work

VERBS_READING_THEIR_FLAGS = ("train", "launch-vllm")
VERBS_PASSING_FLAGS_ON = ("serve", "launch-vllm")
FLAGS_READ_ELSEWHERE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For `train`, whose flags are the keys of `TrainConfig` and of the algorithm, and for a flag of several values. The
file of such a verb has a function `help_parser` too, an argparse parser of what its help shows."""
COMPLETION_VARIABLE = "_SPECULATORS_COMPLETE"
"""Set by the shell functions that `--install-completion` writes."""
EPILOG = "On every command: --json prints the result as JSON and nothing else; --debug shows an error's traceback."

# Every parsing error of typer derives from this one; typer does not export it under its own name.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Interrupted(Exception):
    """Ctrl-C in a verb, with the verb's message: typer would swallow a KeyboardInterrupt and its message."""


@dataclass(frozen=True)
class CommonFlags:
    """Flags of every verb, wherever they stand before `--`."""

    debug: bool = False
    only_json: bool = False
    threads: str | None = None
    """As it was typed; empty without a number."""


def split_common(args: Sequence[str]) -> tuple[list[str], CommonFlags]:
    """The arguments without the flags of every verb, and those."""
    end = args.index("--") if "--" in args else len(args)
    ours, passed_on = list(args[:end]), list(args[end:])
    ours, threads = without_threads(ours)
    flags = CommonFlags(debug="--debug" in ours, only_json="--json" in ours, threads=threads)
    return [arg for arg in ours if arg not in ("--debug", "--json")] + passed_on, flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and print its result. Returns the exit code."""
    args, flags = split_common(sys.argv[1:] if argv is None else argv)
    quieten_libraries()
    escape_warnings()
    only_json, threads = ONLY_JSON.set(flags.only_json), THREADS.set(None)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = say_warning
            code = run_to_the_end(args, flags)
        sys.stdout.flush()
    except (ReaderGoneError, BrokenPipeError):  # what is left in the buffer would fail again at the end
        discard(sys.stdout)
        return 1
    finally:
        ONLY_JSON.reset(only_json)
        THREADS.reset(threads)
    return code


def run_to_the_end(args: Sequence[str], flags: CommonFlags) -> int:
    """Runs a verb, prints its result or its error, and returns the exit code."""
    try:
        THREADS.set(num_threads(args[0] if args else "", flags.threads))
        result = perform(args)
        if not isinstance(result, Result):
            return result or 0  # --help and --version end with typer's own exit code
        if is_first_rank():
            show(result)
        if result.error is not None:
            with work():  # its result is a failure, whatever the error's type
                raise result.error
    except ReaderGoneError:
        raise
    except SystemExit as end:  # argparse's --help, --dump-config
        return int(end.code or 0)
    except (KeyboardInterrupt, typer.Abort, Interrupted) as stop:
        say_error(str(stop) or "interrupted")
        return 130
    except Exception as error:
        if flags.debug:
            traceback.print_exc()
        else:
            say_error(message_of(error), hint=hint_of(error))
        return WRONG_INPUT if isinstance(error, UsageError) else exit_code_of(error)
    return result.exit_code


def run(args: Sequence[str]) -> dict[str, Any]:
    """Run one verb in this process, print its tables and return its record. Errors travel to the caller."""
    result = perform(args)
    show(result, is_last=False)
    if result.error is not None:
        raise result.error
    return dict(result.record)


def perform(args: Sequence[str]) -> Any:
    """Does the work of one verb and returns its `Result`; of `--help` and `--version` the exit code."""
    if COMPLETION_VARIABLE in os.environ:
        return complete()
    if args and args[0] in VERBS:
        verb = args[0]
        if verb in VERBS_READING_THEIR_FLAGS and asks_for_help(args):
            command = shown_command_of(verb, args[1:], all_names=False)
            return command.main(["--help"], prog_name=f"speculators {verb}", standalone_mode=False)
        untouched = ["--"] if verb in VERBS_READING_THEIR_FLAGS else []  # click eats the first one
        try:
            return command_of(verb).main(
                [*untouched, *args[1:]], prog_name=f"speculators {verb}", standalone_mode=False
            )
        except UsageError as error:
            if verb in VERBS_PASSING_FLAGS_ON and is_about_an_unknown_flag(error):
                hint = f"vLLM's own flags follow `--`: speculators {verb} MODEL -- --port 8001"
                raise UsageError(f"{error.format_message()}. {hint}") from error  # type: ignore[attr-defined]
            raise
    if args and not args[0].startswith("-"):
        raise UsageError(f"unknown command '{args[0]}'; `speculators --help` lists them.{did_you_mean(args[0], VERBS)}")
    return listing().main(list(args) or ["--help"], prog_name="speculators", standalone_mode=False)


def is_about_an_unknown_flag(error: Exception) -> bool:
    return type(error).__name__ == "NoSuchOption" or "unrecognized arguments: -" in str(error)


def command_of(verb: str) -> Any:
    """The parser of one verb. Imports the verb's file and nothing else of the command line."""
    name = verb.replace("-", "_")
    function: Callable[..., Any] = getattr(importlib.import_module(f"speculators.cli.{FILES.get(verb, name)}"), name)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    settings = FLAGS_READ_ELSEWHERE if verb in VERBS_READING_THEIR_FLAGS else {"help_option_names": list(HELP_FLAGS)}
    app.command(verb, epilog=EPILOG, context_settings=settings)(raising_interrupted(verb, function))
    command = get_command(app)
    accept_old_names(command, OLD_NAMES.get(verb, {}))
    return command


def shown_command_of(verb: str, args: Sequence[str], *, all_names: bool) -> Any:
    """The command of one verb as help, or completion with `all_names`, shows it."""
    if verb not in VERBS_READING_THEIR_FLAGS:
        return command_of(verb)
    file = importlib.import_module(f"speculators.cli.{FILES.get(verb, verb.replace('-', '_'))}")
    parser = file.help_parser(args)
    return shown_command(parser, verb, parser.description or VERBS[verb], parser.epilog or EPILOG, all_names=all_names)


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether a help flag stands before `--`."""
    ours = list(args)[: list(args).index("--")] if "--" in args else args
    return any(flag in ours for flag in HELP_FLAGS)


def raising_interrupted(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a verb, called with paths that exist."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            check_paths(verb, kwargs)
            if verb not in VERBS_COMPUTING:
                return function(*args, **kwargs)
            from speculators.utils.progress import listening

            with listening(), nullcontext() if verb in CHOOSING_THEMSELVES else choosing_threads():
                return function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop)) from stop

    return checked


def listing() -> Any:
    """The group that prints `speculators --help`: names and one-liners, no verb is imported."""
    app = typer.Typer(
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": list(HELP_FLAGS)},
        help="Train, decode and serve speculative-decoding drafters: what you train is what you serve.",
        epilog=f"`speculators COMMAND --help` lists a command's options. {EPILOG}",
    )
    for verb, line in VERBS.items():
        app.command(verb, help=line)(lambda: None)

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            from importlib.metadata import version as installed_version

            print(installed_version("speculators"))

    return get_command(app)


def complete() -> Any:
    """Answers the shell function of a completion, which gives what was typed by environment variables."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    group, words = listing(), typed.split()
    if len(words) > 1 and words[1] in VERBS:  # its flags are wanted
        group.commands[words[1]] = shown_command_of(words[1], words[2:], all_names=True)
    return group.main([], prog_name="speculators", complete_var=COMPLETION_VARIABLE, standalone_mode=False)


def message_of(error: BaseException) -> str:
    """One message a user can act on: no class names for errors that are already written for users."""
    from pydantic import ValidationError

    if isinstance(error, UsageError):
        return str(error.format_message())  # type: ignore[attr-defined]
    if isinstance(error, ValidationError):
        from speculators.utils.readable import validation_line

        return "\n".join(validation_line(detail) for detail in error.errors(include_url=False))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename is not None else ""
        return f"the disk is full{where}: free some space, then run the same command again"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ValueError | OSError | NotImplementedError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def hint_of(error: BaseException) -> str | None:
    if isinstance(error, UsageError | ValueError | OSError | NotImplementedError):
        return None
    return "this may be a defect: run the command again with --debug for the traceback"


def quieten_libraries() -> None:
    """Turns off their bars and notices, which would hide ours; set before they are imported. A user's setting wins."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
