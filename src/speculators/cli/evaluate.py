"""`speculators evaluate`: measures any list of methods, or a running server, and prints the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators.cli.shared import (
    BY_FLAGS,
    Device,
    Dtype,
    DynamicTree,
    MaxTokens,
    NumSpeculativeTokens,
    Result,
    TokenTree,
    TrustRemoteCode,
    error_of,
    parse_json_object,
    say,
    with_sampling_flags,
)
from speculators.decoding.settings import DEFAULT_DTYPE
from speculators.evaluation.config import EvaluateConfig, ServerConfig

if TYPE_CHECKING:
    from speculators.evaluation.report import EvaluationReport
    from speculators.evaluation.server import ServerReport

OptionalVerifier = Annotated[str | None, typer.Option(help="Verifier: hub id or directory. Default: the server's.")]
LOCAL_FLAGS = (
    "num_speculative_tokens",
    "speculative_token_tree",
    "dynamic_tree",
    "batch_size",
    "num_repeats",
    "dtype",
    "device",
)
"""Flags of a measurement in this process: a server was told them when it was started, or has no use for them."""
SERVER_FLAGS = ("baseline_server", "concurrency", "request_timeout", "max_retries")
METHOD_HELP = 'none, ngram, a speculator\'s directory, or JSON such as {"method": "ngram"}. Repeatable.'


@with_sampling_flags(EvaluateConfig)
def evaluate(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="Held-out conversations: file, directory, hf:<id> or preset.")],
    verifier: OptionalVerifier = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP)] = None,
    server: Annotated[str | None, typer.Option(help="Measure a running vLLM server instead, by its counters.")] = None,
    baseline_server: Annotated[str | None, typer.Option(help="Plain server to compare that one with.")] = None,
    concurrency: Annotated[str, typer.Option(help="With --server: numbers of clients, such as 1,4,8.")] = ",".join(
        map(str, ServerConfig.num_clients)
    ),
    request_timeout: Annotated[
        float, typer.Option(min=1, help="With --server: seconds an answer may take.")
    ] = ServerConfig.timeout_s,
    max_retries: Annotated[
        int, typer.Option(min=0, help="With --server: tries after a failed request.")
    ] = ServerConfig.max_retries,
    num_speculative_tokens: NumSpeculativeTokens = None,
    speculative_token_tree: TokenTree = None,
    dynamic_tree: DynamicTree = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to decode.")] = EvaluateConfig.num_prompts,
    max_tokens: MaxTokens = EvaluateConfig.max_tokens,
    sampling: Mapping[str, Any] = BY_FLAGS,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = EvaluateConfig.batch_size,
    num_warmup: Annotated[int, typer.Option(min=0, help="Batches decoded before timing.")] = EvaluateConfig.num_warmup,
    num_repeats: Annotated[
        int, typer.Option(min=1, help="Timings of each batch; the fastest counts.")
    ] = EvaluateConfig.num_repeats,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = EvaluateConfig.device,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = EvaluateConfig.seed,
    output: Annotated[Path | None, typer.Option(help="Write the whole report to this JSON file.")] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Fail unless the output is plain decoding's.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Measure drafting methods against plain decoding on held-out prompts: paired, interleaved, in one process."""
    asked: dict[str, Any] = {
        "data": data,
        "num_prompts": limit,
        "max_tokens": max_tokens,
        **sampling,
        "num_warmup": num_warmup,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
    }
    if server is not None:
        refuse_flags(context, LOCAL_FLAGS, "does not go with --server: it holds for measurements in this process")
        return evaluate_running_server(
            **asked,
            server=server,
            baseline=baseline_server,
            verifier=verifier,
            **label_of(method),
            num_clients=parse_concurrency(concurrency),
            timeout_s=request_timeout,
            max_retries=max_retries,
            output=output,
            lossless=lossless,
        )
    refuse_flags(context, SERVER_FLAGS, "needs --server")
    if verifier is None or not method:
        raise typer.BadParameter("--verifier and --method are needed, or --server with a running server")
    return evaluate_methods(
        **asked,
        verifier=verifier,
        methods=tuple(method),
        num_speculative_tokens=num_speculative_tokens,
        speculative_token_tree=speculative_token_tree,
        dynamic_tree=parse_json_object("--dynamic-tree", dynamic_tree),
        batch_size=batch_size,
        num_repeats=num_repeats,
        dtype=dtype,
        device=device,
        output=output,
        lossless=lossless,
    )


def evaluate_methods(*, output: Path | None, lossless: bool, **settings: Any) -> Result:
    """`settings`: what `api.evaluate` takes."""
    from speculators import api
    from speculators.evaluation.report import EvaluationStoppedError

    error: BaseException | None = None
    try:
        report = api.evaluate(**settings, check_sampling=lossless, progress=True)
    except EvaluationStoppedError as stop:
        report, error = stop.report, stop
    if output is not None:
        say(f"report: {report.save(output)}")
    for warning in report.warnings():
        say(warning, "yellow")
    if error is None and lossless:
        error = error_of(report.raise_for_errors)
    return Result({"verb": "evaluate", **report.to_dict()}, [report], report.sentence(), next_after(report), error)


def next_after(report: EvaluationReport) -> list[str]:
    """Serve what pays; where nothing does, try what needs no training."""
    best = report.best
    if best is None or best.speedup.high < 1:
        measured = {row.method for row in report.rows}
        again = ["speculators", "evaluate", "--verifier", report.verifier, "--data", report.dataset]
        return [] if "ngram" in measured else [*again, "--method", "ngram"]
    drafter = (report.settings["speculative_configs"][best.method] or {}).get("model")
    return ["speculators", "serve", *([drafter] if drafter else [report.verifier, "--method", best.method])]


def refuse_flags(context: typer.Context, names: tuple[str, ...], reason: str) -> None:
    """A flag that would be ignored is an error."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,4,8`"""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--concurrency {text}: numbers of clients with commas, such as 1,4,8") from error


def label_of(methods: Sequence[str] | None) -> dict[str, str]:
    """Names the row: a server does not say what drafts in it."""
    if methods and len(methods) > 1:
        raise typer.BadParameter("--method names the row of --server, which has one: give it once")
    return {"label": methods[0]} if methods else {}


def evaluate_running_server(*, output: Path | None, lossless: bool, **settings: Any) -> Result:
    """`settings`: the fields of `ServerConfig`."""
    from speculators.evaluation.server import NO_BASELINE, evaluate_server

    config = ServerConfig(**settings)
    if lossless and (config.baseline is None or config.temperature > 0):
        raise typer.BadParameter("--lossless of a server needs --baseline-server and greedy answers")
    report = evaluate_server(config, progress=True)
    if config.baseline is None:
        say(NO_BASELINE)
    for warning in report.warnings():
        say(warning, "yellow")
    if output is not None:
        say(f"report: {report.save(output)}")
    error = error_of_server(report, lossless)
    return Result(
        {"verb": "evaluate", **report.to_dict()}, [report] if report.rows else [], report.sentence(), error=error
    )


def error_of_server(report: ServerReport, lossless: bool) -> Exception | None:
    """Why the rows are not all, or not of the verifier's text: the exit code says so."""
    if report.interrupted is not None:
        return ConnectionError(f"the measurement ended early: {report.interrupted}")
    if lossless and any(row.num_identical != row.num_prompts for row in report.rows):
        found = "; ".join(f"{row.num_clients} clients: {row.num_identical}/{row.num_prompts}" for row in report.rows)
        return ValueError(f"not lossless: identical greedy answers {found} (bfloat16 has ties that rounding decides)")
    return None
