"""`speculators generate-offline-data`: hidden states of a prepared dataset to disk, from an extraction server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from speculators.cli.shared import out, say
from speculators.data_generation.configs import DEFAULT_OUTPUT, OfflineConfig

NUM_SHOWN = 5
"""Failed rows named one by one; all are in the JSON line."""


def generate_offline_data(
    preprocessed_data: Annotated[
        str, typer.Option(help="Prepared dataset (the output of prepare-data).")
    ] = DEFAULT_OUTPUT,
    endpoint: Annotated[str, typer.Option(help="Server started by launch-vllm.")] = OfflineConfig.endpoint,
    server_states_path: Annotated[
        str, typer.Option(help="Directory that this server writes to: its --hidden-states-path.")
    ] = OfflineConfig.server_states_path,
    output: Annotated[str | None, typer.Option(help="Default: hidden_states in the prepared dataset.")] = None,
    model: Annotated[str | None, typer.Option(help="Only a check: what the server must serve.")] = None,
    target_layer_ids: Annotated[
        str | None, typer.Option(help="For other servers: their layers, e.g. 2,6,9,12, the last layer at the end.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Only the first rows. Default: all.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = OfflineConfig.concurrency,
    validate_outputs: Annotated[
        bool, typer.Option("--validate-outputs", help="Read existing files in full; make damaged ones again.")
    ] = False,
    request_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds the server may take for one row.")
    ] = OfflineConfig.request_timeout_s,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Tries after a failed request: 1, 2, 4, ... s apart.")
    ] = OfflineConfig.max_retries,
    fail_on_error: Annotated[bool, typer.Option("--fail-on-error", help="Stop at the first row that fails.")] = False,
    max_consecutive_errors: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many failed rows in a row. Default: --concurrency.")
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Machines that share the rows.")] = OfflineConfig.world_size,
    rank: Annotated[int, typer.Option(min=0, help="Number of this machine among them.")] = OfflineConfig.rank,
) -> dict[str, Any]:
    """Write what is missing; the same command continues a run that ended early."""
    from speculators import data_generation

    config = OfflineConfig(
        preprocessed_data=preprocessed_data,
        endpoint=endpoint,
        server_states_path=server_states_path,
        output=output,
        model=model,
        target_layer_ids=parse_layer_ids(target_layer_ids),
        max_samples=max_samples,
        concurrency=concurrency,
        validate_outputs=validate_outputs,
        request_timeout_s=request_timeout,
        max_retries=max_retries,
        fail_on_error=fail_on_error,
        max_consecutive_errors=max_consecutive_errors,
        world_size=world_size,
        rank=rank,
    )
    report = data_generation.generate_offline_data(config, progress=True)
    out().print(report)
    for row, reason in list(report.failed.items())[:NUM_SHOWN]:
        say(f"row {row}: {reason}", "yellow")
    return {
        "verb": "generate-offline-data",
        "directory": str(report.directory),
        "num_written": report.num_written,
        "num_tokens": report.num_tokens,
        "num_repaired": report.num_repaired,
        "num_kept": report.num_kept,
        "failed": {str(row): reason for row, reason in report.failed.items()},
    }


def parse_layer_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise typer.BadParameter(f"--target-layer-ids {text}: numbers with commas, such as 2,6,9,12") from error
