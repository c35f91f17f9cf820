"""The verbs of checkpoints: `check`, `export`, `convert`, `stitch-mtp`, the parity gate `verify`, and `diagnose`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.checkpoint.engine_profile import VLLM, EngineProfile
from speculators.checkpoint.findings import CONVERTED
from speculators.cli.shared import (
    Device,
    Dtype,
    EngineName,
    NumSpeculativeTokens,
    Python,
    Result,
    TrustRemoteCode,
    Verifier,
    error_of,
    parse_json_object,
    say,
)
from speculators.evaluation.config import DiagnoseConfig, ParityConfig
from speculators.utils.report import facts_table

SPECULATIVE_CONFIG = '{"model": "run/checkpoint_best", "num_speculative_tokens": 4}'
SERVE = ("speculators", "serve")
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what becomes of each tensor, and write nothing.")]


def serve_command(
    checkpoint: str, profile: EngineProfile, verifier: str | None = None, engine: str | None = None
) -> Sequence[str]:
    """The `serve` command for a checkpoint, with what its verb was given; none for an engine that `serve` does not
    start: its own command is in the table."""
    if profile.engine != VLLM:
        return ()
    given = {"--verifier": verifier, "--engine": engine}
    return [*SERVE, checkpoint, *(word for flag, value in given.items() if value for word in (flag, value))]


def check(
    checkpoint: Annotated[str, typer.Argument(help="The speculator: directory or hub id, of any known format.")],
    verifier: Annotated[
        str | None, typer.Option(help="Check against this verifier: hub id or directory. Default: as recorded.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Whose format a directory of another project is, if that is unclear.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Load verifier and drafter too: every weight and score must be a number.")
    ] = False,
    engine: EngineName = None,
    python: Python = None,
    server: Annotated[
        str | None,
        typer.Option(help="Running server, http://host:8000: is it this drafter's model, and does it draft?"),
    ] = None,
) -> Result:
    """Check a checkpoint before serving it: config, tensors, vocabulary, verifier, and the record of its training."""
    from speculators.deploy.check import check_checkpoint

    report = check_checkpoint(
        checkpoint, verifier=verifier, algorithm=algorithm, deep=deep, engine=engine, python=python
    )
    if server is not None:
        from speculators.evaluation.server_check import server_findings

        report.add(f"server {server}", server_findings(server, str(report.path), verifier or report.verifier))
    is_served = report.serving is not None and report.ok
    serving = serve_command(checkpoint, report.profile, verifier, engine) if is_served else ()
    record = {"verb": "check", **report.as_dict()}
    return Result(record, report.tables(), report.sentence(), serving, exit_code=0 if report.ok else 1)


def export(
    checkpoint: Annotated[str, typer.Argument(help="The speculator: directory or hub id.")],
    output: Annotated[Path, typer.Option(help="New directory to write.")],
    engine: Annotated[
        str | None,
        typer.Option(
            help="vllm-0.33, ..., native, speculators, or a format. Default: the engine found, or the newest."
        ),
    ] = None,
    profile: Annotated[str | None, typer.Option(hidden=True, help="The same, in earlier releases.")] = None,
    verifier: Annotated[
        str | None, typer.Option(help="Verifier to record: hub id or directory. Default: as recorded.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: as stored.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Evaluation to quote in the card. Default: the one beside the run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it exists.")] = False,
    python: Python = None,
    dry_run: DryRun = False,
) -> Result:
    """Write what an engine needs from the same checkpoint, with a card that says how to serve it."""
    from speculators.deploy.export import export_checkpoint, plan_export

    options = {"engine": engine, "python": python, "profile": profile, "verifier": verifier, "dtype": dtype}
    if dry_run:
        plan = plan_export(checkpoint, output, **options, report=report)
        return Result({"verb": "export", **plan.as_dict()}, [plan], plan.sentence())
    exported = export_checkpoint(checkpoint, output, **options, overwrite=overwrite, report=report)
    serving = exported.serving
    record = {
        "verb": "export",
        "path": str(exported.path),
        "speculators_model_type": exported.speculators_model_type,
        "format": exported.format,
        "engine": exported.engine.profile.name,
        "model": serving.model if serving is not None else None,
        "speculative_config": serving.speculative_config if serving is not None else None,
    }
    next_command = serve_command(str(exported.path), exported.engine.profile) if serving is not None else ()
    return Result(record, [exported], f"written to {exported.path}", next_command)


def convert(
    model: Annotated[str, typer.Argument(help="The checkpoint: directory or hub id.")],
    verifier: Verifier,
    output: Annotated[Path, typer.Option(help="New directory to write.")] = Path(CONVERTED),
    algorithm: Annotated[
        str | None, typer.Option(help="Speculator type. Default, and auto: recognised by config and tensors.")
    ] = None,
    layer_ids_are: Annotated[
        str | None,
        typer.Option(help="What the ids of an EAGLE-3 config count: entering (vLLM) or outputs (SpecForge, SGLang)."),
    ] = None,
    algorithm_kwargs: Annotated[
        str | None, typer.Option(help='What the source does not say, as JSON: {"norm_before_residual": true}.')
    ] = None,
    validate_device: Annotated[str | None, typer.Option(help="Load the result once on this device.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it exists.")] = False,
    dry_run: DryRun = False,
) -> Result:
    """Convert a checkpoint of another project (EAGLE, EAGLE-3, Medusa, MTP, DFlash, DSpark), or of an older release."""
    from speculators.convert import convert_model, plan_conversion

    options = {**(parse_json_object("--algorithm-kwargs", algorithm_kwargs) or {})}
    if layer_ids_are is not None:
        options["layer_ids_are"] = layer_ids_are
    if dry_run:
        plan = plan_conversion(model, verifier=verifier, algorithm=algorithm, **options)
        return Result({"verb": "convert", **plan.as_dict()}, [plan], plan.sentence())
    written = convert_model(model, verifier, algorithm, output, validate_device, overwrite=overwrite, **options)
    record = {
        "verb": "convert",
        "path": str(written.path),
        "source_format": written.source_format,
        "speculators_model_type": written.speculators_model_type,
        "notes": list(written.notes),
    }
    dashes = ["--"] if str(written.path).startswith("-") else []
    next_command = ["speculators", "check", *dashes, str(written.path)]
    return Result(record, [written], f"converted: {written.path} is a speculator", next_command)


def stitch_mtp(
    finetuned: Annotated[str, typer.Argument(help="Directory of the trained MTP speculator.")],
    verifier: Annotated[str, typer.Argument(help="The verifier it was trained for: directory or hub id.")],
    output: Annotated[
        Path | None, typer.Option(help="New directory to write. Default: ./<verifier's name>-stitched.")
    ] = None,
) -> Result:
    """Write a trained MTP layer into a copy of its verifier; nothing else of the copy differs."""
    from speculators.model import SpeculatorModel

    speculator: Any = SpeculatorModel.get_class("mtp")
    stitched = speculator.stitch(finetuned, verifier, output)
    facts = {"written to": stitched.path, "tensors replaced": len(stitched.keys), "in files": ", ".join(stitched.files)}
    record = {
        "verb": "stitch-mtp",
        "path": str(stitched.path),
        "tensors": list(stitched.keys),
        "files": list(stitched.files),
    }
    next_command = ["speculators", "serve", str(stitched.path), "--method", "mtp"]
    return Result(record, [facts_table("stitched", facts)], f"written to {stitched.path}", next_command)


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Speculator to verify: directory or hub id.")],
    verifier: Annotated[str | None, typer.Option(help="Verifier. Default: the one the checkpoint names.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Conversations: file, directory, hf:<id> or preset. Default: built-in ones.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to replay.")] = ParityConfig.num_prompts,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = ParityConfig.max_tokens,
    num_speculative_tokens: NumSpeculativeTokens = None,
    dtype: Dtype = ParityConfig.dtype,
    device: Device = ParityConfig.device,
    python: Python = None,
    with_vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="Replay in vLLM too, where it is found.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the report to this JSON file.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Check that training, the engine and vLLM draft the same tokens, and that the text is the verifier's. Exit code 1
    when they do not; the first round that differs is named."""
    from speculators import api

    report = api.verify(
        checkpoint,
        verifier=verifier,
        data=data,
        vllm=(python or True) if with_vllm else False,
        progress=True if sys.stderr.isatty() else lambda what, done, total: say(what),
        num_prompts=limit,
        max_tokens=max_tokens,
        num_speculative_tokens=num_speculative_tokens,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if output is not None:
        say(f"report: {report.save(output)}")
    return Result(
        {"verb": "verify", **report.to_dict()},
        [report],
        report.sentence(),
        [*SERVE, checkpoint, *(["--verifier", verifier] if verifier else [])] if report.passed else (),
        error_of(report.raise_for_errors),
    )


def diagnose(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Speculator to diagnose: directory or hub id. Not needed with --server.")
    ] = None,
    verifier: Annotated[str | None, typer.Option(help="Verifier. Default: the one the checkpoint names.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Prepared data it was trained on, or conversations to draft for. Repeatable. Default: the run's own."
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Diagnose this running server instead, http://host:8000: its text and counts.")
    ] = None,
    plain_url: Annotated[
        str | None, typer.Option(help="Server of the same verifier without a drafter, to compare the text with.")
    ] = None,
    speculative_config: Annotated[
        str | None, typer.Option(help="An engine's --speculative-config, as JSON: does it draft with this checkpoint?")
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option("-k", "--num-speculative-tokens", min=0, help="Draft tokens per round (K), as they are served."),
    ] = DiagnoseConfig.num_speculative_tokens,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of serving. Default: as the verifier's generation_config.json says.")
    ] = DiagnoseConfig.temperature,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to draft for.")] = DiagnoseConfig.num_prompts,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = DiagnoseConfig.max_tokens,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Answers sampled of a server, to test their law.")
    ] = DiagnoseConfig.num_samples,
    dtype: Dtype = DiagnoseConfig.dtype,
    device: Device = DiagnoseConfig.device,
    output: Annotated[Path | None, typer.Option(help="Write the report to this JSON file.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Name why drafts are not accepted, the likeliest cause first, with its evidence and the way out. Exit code 1 when
    a cause is found, 0 when nothing is."""
    from speculators.diagnosis import diagnose as diagnosed

    report = diagnosed(
        checkpoint,
        verifier=verifier,
        data=data,
        server=server,
        plain_url=plain_url,
        engine_config=parse_json_object("--speculative-config", speculative_config, example=SPECULATIVE_CONFIG),
        progress=True if sys.stderr.isatty() else lambda what, done, total: say(what),
        num_prompts=limit,
        max_tokens=max_tokens,
        num_speculative_tokens=num_speculative_tokens,
        temperature=temperature,
        num_samples=num_samples,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if output is not None:
        say(f"report: {report.save(output)}")
    record = {"verb": "diagnose", **report.to_dict()}
    return Result(record, [report], report.sentence(), exit_code=0 if report.healthy else 1)
