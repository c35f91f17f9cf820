"""`speculators launch-vllm`: a vLLM server that writes the verifier's hidden states, for `train --vllm-endpoint`.

Its flags are read here, not by typer: `--target-layer-ids 2 4 5` takes several values, and what follows `--` is vLLM's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from speculators.cli.vllm_server import READY_TIMEOUT_S, start, vllm_environment
from speculators.data_generation.configs import DEFAULT_STATES_DIRECTORY

if TYPE_CHECKING:
    from speculators.verifier.capture import ExtractionNote


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
        help="Layers to extract; i = after i layers. Default: 2, n//2, n-3 of n layers.",
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


def launch_vllm(context: typer.Context) -> dict[str, Any]:
    ours, vllm_args = split(context.args)
    args = parser().parse_args(ours)
    if (args.model is None) is (args.verifier is None):
        raise typer.BadParameter("name the verifier, once: speculators launch-vllm VERIFIER [options] -- VLLM_ARGS")
    args.model = args.verifier if args.model is None else args.model
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
    from speculators.utils.names import refuse_missing_verifier
    from speculators.verifier.capture import ExtractionNote
    from speculators.verifier.config import get_verifier_config, resolve_target_layer_ids

    refuse_missing_verifier(args.model)
    config = get_verifier_config(args.model, args.trust_remote_code)
    layer_ids = resolve_target_layer_ids(args.target_layer_ids, config)
    if args.include_last_layer:
        layer_ids = sorted({*layer_ids, config.num_hidden_layers})
    return ExtractionNote(absolute_if_directory(args.model), tuple(layer_ids), config.num_hidden_layers)
