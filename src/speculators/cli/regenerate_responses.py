"""`speculators regenerate-responses`: the verifier answers a data set's prompts itself, with our own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.shared import (
    Device,
    Dtype,
    FrequencyPenalty,
    MinP,
    NumSpeculativeTokens,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verifier,
    out,
    parse_json_object,
    raise_after_printing,
)
from speculators.data_generation.configs import (
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_ANSWERED_TOGETHER,
    DEFAULT_NUM_ANSWERS,
    DEFAULT_SEED,
)
from speculators.decoding.method import PLAIN
from speculators.decoding.settings import DEFAULT_DEVICE, DEFAULT_DTYPE, SamplingParams


def regenerate_responses(
    model: Verifier,
    data: Annotated[str, typer.Option("--data", "--dataset", help="File, directory, hf:<id> or preset.")],
    output: Annotated[Path, typer.Option("--output", "--outfile", help="JSONL file to write, for prepare-data.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Conversations to answer. Default: all.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = DEFAULT_NUM_ANSWERS,
    prompt_field: Annotated[
        str | None, typer.Option(help="Column of the prompts. Default: recognised (messages, prompt, question, ...).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = DEFAULT_ANSWER_TOKENS,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--concurrency", min=1, help="Answered together.")
    ] = DEFAULT_ANSWERED_TOGETHER,
    method: Annotated[
        str, typer.Option(help="Draft with a speculator's directory or a method; none: plainly.")
    ] = PLAIN,
    num_speculative_tokens: NumSpeculativeTokens = None,
    temperature: Temperature = SamplingParams.temperature,
    top_k: TopK = SamplingParams.top_k,
    top_p: TopP = SamplingParams.top_p,
    min_p: MinP = SamplingParams.min_p,
    repetition_penalty: RepetitionPenalty = SamplingParams.repetition_penalty,
    presence_penalty: PresencePenalty = SamplingParams.presence_penalty,
    frequency_penalty: FrequencyPenalty = SamplingParams.frequency_penalty,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = DEFAULT_SEED,
    resume: Annotated[bool, typer.Option("--resume", help="Complete a file that exists.")] = False,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="JSON object for the chat template.")] = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = DEFAULT_DEVICE,
    trust_remote_code: TrustRemoteCode = False,
) -> dict[str, Any]:
    """Replace the answers of a data set by the verifier's own: the text that a drafter will see when it serves."""
    from speculators import api

    report = api.regenerate(
        model,
        data,
        output=output,
        drafter=method,
        num_speculative_tokens=num_speculative_tokens,
        limit=limit,
        num_samples=num_samples,
        prompt_field=prompt_field,
        batch_size=batch_size,
        resume=resume,
        chat_template_kwargs=parse_json_object("--chat-template-kwargs", chat_template_kwargs),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=True,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    out().print(report)
    result = {
        "verb": "regenerate-responses",
        "path": str(report.path),
        "num_conversations": report.num_conversations,
        "num_rows": report.num_rows,
        "num_tokens": report.num_tokens,
        "num_cut": report.num_cut,
        "num_failed": report.num_failed,
        "num_non_finite": report.num_non_finite,
        "num_read": report.num_read,
        "num_already_done": report.num_already_done,
        "num_quarantined": len(report.quarantine),
        "num_filtered": report.num_filtered,
        "prompts": report.prompts,
    }
    raise_after_printing(report.raise_for_errors, result)
    return result
