"""Flags that several verbs have, written once."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Verifier = Annotated[str, typer.Option(help="Verifier: hub id or directory.")]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "-k", "--num-speculative-tokens", min=1, help="Draft tokens per round (K). Default: the method's own."
    ),
]
TokenTree = Annotated[
    str | None,
    typer.Option(
        "--speculative-token-tree", help='Tree that a speculator drafts, as paths of ranks: "[(0,), (1,), (0, 0)]".'
    ),
]
DynamicTree = Annotated[
    str | None,
    typer.Option(
        "--dynamic-tree", help='EAGLE-2\'s tree instead: JSON such as {"total_token": 60, "depth": 7, "top_k": 10}.'
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens. 0: off.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability. 1: off.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16. Greedy answers are sure to be identical in float32 only.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code shipped with the verifier.")]


def parse_json_object(flag: str, text: str | None) -> dict[str, Any] | None:
    """The value of a flag that takes a JSON object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{flag} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f'{flag} must be a JSON object such as {{"enable_thinking": false}}')
    return value
