"""`speculators evaluate`: the house table for any list of methods, or of a running server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from speculators.cli.console import out, say
from speculators.cli.options import (
    Device,
    Dtype,
    DynamicTree,
    MaxTokens,
    NumSpeculativeTokens,
    Temperature,
    TokenTree,
    TopK,
    TopP,
    TrustRemoteCode,
    parse_json_object,
)

if TYPE_CHECKING:
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
"""Decided where the server was started, or of no meaning for one."""
SERVER_FLAGS = ("baseline_server", "concurrency", "request_timeout", "max_retries")
METHOD_HELP = 'none, ngram, a speculator\'s directory, or JSON such as {"method": "ngram"}. Repeatable.'


def evaluate(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="Held-out conversations: file, directory, hf:<id> or preset.")],
    verifier: OptionalVerifier = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP)] = None,
    server: Annotated[str | None, typer.Option(help="Measure a running vLLM server instead, by its counters.")] = None,
    baseline_server: Annotated[str | None, typer.Option(help="Plain server to compare that one with.")] = None,
    concurrency: Annotated[str, typer.Option(help="With --server: numbers of clients, such as 1,4,8.")] = "1",
    request_timeout: Annotated[float, typer.Option(min=1, help="With --server: seconds an answer may take.")] = 120.0,
    max_retries: Annotated[int, typer.Option(min=0, help="With --server: tries after a failed request.")] = 3,
    num_speculative_tokens: NumSpeculativeTokens = None,
    speculative_token_tree: TokenTree = None,
    dynamic_tree: DynamicTree = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts to decode.")] = 32,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    num_warmup: Annotated[int, typer.Option(min=0, help="Batches decoded before timing.")] = 2,
    num_repeats: Annotated[int, typer.Option(min=1, help="Timings of each batch; the fastest counts.")] = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the whole report to this JSON file.")] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Fail unless the output is plain decoding's.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> dict[str, Any]:
    """Measure drafting methods against plain decoding on held-out prompts: paired, interleaved, in one process."""
    asked: dict[str, Any] = {
        "data": data,
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_warmup": num_warmup,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
    }
    if server is not None:
        refuse_flags(context, LOCAL_FLAGS, "does not go with --server: it was decided when the server was started")
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


def evaluate_methods(*, output: Path | None, lossless: bool, **settings: Any) -> dict[str, Any]:
    """`settings`: what `api.evaluate` takes."""
    from speculators import api

    report = api.evaluate(**settings, check_sampling=lossless, progress=True)
    out().print(report)
    for warning in report.warnings():
        say(f"[yellow]{escape(warning)}[/]")
    if output is not None:
        say(f"report: {report.save(output)}")
    if lossless:
        report.raise_for_errors()
    return {"verb": "evaluate", **report.to_dict()}


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
    """What the row is called: a server does not say what drafts in it."""
    if methods and len(methods) > 1:
        raise typer.BadParameter("--method names the row of --server, which has one: give it once")
    return {"label": methods[0]} if methods else {}


def evaluate_running_server(*, output: Path | None, lossless: bool, **settings: Any) -> dict[str, Any]:
    """`settings`: the fields of `ServerConfig`."""
    from speculators.evaluation.config import ServerConfig
    from speculators.evaluation.server import NO_BASELINE, evaluate_server

    config = ServerConfig(**settings)
    if lossless and (config.baseline is None or config.temperature > 0):
        raise typer.BadParameter("--lossless of a server needs --baseline-server and greedy answers")
    report = evaluate_server(config, progress=True)
    if report.rows:
        out().print(report)
    if config.baseline is None:
        say(NO_BASELINE)
    for warning in report.warnings():
        say(f"[yellow]{escape(warning)}[/]")
    if output is not None:
        say(f"report: {report.save(output)}")
    result = {"verb": "evaluate", **report.to_dict()}
    refuse_half_a_measurement(report, result)
    if lossless and any(row.num_identical != row.num_prompts for row in report.rows):
        found = "; ".join(f"{row.num_clients} clients: {row.num_identical}/{row.num_prompts}" for row in report.rows)
        raise ValueError(f"not lossless: identical greedy answers {found} (bfloat16 has ties that rounding decides)")
    return result


def refuse_half_a_measurement(report: ServerReport, result: dict[str, Any]) -> None:
    """What was measured is shown and printed as JSON all the same; the exit code says that it is not the whole."""
    if report.interrupted is not None:
        print(json.dumps(result, default=str), flush=True)
        raise ConnectionError(f"the measurement ended early: {report.interrupted}")
