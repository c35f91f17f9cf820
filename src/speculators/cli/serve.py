"""`speculators serve`: start vLLM with a verifier and its drafter. `launch-vllm` shares the second half."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from speculators.cli.console import err, out, say
from speculators.cli.options import NumSpeculativeTokens, parse_json_object

if TYPE_CHECKING:
    from speculators.deploy.checkpoints import SpeculatorFacts
    from speculators.deploy.environment import VllmEnvironment
    from speculators.deploy.serve import Launch

READY_TIMEOUT_S = 1800.0
"""Loading and compiling a model of hundreds of billions of parameters takes many minutes."""
WAIT_NOTE_S = 10.0
"""How often the wait is reported where there is no terminal to draw in."""

Python = Annotated[
    str | None, typer.Option(help="Python, or its environment's directory, that has vLLM. Default: this one's.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command and exit.")]
ReadyTimeout = Annotated[float, typer.Option(min=1, help="Seconds the server may take to become healthy.")]


def serve(
    model: Annotated[str, typer.Argument(help="Speculator, or a verifier (then say --method or --draft).")],
    vllm_args: Annotated[list[str] | None, typer.Argument(help="After --: passed to vLLM as they are.")] = None,
    verifier: Annotated[str | None, typer.Option(help="Default: the one the speculator was trained for.")] = None,
    method: Annotated[str | None, typer.Option(help="ngram, suffix, mtp, eagle, medusa, draft_model, ...")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model or native drafter directory for a verifier.")] = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    speculative_config: Annotated[str | None, typer.Option(help="Further vLLM settings, a JSON object.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Check a speculator first; one with errors is not served.")
    ] = True,
    python: Python = None,
    dry_run: DryRun = False,
    ready_timeout: ReadyTimeout = READY_TIMEOUT_S,
) -> dict[str, Any]:
    """Serve a speculator by vLLM: verifier, method and number of draft tokens come from the checkpoint."""
    from speculators.deploy.checkpoints import is_export, speculator_facts
    from speculators.deploy.serve import command_to_serve
    from speculators.utils.files import absolute_if_directory

    settings = parse_json_object("--speculative-config", speculative_config) or {}
    given = {"method": method, "model": draft, "num_speculative_tokens": num_speculative_tokens}
    settings |= {name: value for name, value in given.items() if value is not None}
    facts = speculator_facts(model)
    is_ours = facts is not None or (draft is None and is_export(model))
    if facts is None and is_ours:
        from speculators.deploy.export import serving_of_export

        serving = serving_of_export(model, verifier)
        said = dict(serving.speculative_config or {})
        refuse_other_method(model, said["method"], method)
        verifier, drafter = serving.model, said.pop("model", None)
        settings = {**said, **settings}
    elif facts is None:
        verifier, drafter = absolute_if_directory(verifier or model), None if verifier is None else model
    else:
        refuse_unservable(facts.speculators_model_type, model)
        verifier, drafter = verifier or facts.verifier, facts.path
        settings = {**said_by(facts, method), **settings}
        if verifier is None:
            raise ValueError(f"{model} names no verifier; give it with --verifier")
    if drafter is not None:
        if draft is not None:
            raise ValueError(f"--draft {draft}: {model} is the drafter already")
        settings["model"] = absolute_if_directory(drafter)
    if is_ours and check and not dry_run:
        refuse_errors(model, verifier)
    found = vllm_environment(python, dry_run)
    launch = command_to_serve(
        found.command if found else ["vllm"], verifier, in_vllms_words(settings, verifier), vllm_args or []
    )
    if not settings:
        say("no drafter was named: the verifier is served plainly")
    return start(launch, {"verb": "serve", "verifier": verifier}, found, dry_run, ready_timeout)


def refuse_errors(checkpoint: str, verifier: str) -> None:
    """vLLM would serve a wrong checkpoint without a word."""
    from speculators.deploy.check import check_checkpoint
    from speculators.deploy.report import CheckError

    report = check_checkpoint(checkpoint, verifier=verifier)
    for found in report.findings:
        if found.severity == "warning":
            say(f"[yellow]{escape(str(found))}[/]")
    if not report.ok:
        raise CheckError(report, "; --no-check serves it all the same")
    say(f"[dim]contract check: {report.verdict}[/]")


def said_by(facts: SpeculatorFacts, asked: str | None) -> dict[str, Any]:
    """Method and K of a checkpoint, for one on the hub too, which the settings' own inference does not fetch."""
    from speculators.decoding.config.methods import SPECULATORS_METHODS

    said = dict(SPECULATORS_METHODS.get(facts.speculators_model_type, {}))
    refuse_other_method(facts.path, said.get("method"), asked)
    return {**said, "num_speculative_tokens": facts.num_speculative_tokens}


def refuse_other_method(model: str, own: Any, asked: str | None) -> None:
    if asked not in (None, own) and own is not None:
        raise ValueError(
            f"--method {asked}: {model} drafts by method {own!r}; leave --method out, or serve its verifier alone: "
            f"speculators serve VERIFIER --method {asked}"
        )


def refuse_unservable(speculators_type: str, model: str) -> None:
    """vLLM reads the checkpoints of some algorithms as they are, others need a directory in its own layout."""
    from speculators.checkpoint.formats import SPECULATORS
    from speculators.model import SpeculatorModel

    contract = SpeculatorModel.get_class(speculators_type).contract
    if contract.served_format is None:
        raise ValueError(f"{model}: vLLM 0.32 has no drafter of type {speculators_type!r}; `generate` decodes with it")
    if contract.served_format != SPECULATORS:
        raise ValueError(
            f"{model}: vLLM serves a drafter of type {speculators_type!r} from a directory in its own layout; "
            f"write one with `speculators export {model} --output DIRECTORY`, which says how to serve it"
        )


def in_vllms_words(settings: dict[str, Any], verifier: str) -> dict[str, Any] | None:
    """The settings completed and checked as vLLM will; None where nothing drafts."""
    from speculators.decoding.config import ModelInfo, SpeculativeConfig
    from speculators.decoding.config.draft import read_hf_config

    if not settings:
        return None
    target = ModelInfo(verifier, read_hf_config(verifier)) if settings.get("method") == "mtp" else None
    config = SpeculativeConfig(**settings, target_model_config=target)
    return dict(json.loads(config.to_vllm_json()))


def vllm_environment(python: str | None, dry_run: bool) -> VllmEnvironment | None:
    """None only in a dry run without vLLM: the command is then for another machine."""
    from speculators.deploy.environment import TESTED_VERSION, find_vllm

    try:
        found = find_vllm(python)
    except ValueError as error:
        if not dry_run or python is not None:
            raise
        say(f"[dim]{error}[/]")
        return None
    if not found.is_tested_version:
        say(f"[yellow]vLLM {found.version} in {found.python}; what is served was tested with {TESTED_VERSION}[/]")
    return found


def start(
    launch: Launch, result: dict[str, Any], found: VllmEnvironment | None, dry_run: bool, ready_timeout_s: float
) -> dict[str, Any]:
    """Print the command, or run it until Ctrl-C or SIGTERM."""
    result |= {
        "command": list(launch.command),
        "endpoint": launch.endpoint,
        "vllm": found.version if found else None,
        "dry_run": dry_run,
    }
    if dry_run:
        out().print(shlex.join(launch.command), soft_wrap=True, markup=False, emoji=False)
        return result
    from speculators.deploy.serve import run_server

    say(f"[dim]{shlex.join(launch.command)}[/]")
    with WaitLine() as line:
        signal_name = run_server(
            launch,
            ready_timeout_s=ready_timeout_s,
            on_line=line.forward,
            on_wait=line.wait,
            on_ready=lambda seconds: line.ready(seconds, launch.endpoint),
        )
    say(f"{signal_name}: the server and its workers have ended")
    return {**result, "stopped_by": signal_name}


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
        self.console.print(line, markup=False, emoji=False)

    def wait(self, seconds: float, last_line: str) -> None:
        if self.console.is_terminal:
            self.status.update(f"waiting for vLLM: {seconds:.0f} s")
        elif seconds >= self.next_note_s:
            self.next_note_s += WAIT_NOTE_S
            self.console.print(f"waiting for vLLM: {seconds:.0f} s")

    def ready(self, seconds: float, endpoint: str | None) -> None:
        self.status.stop()
        self.console.print(f"[bold]ready[/] after {seconds:.0f} s: {endpoint}")
