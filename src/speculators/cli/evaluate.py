"""`speculators evaluate`: the house table for any list of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.console import WorkProgress, out, say
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
    Verifier,
    parse_json_object,
)

METHOD_HELP = 'none, ngram, a speculator\'s directory, or JSON such as {"method": "ngram"}. Repeatable.'


def evaluate(
    verifier: Verifier,
    data: Annotated[str, typer.Option(help="Held-out conversations: file, directory, hf:<id> or preset.")],
    method: Annotated[list[str], typer.Option(help=METHOD_HELP)],
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
    from speculators import evaluation

    config = evaluation.EvaluateConfig(
        verifier=verifier,
        data=data,
        methods=tuple(method),
        num_speculative_tokens=num_speculative_tokens,
        speculative_token_tree=speculative_token_tree,
        dynamic_tree=parse_json_object("--dynamic-tree", dynamic_tree),
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
        num_warmup=num_warmup,
        num_repeats=num_repeats,
        dtype=dtype,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
        check_sampling=lossless,
    )
    with WorkProgress() as progress:
        report = evaluation.evaluate(config, on_progress=lambda done, total: progress("decode", done, total))
    out().print(evaluation.report_table(report))
    for row in report.rows:
        for warning in row.warnings:
            say(f"[yellow]{row.method}: {warning}[/]")
    if output is not None:
        say(f"report: {evaluation.save_report(report, output)}")
    if lossless and report.lossless is False:
        raise evaluation.NotLosslessError(report.rows, dtype)
    return {"verb": "evaluate", **report.to_dict()}
