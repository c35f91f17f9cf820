"""`speculators evaluate`: measures any list of methods, or a running server, and prints the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators.cli.shared import (
    BY_FLAGS,
    Device,
    Dtype,
    DynamicTree,
    MaxTokens,
    Result,
    TokenTree,
    TrustRemoteCode,
    error_of,
    parse_json_object,
    say,
    with_flags_of,
    with_sampling_flags,
)
from speculators.decoding.settings import DEFAULT_DTYPE
from speculators.evaluation.config import EvaluateConfig, ServerConfig

if TYPE_CHECKING:
    from speculators.evaluation.report import EvaluationReport
    from speculators.evaluation.server import ServerReport

OptionalVerifier = Annotated[str | None, typer.Option(help="Verifier: hub id or directory. Default: the server's.")]
DATA_HELP = (
    "Held-out prompts: file, directory, hf:<id>, preset, ours (embedded), spec-bench=FILE, humaneval=FILE or "
    "gsm8k=FILE. Repeatable."
)
SEVERAL = "with commas, every combination is measured"
METHOD_HELP = 'none, ngram, a speculator\'s directory, or JSON such as {"method": "ngram"}. Repeatable.'


@dataclass(frozen=True, kw_only=True)
class LocalFlags:
    """Flags of a measurement in this process: a server was told them when it was started, or has no use for them."""

    num_speculative_tokens: Annotated[
        str | None,
        typer.Option(
            "-k",
            "--num-speculative-tokens",
            help=f"Draft tokens per round (K), such as 2,4: {SEVERAL}. Default: the method's own.",
        ),
    ] = None
    speculative_token_tree: TokenTree = None
    dynamic_tree: DynamicTree = None
    batch_size: Annotated[str, typer.Option(help=f"Prompts decoded together, such as 1,8: {SEVERAL}.")] = str(
        EvaluateConfig.batch_size
    )
    num_repeats: Annotated[int, typer.Option(min=1, help="Timings of each batch; the fastest counts.")] = (
        EvaluateConfig.num_repeats
    )
    keep_tokens: Annotated[
        int, typer.Option(min=0, help="Answers per method whose tokens are kept, with who wrote each, for `report`.")
    ] = EvaluateConfig.keep_tokens
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what the output file holds.")] = False
    dtype: Dtype = DEFAULT_DTYPE
    device: Device = EvaluateConfig.device

    def settings(self) -> dict[str, Any]:
        """As `api.evaluate` takes them."""
        number = self.num_speculative_tokens
        return {
            **vars(self),
            "num_speculative_tokens": None if number is None else numbers("--num-speculative-tokens", number, int),
            "dynamic_tree": parse_json_object("--dynamic-tree", self.dynamic_tree),
            "batch_size": numbers("--batch-size", self.batch_size, int),
        }


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """Flags of a measurement of a running server."""

    baseline_server: Annotated[str | None, typer.Option(help="Plain server to compare that one with.")] = None
    concurrency: Annotated[str, typer.Option(help="With --server: numbers of clients, such as 1,4,8.")] = ",".join(
        map(str, ServerConfig.num_clients)
    )
    request_timeout: Annotated[float, typer.Option(min=1, help="With --server: seconds an answer may take.")] = (
        ServerConfig.timeout_s
    )
    max_retries: Annotated[int, typer.Option(min=0, help="With --server: tries after a failed request.")] = (
        ServerConfig.max_retries
    )

    def settings(self) -> dict[str, Any]:
        """Fields of `ServerConfig`."""
        return {
            "baseline": self.baseline_server,
            "num_clients": tuple(numbers("--concurrency", self.concurrency, int)),
            "timeout_s": self.request_timeout,
            "max_retries": self.max_retries,
        }


@with_sampling_flags(EvaluateConfig, leave_out=("temperature",))
@with_flags_of("of_server", ServerFlags)
@with_flags_of("local", LocalFlags)
def evaluate(
    context: typer.Context,
    data: Annotated[list[str], typer.Option(help=DATA_HELP)],
    verifier: OptionalVerifier = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP)] = None,
    server: Annotated[str | None, typer.Option(help="Measure a running vLLM server instead, by its counters.")] = None,
    of_server: ServerFlags = BY_FLAGS,
    local: LocalFlags = BY_FLAGS,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each set to decode.")] = EvaluateConfig.num_prompts,
    max_tokens: MaxTokens = EvaluateConfig.max_tokens,
    temperature: Annotated[str, typer.Option(help=f"0: greedy. Such as 0,0.7: {SEVERAL}.")] = str(
        EvaluateConfig.temperature
    ),
    sampling: Mapping[str, Any] = BY_FLAGS,
    num_warmup: Annotated[int, typer.Option(min=0, help="Batches decoded before timing.")] = EvaluateConfig.num_warmup,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = EvaluateConfig.seed,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file of the whole report, written as it grows: the same command goes on with it."),
    ] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Fail unless the output is plain decoding's.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Measure drafting methods against plain decoding on held-out prompts: paired, interleaved, in one process."""
    asked = {"num_prompts": limit, "max_tokens": max_tokens, **sampling, "num_warmup": num_warmup, "seed": seed}
    asked |= {"trust_remote_code": trust_remote_code, "verifier": verifier, "output": output, "lossless": lossless}
    temperatures = numbers("--temperature", temperature, float)
    if server is not None:
        refuse_flags(context, LocalFlags, "does not go with --server: it holds for measurements in this process")
        asked |= {"data": only(data, "--data"), "temperature": only(temperatures, "--temperature"), **label_of(method)}
        return evaluate_running_server(**asked, server=server, **of_server.settings())
    refuse_flags(context, ServerFlags, "needs --server")
    if verifier is None or not method:
        raise typer.BadParameter("--verifier and --method are needed, or --server with a running server")
    return evaluate_methods(**asked, methods=tuple(method), data=data, temperature=temperatures, **local.settings())


def evaluate_methods(*, output: Path | None, lossless: bool, **settings: Any) -> Result:
    """`settings`: what `api.evaluate` takes."""
    from speculators import api
    from speculators.evaluation.report import EvaluationStoppedError

    error: BaseException | None = None
    try:
        report = api.evaluate(**settings, output=output, check_sampling=lossless, progress=True)
    except EvaluationStoppedError as stop:
        report, error = stop.report, stop
    if output is not None:
        say(f"report: {output}")
    for warning in report.warnings():
        say(warning, "yellow")
    if error is None and lossless:
        error = error_of(report.raise_for_errors)
    return Result({"verb": "evaluate", **report.to_dict()}, [report], report.sentence(), next_after(report), error)


def next_after(report: EvaluationReport) -> list[str]:
    """Serve what pays; where nothing does, try what needs no training. A speedup that cannot be true says neither."""
    best = report.best
    if best is not None and not best.is_possible:
        return []
    if best is None or best.speedup.high < 1:
        measured = {row.method for row in report.rows}
        data = report.settings["data"]
        again = ["speculators", "evaluate", "--verifier", report.verifier, "--data", data]
        return [] if "ngram" in measured or not isinstance(data, str) else [*again, "--method", "ngram"]
    drafter = (best.speculative_config or {}).get("model")
    return ["speculators", "serve", *([drafter] if drafter else [report.verifier, "--method", best.method])]


def refuse_flags(context: typer.Context, flags: type[Any], reason: str) -> None:
    """A flag that would be ignored is an error."""
    for name in (field.name for field in fields(flags)):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")


def numbers(flag: str, text: str, kind: type) -> list[Any]:
    """`1,4,8`"""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        of_what = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"{flag} {text}: {of_what} with commas, such as 1,4,8") from error


def only(values: Sequence[Any], flag: str) -> Any:
    """The one value of a flag that goes with --server."""
    if len(values) > 1:
        raise typer.BadParameter(f"{flag}: a server is measured with one value at a time, give it once")
    return values[0]


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
