"""`speculators verify`: the parity gate. A checkpoint drafts the same where it is trained, measured and served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.shared import Device, Dtype, NumSpeculativeTokens, TrustRemoteCode, out, say
from speculators.evaluation.config import ParityConfig


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Speculator to verify: directory or hub id.")],
    verifier: Annotated[str | None, typer.Option(help="Verifier. Default: the one the checkpoint names.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Conversations: file, directory, hf:<id> or preset. Default: built-in ones.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts to replay.")] = ParityConfig.num_prompts,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = ParityConfig.max_tokens,
    num_speculative_tokens: NumSpeculativeTokens = None,
    dtype: Dtype = ParityConfig.dtype,
    device: Device = ParityConfig.device,
    vllm_python: Annotated[
        str | None,
        typer.Option(help="Python with vLLM, or its environment. Default: $SPECULATORS_VLLM_PYTHON, else this one."),
    ] = None,
    with_vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="Replay in vLLM too, where it is found.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the report to this JSON file.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> dict[str, Any]:
    """Check that training, the engine and vLLM draft the same tokens, and that the text is the verifier's. Exit code 1
    when they do not; the first round that differs is named."""
    from speculators import api

    report = api.verify(
        checkpoint,
        verifier=verifier,
        data=prompts,
        vllm=(vllm_python or True) if with_vllm else False,
        progress=lambda what, done, total: say(what),
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        num_speculative_tokens=num_speculative_tokens,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    out().print(report)
    if output is not None:
        say(f"report: {report.save(output)}")
    report.raise_for_errors()
    return {"verb": "verify", **report.to_dict()}
