"""`speculators regenerate-responses`: the verifier answers a data set's prompts itself, in our engine or on servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators.cli.shared import (
    BY_FLAGS,
    Device,
    Dtype,
    NumSpeculativeTokens,
    Result,
    TrustRemoteCode,
    Verifier,
    error_of,
    parse_json_object,
    with_sampling_flags,
)
from speculators.data_generation.configs import (
    DEFAULT_ANSWER_RETRIES,
    DEFAULT_ANSWER_TIMEOUT_S,
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_SEED,
    RegenerateConfig,
)
from speculators.decoding.method import PLAIN
from speculators.decoding.settings import DEFAULT_DEVICE, DEFAULT_DTYPE, SamplingParams

if TYPE_CHECKING:
    from speculators.data_generation.regenerate import RegenerationReport

COUNTED = (
    "num_conversations",
    "num_rows",
    "num_tokens",
    "num_cut",
    "num_from_text",
    "num_failed",
    "num_non_finite",
    "num_read",
    "num_already_done",
    "num_filtered",
)


NOT_IN_ROWS = ("n", "logprobs", "prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens")
"""Of texts and figures that the rows do not have; `--num-samples` is theirs for `n`."""


@with_sampling_flags(SamplingParams, leave_out=NOT_IN_ROWS)
def regenerate_responses(
    verifier: Verifier,
    data: Annotated[str, typer.Option(help="File, directory, hf:<id> or preset.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write, for prepare-data.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Conversations to answer. Default: all.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = RegenerateConfig.num_samples,
    prompt_field: Annotated[
        str | None, typer.Option(help="Column of the prompts. Default: recognised (messages, prompt, question, ...).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = DEFAULT_ANSWER_TOKENS,
    batch_size: Annotated[int, typer.Option(min=1, help="Answered together.")] = RegenerateConfig.batch_size,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="Server with OpenAI's interface that answers, http://host:8000/v1. Repeatable. Default: here."
        ),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds a server may take for an answer.")
    ] = DEFAULT_ANSWER_TIMEOUT_S,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Waits (1, 2, 4, ... s) while no server answers.")
    ] = DEFAULT_ANSWER_RETRIES,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the servers' API key.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Draft with a speculator's directory or a method; none: plainly.")
    ] = PLAIN,
    num_speculative_tokens: NumSpeculativeTokens = None,
    sampling: Mapping[str, Any] = BY_FLAGS,
    temperature_mix: Annotated[
        str | None, typer.Option(help="Each conversation draws one: 0.3,0.7,1. Twice the same: twice as often.")
    ] = None,
    system_prompts: Annotated[
        Path | None,
        typer.Option(
            help="Each conversation without a system turn draws one: a text file, one per line, or a JSON list."
        ),
    ] = None,
    drop_reasoning: Annotated[
        bool, typer.Option("--drop-reasoning", help="Thoughts stay in the rows as context and are not trained on.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = DEFAULT_SEED,
    resume: Annotated[bool, typer.Option("--resume", help="Complete a file that exists.")] = False,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="JSON object for the chat template.")] = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = DEFAULT_DEVICE,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Replace the answers of a data set by the verifier's own: the text that a drafter will see when it serves."""
    from speculators import api
    from speculators.data_generation.answering import read_system_prompts

    report = keeping_answers(
        output,
        api.regenerate,
        verifier,
        data,
        drafter=method,
        num_speculative_tokens=num_speculative_tokens,
        limit=limit,
        num_samples=num_samples,
        prompt_field=prompt_field,
        batch_size=batch_size,
        temperatures=parse_temperatures(temperature_mix),
        system_prompts=[] if system_prompts is None else read_system_prompts(system_prompts),
        drop_reasoning=drop_reasoning,
        endpoints=endpoint,
        request_timeout_s=request_timeout,
        max_retries=max_retries,
        api_key=read_api_key(api_key_env),
        resume=resume,
        chat_template_kwargs=parse_json_object("--chat-template-kwargs", chat_template_kwargs),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=True,
        max_tokens=max_tokens,
        seed=seed,
        **sampling,
    )
    counts = {name: getattr(report, name) for name in COUNTED} | {"num_quarantined": len(report.quarantine)}
    record = {"verb": "regenerate-responses", "path": str(report.path), **counts, "prompts": report.prompts}
    next_command = ["speculators", "prepare-data", "--verifier", verifier, "--data", str(report.path)]
    return Result(record, [report], report.sentence(), next_command, error_of(report.raise_for_errors))


def keeping_answers(output: Path, regenerate: Callable[..., RegenerationReport], *args: Any, **settings: Any) -> Any:
    """Says on Ctrl-C what is kept, and how to go on."""
    try:
        return regenerate(*args, output=output, **settings)
    except KeyboardInterrupt as stop:
        from speculators.data_generation.records import finished_conversations

        num_kept = len(finished_conversations(output))
        kept = f"{num_kept} answered conversations are kept in {output}" if num_kept else "nothing was answered yet"
        resume = "the same command with --resume" if num_kept else "the same command"
        raise KeyboardInterrupt(f"stopped: {kept}; {resume} goes on") from stop


def parse_temperatures(mix: str | None) -> list[float]:
    try:
        return [] if mix is None else [float(temperature) for temperature in mix.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--temperature-mix {mix!r} is not a list of numbers such as 0.3,0.7,1") from None


def read_api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise typer.BadParameter(f"--api-key-env {variable}: this environment variable is not set")
    return os.environ[variable]
