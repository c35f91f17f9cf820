"""`speculators prepare-data`: conversations to a directory that `train` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speculators.cli.shared import TrustRemoteCode, out, parse_json_object
from speculators.data_generation.configs import DEFAULT_OUTPUT, DEFAULT_SEED, DEFAULT_SEQ_LENGTH


def prepare_data(
    model: Annotated[str, typer.Option(help="Verifier: its tokenizer and chat template make the rows.")],
    data: Annotated[list[str], typer.Option(help="Conversations: file, directory, hf:<id> or preset. Repeatable.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")] = Path(DEFAULT_OUTPUT),
    seq_length: Annotated[
        int, typer.Option(min=2, help="Longest row, in tokens; longer ones are cut.")
    ] = DEFAULT_SEQ_LENGTH,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Rows to keep. Default: all.")] = None,
    token_freq_path: Annotated[Path | None, typer.Option(help="Default: <output>/token_freq.pt.")] = None,
    seed: Annotated[int, typer.Option(help="Order of the rows.")] = DEFAULT_SEED,
    num_preprocessing_workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: chosen.")] = None,
    minimum_valid_tokens: Annotated[int | None, typer.Option(help="Drop rows with fewer trained tokens.")] = None,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="JSON object for the chat template.")] = None,
    drop_reasoning: Annotated[
        bool, typer.Option("--drop-reasoning", help="Train on answers whose reasoning the template leaves out.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace rows prepared differently.")] = False,
    allow_empty_output: Annotated[bool, typer.Option("--allow-empty-output", help="No row is not an error.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> dict[str, Any]:
    """Turn conversations into tokenised training rows with loss masks, token frequencies and a manifest."""
    from speculators import data_generation

    prepared = data_generation.prepare_data(
        model=model,
        data=data,
        output=output,
        seq_length=seq_length,
        max_samples=max_samples,
        seed=seed,
        num_workers=num_preprocessing_workers,
        minimum_valid_tokens=minimum_valid_tokens,
        token_freq_path=token_freq_path,
        drop_reasoning=drop_reasoning,
        overwrite=overwrite,
        allow_empty_output=allow_empty_output,
        trust_remote_code=trust_remote_code,
        chat_template_kwargs=parse_json_object("--chat-template-kwargs", chat_template_kwargs),
        progress=True,
    )
    out().print(prepared)
    record: dict[str, Any] = {"verb": "prepare-data", "path": str(prepared.path), "reused": prepared.reused}
    manifest = prepared.manifest
    if manifest is not None:
        record |= {
            "num_rows": manifest.num_rows,
            "num_tokens": manifest.num_tokens,
            "supervised_share": manifest.supervised_share,
            "dropped": manifest.dropped,
            "units": manifest.units,
            "num_without_reasoning": manifest.num_without_reasoning,
        }
    return record
