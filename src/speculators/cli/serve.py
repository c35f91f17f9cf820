"""`speculators serve`: start vLLM with a verifier and its drafter.

named on the command line         verifier                     drafter
a checkpoint of ours              as recorded, or --verifier   the checkpoint; method and K are its own
a directory `export` wrote        as recorded, or --verifier   the directory; the same
a model with --verifier           --verifier                   the model
a model                           the model                    --draft, or what --method drafts with; neither: none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators.cli.launch_vllm import READY_TIMEOUT_S, DryRun, ReadyTimeout, start, vllm_environment
from speculators.cli.shared import EngineName, NumSpeculativeTokens, Python, Result, parse_json_object, say
from speculators.decoding.config.methods import METHODS, MTP_TYPE_NAMES, SPECULATORS_METHODS, facts_of
from speculators.utils.names import did_you_mean

if TYPE_CHECKING:
    from speculators.checkpoint.engine_profile import EngineProfile
    from speculators.checkpoint.io import SpeculatorFacts


@dataclass(frozen=True)
class Served:
    verifier: str
    settings: dict[str, Any]
    """Of speculation; empty: nothing drafts."""
    checkpoint: str | None = None
    """The drafter where it is one of ours: it can be checked before it is served."""


def serve(
    model: Annotated[str, typer.Argument(help="Speculator, or a verifier (then say --method or --draft).")],
    vllm_args: Annotated[list[str] | None, typer.Argument(help="After --: passed to vLLM as they are.")] = None,
    verifier: Annotated[str | None, typer.Option(help="Default: the one the speculator was trained for.")] = None,
    method: Annotated[str | None, typer.Option(help="ngram, suffix, mtp, eagle, medusa, draft_model, ...")] = None,
    draft: Annotated[
        str | None, typer.Option(help="The verifier's drafter: speculator, draft model, native directory.")
    ] = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    speculative_config: Annotated[str | None, typer.Option(help="Further vLLM settings, a JSON object.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Check a speculator first; one with errors is not served.")
    ] = True,
    python: Python = None,
    dry_run: DryRun = False,
    ready_timeout: ReadyTimeout = READY_TIMEOUT_S,
    engine: EngineName = None,
) -> Result:
    """Serve a speculator by vLLM: verifier, method and number of draft tokens come from the checkpoint."""
    settings = parse_json_object("--speculative-config", speculative_config) or {}
    given = {"method": method, "model": draft, "num_speculative_tokens": num_speculative_tokens}
    settings |= {name: value for name, value in given.items() if value is not None}
    refuse_method_unknown_to_vllm(settings.get("method"))  # before torch is imported, with what follows

    from speculators.cli.serve_settings import in_vllms_words
    from speculators.deploy.serve import command_to_serve

    profile = release_to_start(engine, python)
    served = what_to_serve(model, verifier, settings, profile)
    speculation = in_vllms_words(served.settings, served.verifier, profile) if served.settings else None
    if served.checkpoint is not None and check and not dry_run:
        refuse_errors(served.checkpoint, served.verifier, profile)
    elif served.checkpoint is None and speculation is not None and check:
        refuse_wrong_draft(speculation, served, profile, dry_run)
    found = vllm_environment(python, dry_run)
    launch = command_to_serve(found.command if found else ["vllm"], served.verifier, speculation, vllm_args or [])
    if speculation is None:
        say("no drafter was named: the verifier is served plainly")
    return start(launch, {"verb": "serve", "verifier": served.verifier}, found, dry_run, ready_timeout)


def refuse_method_unknown_to_vllm(method: Any) -> None:
    if method is None or method in METHODS or method in MTP_TYPE_NAMES:
        return  # which release has it is a later question
    if method in SPECULATORS_METHODS:
        raise ValueError(
            f"--method {method} is a type of speculator, not a method of vLLM; its checkpoint itself records how it is "
            "drafted with: speculators serve CHECKPOINT"
        )
    from speculators.checkpoint.engine_profile import newest_profile

    known = list(newest_profile().methods)
    raise ValueError(f"--method {method} is unknown; vLLM has {', '.join(known)}.{did_you_mean(str(method), known)}")


def release_to_start(engine: str | None, python: str | None) -> EngineProfile:
    """The release that the command is for. Another engine has other flags than this command writes."""
    from speculators.checkpoint.engine_profile import VLLM
    from speculators.deploy.engine import choose_engine

    profile = choose_engine(engine, python).profile
    if profile.engine != VLLM:
        raise ValueError(
            f"{profile.name}: `serve` starts vLLM; `speculators export CHECKPOINT --engine {profile.name} --output "
            "DIRECTORY` writes the directory and says the command that serves it"
        )
    return profile


def what_to_serve(model: str, verifier: str | None, settings: dict[str, Any], profile: EngineProfile) -> Served:
    """By the table above. `settings`: of speculation, as the user gave them."""
    from speculators.checkpoint.io import is_export, speculator_facts
    from speculators.cli.serve_settings import drafts_with_a_model
    from speculators.utils.files import absolute_if_directory

    values = look_up(model, "a verifier" if verifier is None else "a drafter")
    draft = settings.get("model")
    if verifier is not None or is_export(model) or speculator_facts(model, values) is not None:
        if draft is not None:
            raise ValueError(f"--draft {draft}: {model} is the drafter already")
        return with_drafter(model, values, verifier, settings, profile)
    if draft is not None and drafts_with_a_model(settings):
        rest = {name: value for name, value in settings.items() if name != "model"}
        return with_drafter(draft, look_up(draft, "a drafter"), model, rest, profile)
    return Served(absolute_if_directory(model), settings)


def look_up(name: str, taken_for: str) -> dict[str, Any] | None:
    """Reads config.json. Returns None, with a note to the user, where only the server can resolve the name."""
    from speculators.checkpoint.io import read_model_config

    values = read_model_config(name)
    if values is None:
        say(f"{name} is no directory here and the hub cannot be asked: it is taken for {taken_for}")
    return values


def with_drafter(
    drafter: str, values: dict[str, Any] | None, verifier: str | None, settings: dict[str, Any], profile: EngineProfile
) -> Served:
    """`values`: config.json of the drafter. `verifier`: the one the user named."""
    from speculators.checkpoint.io import is_export, speculator_facts
    from speculators.cli.serve_settings import refuse_method_without_model
    from speculators.utils.files import absolute_if_directory
    from speculators.utils.names import refuse_path_without_model

    if verifier is not None:
        refuse_path_without_model(verifier, "verifier", "a saved causal LM")  # the server may reach the hub
        verifier = absolute_if_directory(verifier)
    facts = speculator_facts(drafter, values)
    if facts is not None:
        return by_speculator(facts, verifier, settings, profile)
    if is_export(drafter):
        return by_export(drafter, verifier, settings, profile)
    assert verifier is not None, "a directory of another project is a drafter only where a verifier was named beside it"
    refuse_method_without_model(settings.get("method"), drafter, verifier)
    return Served(verifier, {**settings, "model": absolute_if_directory(drafter)})


def by_speculator(
    facts: SpeculatorFacts, verifier: str | None, settings: dict[str, Any], profile: EngineProfile
) -> Served:
    """Method and K of a checkpoint, for one on the hub too, which the settings' own inference does not fetch."""
    refuse_unservable(facts.speculators_model_type, facts.path, profile)
    verifier = verifier or facts.verifier
    if verifier is None:
        raise ValueError(f"{facts.path} names no verifier; give it with --verifier")
    said = dict(profile.drafters[facts.speculators_model_type].settings)
    refuse_other_method(facts.path, said.get("method"), settings.get("method"))
    if facts.num_speculative_tokens is not None:
        said["num_speculative_tokens"] = facts.num_speculative_tokens
    return Served(verifier, {**said, **settings, "model": facts.path}, facts.path)


def by_export(directory: str, verifier: str | None, settings: dict[str, Any], profile: EngineProfile) -> Served:
    """A layout of its own says neither method nor K; the record beside it does."""
    from speculators.deploy.engine import serving_of_export

    serving = serving_of_export(directory, verifier, profile)
    said = dict(serving.speculative_config)
    refuse_other_method(directory, said["method"], settings.get("method"))
    return Served(serving.model, {**said, **settings}, directory)


def refuse_errors(checkpoint: str, verifier: str, profile: EngineProfile) -> None:
    """vLLM would serve a wrong checkpoint without a word."""
    from speculators.deploy.check import check_checkpoint

    report = check_checkpoint(checkpoint, verifier=verifier, engine=profile.name)
    for found in report.findings:
        if found.severity == "warning":
            say(str(found), "yellow")
    report.raise_for_errors("; --no-check serves it all the same")
    say(f"contract check: {report.verdict}", "dim")


def refuse_wrong_draft(speculation: dict[str, Any], served: Served, profile: EngineProfile, dry_run: bool) -> None:
    """Of directories of other projects: a whole language model is no head, and a head with errors is not served.
    What no format here recognises is left to vLLM, which knows more."""
    from pathlib import Path

    from speculators.checkpoint.formats import ForeignCheckpoint
    from speculators.checkpoint.io import recognise
    from speculators.decoding.config.draft import word_in_name

    method, name = str(speculation.get("method")), str(speculation.get("model"))
    source = ForeignCheckpoint(Path(name))
    if not facts_of(method).reads_states or not (source.path / "config.json").is_file():
        return
    try:
        names = source.tensor_names
    except FileNotFoundError:  # a config alone
        return
    is_whole = "fc.weight" not in names and any(key.startswith("model.layers.0.") for key in names)
    if is_whole and not facts_of(method).model_defaults_to_target:  # those lie inside a whole model
        kinds = ", ".join(map(str, source.values.get("architectures") or ["of no named class"]))
        word = None if "method" in served.settings else word_in_name(method, name)
        reason = f" (guessed from {word!r} in its name)" if word else ""
        raise ValueError(
            f"--method {method}{reason}: {name} is a whole language model ({kinds}), not a head that drafts from the "
            "verifier's states; say --method draft_model to draft with it, or name a drafter with --draft"
        )
    try:
        recognise(source)
    except ValueError:
        return
    if not dry_run:
        refuse_errors(name, served.verifier, profile)


def refuse_other_method(model: str, own: Any, asked: str | None) -> None:
    if asked not in (None, own) and own is not None:
        raise ValueError(
            f"--method {asked}: {model} drafts by method {own!r}; leave --method out, or serve its verifier alone: "
            f"speculators serve VERIFIER --method {asked}"
        )


def refuse_unservable(speculators_type: str, model: str, profile: EngineProfile) -> None:
    """vLLM reads the checkpoints of some algorithms as they are, others need a directory in its own layout."""
    from speculators.checkpoint.engine_profile import way_out
    from speculators.checkpoint.formats import SPECULATORS
    from speculators.model import SpeculatorModel

    served_format = profile.format_of(speculators_type, SpeculatorModel.get_class(speculators_type).contract)
    if served_format is None:
        raise ValueError(
            f"{model}: {profile.title} has no drafter of type {speculators_type!r}; `generate` decodes with it"
            f"{way_out(speculators_type)}"
        )
    if served_format != SPECULATORS:
        raise ValueError(
            f"{model}: vLLM serves a drafter of type {speculators_type!r} from a directory in its own layout; "
            f"write one with `speculators export {model} --output DIRECTORY`, which says how to serve it"
        )
