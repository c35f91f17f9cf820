"""`speculators generate`: decode prompts with draft-and-verify and show what was accepted."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from speculators.cli.shared import (
    Device,
    Dtype,
    DynamicTree,
    FrequencyPenalty,
    MaxTokens,
    MinP,
    NumSpeculativeTokens,
    PresencePenalty,
    RepetitionPenalty,
    Result,
    Stop,
    Temperature,
    TokenTree,
    TopK,
    TopP,
    TrustRemoteCode,
    Verifier,
    error_of,
    parse_json_object,
)
from speculators.decoding.method import PLAIN
from speculators.decoding.settings import DEFAULT_DEVICE, DEFAULT_DTYPE, SamplingParams
from speculators.utils.report import facts_table, visible

if TYPE_CHECKING:
    from speculators.decoding.request import RequestOutput


def generate(
    verifier: Verifier,
    prompt: Annotated[list[str], typer.Option(help="What to ask; '-' reads stdin. Repeatable.")],
    method: Annotated[str, typer.Option(help="A speculator's directory, a method's name, JSON, or none.")] = PLAIN,
    num_speculative_tokens: NumSpeculativeTokens = None,
    speculative_token_tree: TokenTree = None,
    dynamic_tree: DynamicTree = None,
    max_tokens: MaxTokens = SamplingParams.max_tokens,
    temperature: Temperature = SamplingParams.temperature,
    top_k: TopK = SamplingParams.top_k,
    top_p: TopP = SamplingParams.top_p,
    min_p: MinP = SamplingParams.min_p,
    repetition_penalty: RepetitionPenalty = SamplingParams.repetition_penalty,
    presence_penalty: PresencePenalty = SamplingParams.presence_penalty,
    frequency_penalty: FrequencyPenalty = SamplingParams.frequency_penalty,
    stop: Stop = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="Log-probabilities in the JSON: of each token and of so many likeliest.")
    ] = SamplingParams.logprobs,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = DEFAULT_DEVICE,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts as they are: no chat template.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Decode prompts with draft-and-verify; greedy output is the verifier's own, token for token."""
    from speculators.decoding import Engine, open_target, parse_methods
    from speculators.decoding.request import raise_for_failed
    from speculators.utils.chat_template import chat_prompt

    trees = {
        "speculative_token_tree": speculative_token_tree,
        "dynamic_tree": parse_json_object("--dynamic-tree", dynamic_tree),
    }
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    chosen = parse_methods([method], num_speculative_tokens, trees)[0]
    target = open_target(verifier, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = target.tokenizer
    texts = [sys.stdin.read() if text == "-" else text for text in prompt]
    prompts = [tokenizer(text).input_ids if raw else chat_prompt(tokenizer, text) for text in texts]
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        seed=seed,
        logprobs=logprobs,
    )
    engine = Engine(target.model, chosen.speculative_config, tokenizer=tokenizer, max_batch_size=len(prompts))
    outputs = engine.generate(prompts, sampling)
    shown: list[RenderableType] = []
    for text, output in zip(texts, outputs, strict=True):
        shown += [Text(visible(text), "bold"), Text(visible(output.text)), facts_table("", facts_of(output))]
    record = {"verb": "generate", "method": chosen.name, "outputs": [record_of(output) for output in outputs]}
    return Result(record, shown, error=error_of(lambda: raise_for_failed(outputs)))


def facts_of(output: RequestOutput) -> dict[str, Any]:
    stats = output.stats
    facts: dict[str, Any] = {
        "tokens": f"{len(output.token_ids)}, ended by {output.finish_reason}",
        "rounds": stats.num_rounds,
    }
    if stats.num_drafted:
        facts["acceptance length"] = f"{stats.acceptance_length:.2f}"
        if stats.num_drafts < stats.num_rounds:
            facts["... when drafted"] = f"{stats.acceptance_length_when_drafted:.2f} in {stats.num_drafts} rounds"
        facts["accepted / drafted"] = f"{stats.num_accepted} / {stats.num_drafted}"
    return facts


def record_of(output: RequestOutput) -> dict[str, Any]:
    stats = output.stats
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "error": output.error,
        **({} if output.logprobs is None else {"logprobs": [asdict(position) for position in output.logprobs]}),
        "num_rounds": stats.num_rounds,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
        "num_drafts": stats.num_drafts,
        "acceptance_length": stats.acceptance_length,
        "acceptance_length_when_drafted": stats.acceptance_length_when_drafted,
    }
