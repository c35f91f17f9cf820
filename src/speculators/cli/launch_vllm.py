"""`speculators launch-vllm`: a vLLM server that writes the verifier's hidden states, for `train --vllm-endpoint`.

Its flags are read here, not by typer: `--target-layer-ids 2 4 5` takes several values, and what follows `--` is vLLM's.
At the end: how vLLM is found and its server is run in the foreground, for `serve` too.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape

from speculators.cli.shared import Result, err, say
from speculators.data_generation.configs import DEFAULT_STATES_DIRECTORY
from speculators.deploy.process import interpreter_of
from speculators.utils.names import refuse_missing_verifier

if TYPE_CHECKING:
    from speculators.deploy.process import VllmEnvironment
    from speculators.deploy.serve import Launch
    from speculators.verifier.capture import ExtractionNote


READY_TIMEOUT_S = 1800.0
"""Loading and compiling a model of hundreds of billions of parameters takes many minutes."""
WAIT_NOTE_S = 10.0
"""How often the wait is reported where there is no terminal to draw in."""

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command and exit.")]
ReadyTimeout = Annotated[float, typer.Option(min=1, help="Seconds the server may take to become healthy.")]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise typer.BadParameter(message)


def parser() -> Parser:
    parser = Parser(
        prog="speculators launch-vllm",
        usage="%(prog)s VERIFIER [options] -- VLLM_ARGS",
        description="Start a vLLM server that writes the verifier's hidden states to files, for training.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="VERIFIER", nargs="?", help="Verifier: hub id or directory.")
    parser.add_argument("--verifier", help="The same, by name.")
    parser.add_argument(
        "--hidden-states-backend", choices=["file"], default="file", help="How states travel. Default: file."
    )
    parser.add_argument(
        "--hidden-states-path",
        type=Path,
        default=DEFAULT_STATES_DIRECTORY,
        help=f"Directory both the server and the reader see; a fast one. Default: {DEFAULT_STATES_DIRECTORY}.",
    )
    parser.add_argument(
        "--target-layer-ids",
        type=int,
        nargs="+",
        metavar="N",
        help="Layers to extract; i = after i layers. Default: 2, n//2, n-3 of n layers, as in train.",
    )
    parser.add_argument(
        "--include-last-layer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Also the last layer, before the final norm, for training; --no-include-last-layer leaves it out.",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="Run model code shipped with the verifier.")
    parser.add_argument("--python", help="Python, or its environment's directory, that has vLLM. Default: this one's.")
    parser.add_argument(
        "--ready-timeout",
        type=float,
        default=READY_TIMEOUT_S,
        help=f"Seconds the server may take to become healthy. Default: {READY_TIMEOUT_S:.0f}.",
    )
    parser.add_argument("--dry-run", action="store_true", help="Print the command and exit.")
    return parser


def help_parser(argv: Sequence[str]) -> Parser:
    return parser()


def launch_vllm(context: typer.Context) -> Result:
    ours, vllm_args = split(context.args)
    args = parser().parse_args(ours)
    if (args.model is None) is (args.verifier is None):
        raise typer.BadParameter("name the verifier, once: speculators launch-vllm VERIFIER [options] -- VLLM_ARGS")
    args.model = args.verifier if args.model is None else args.model
    refuse_missing_verifier(args.model)
    if args.python is not None:
        interpreter_of(args.python)
    from speculators.deploy.serve import command_to_extract

    note = what_to_extract(args)
    directory = args.hidden_states_path.expanduser().absolute()
    if args.trust_remote_code:
        vllm_args = ["--trust-remote-code", *vllm_args]
    found = vllm_environment(args.python, args.dry_run)
    launch = command_to_extract(found.command if found else ["vllm"], note, directory, vllm_args)
    if not args.dry_run:
        note.write(directory)
    result = {
        "verb": "launch-vllm",
        "model": note.model,
        "layer_ids": list(note.layer_ids),
        "hidden_states_path": str(directory),
    }
    return start(launch, result, found, args.dry_run, args.ready_timeout)


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments at `--`."""
    args = list(args)
    if "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


def what_to_extract(args: argparse.Namespace) -> ExtractionNote:
    """The layers, ascending: engines hand them over in the order of the network."""
    from speculators.utils.files import absolute_if_directory
    from speculators.verifier.capture import ExtractionNote
    from speculators.verifier.config import get_verifier_config, resolve_target_layer_ids

    config = get_verifier_config(args.model, args.trust_remote_code)
    layer_ids = resolve_target_layer_ids(args.target_layer_ids, config)
    if args.include_last_layer:
        layer_ids = sorted({*layer_ids, config.num_hidden_layers})
    return ExtractionNote(absolute_if_directory(args.model), tuple(layer_ids), config.num_hidden_layers)


# -- the server, for `serve` too


def vllm_environment(python: str | None, dry_run: bool) -> VllmEnvironment | None:
    """None only in a dry run without vLLM: the command is then for another machine."""
    from speculators.checkpoint.engine_profile import VLLM, releases
    from speculators.deploy.process import find_vllm

    try:
        found = find_vllm(python)
    except ValueError as error:
        if not dry_run or python is not None:
            raise
        say(str(error), "dim")
        return None
    if not found.is_tested_version:
        tested = ", ".join(profile.version for profile in releases(VLLM) if profile.held_against == "process")
        say(f"vLLM {found.version} in {found.python}; checkpoints were tested with {tested}", "yellow")
    return found


def start(
    launch: Launch, result: dict[str, Any], found: VllmEnvironment | None, dry_run: bool, ready_timeout_s: float
) -> Result:
    """Print the command, or run it until Ctrl-C or SIGTERM."""
    result |= {
        "command": list(launch.command),
        "endpoint": launch.endpoint,
        "vllm": found.version if found else None,
        "dry_run": dry_run,
    }
    if dry_run:
        return Result(result, [shlex.join(launch.command)])
    from speculators.deploy.serve import run_server

    say(shlex.join(launch.command), "dim")
    with WaitLine() as line:
        signal_name = run_server(
            launch,
            ready_timeout_s=ready_timeout_s,
            on_line=line.forward,
            on_wait=line.wait,
            on_ready=lambda seconds: line.ready(seconds, launch),
        )
    say(f"{signal_name}: the server and its workers have ended")
    return Result({**result, "stopped_by": signal_name})


class WaitLine:
    """The server's log on stderr, and below it how long it has been starting."""

    def __init__(self) -> None:
        self.console = err()
        self.status = self.console.status("starting vLLM")
        self.next_note_s = WAIT_NOTE_S

    def __enter__(self) -> WaitLine:
        if self.console.is_terminal:
            self.status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.status.stop()

    def forward(self, line: str) -> None:
        self.console.print(line, markup=False)

    def wait(self, seconds: float, last_line: str) -> None:
        if self.console.is_terminal:
            self.status.update(f"waiting for vLLM: {seconds:.0f} s")
        elif seconds >= self.next_note_s:
            self.next_note_s += WAIT_NOTE_S
            self.console.print(f"waiting for vLLM: {seconds:.0f} s")

    def ready(self, seconds: float, launch: Launch) -> None:
        self.status.stop()
        self.console.print(
            f"[bold]ready[/] after {seconds:.0f} s: {escape(str(launch.endpoint))} serves the model "
            f"{escape(launch.served_model)}"
        )
        self.console.print(f"try it: {launch.first_request}", markup=False)
