"""The verbs of training data: `prepare-data`, `inspect-mask`, `generate-offline-data`, `store`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.rule import Rule
from rich.text import Text

from speculators.cli.shared import Device, Result, TrustRemoteCode, parse_json_object, say
from speculators.data_generation.configs import (
    DEFAULT_OUTPUT,
    DEFAULT_RECOMPUTED,
    DEFAULT_SEED,
    DEFAULT_SEQ_LENGTH,
    DEFAULT_SHARD_SIZE,
    DEFAULT_SHOWN_ROWS,
    OfflineConfig,
    parse_bytes,
)
from speculators.utils.names import did_you_mean
from speculators.utils.report import visible

if TYPE_CHECKING:
    from speculators.data_generation.prepared import InspectedRow

NUM_SHOWN = 5
"""Failed rows of `generate-offline-data` named one by one; all are in its result."""


def prepare_data(
    verifier: Annotated[str, typer.Option(help="Verifier: its tokenizer and chat template make the rows.")],
    data: Annotated[list[str], typer.Option(help="Conversations: file, directory, hf:<id> or preset. Repeatable.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")] = Path(DEFAULT_OUTPUT),
    seq_length: Annotated[
        int, typer.Option(min=2, help="Longest row, in tokens; longer ones are cut.")
    ] = DEFAULT_SEQ_LENGTH,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to keep. Default: all.")] = None,
    token_freq_path: Annotated[Path | None, typer.Option(help="Default: <output>/token_freq.pt.")] = None,
    seed: Annotated[int, typer.Option(help="Order of the rows.")] = DEFAULT_SEED,
    num_preprocessing_workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: chosen.")] = None,
    minimum_valid_tokens: Annotated[int | None, typer.Option(help="Drop rows with fewer trained tokens.")] = None,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="JSON object for the chat template.")] = None,
    drop_reasoning: Annotated[
        bool, typer.Option("--drop-reasoning", help="Train on answers whose reasoning the template leaves out.")
    ] = False,
    render_endpoint: Annotated[
        str | None,
        typer.Option(help="vLLM server, http://host:8000, started with --enable-scale-out: its rendering is compared."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace rows prepared differently.")] = False,
    allow_empty_output: Annotated[bool, typer.Option("--allow-empty-output", help="No row is not an error.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Turn conversations into tokenised training rows with loss masks, token frequencies and a manifest."""
    from speculators import data_generation

    prepared = data_generation.prepare_data(
        model=verifier,
        data=data,
        output=output,
        seq_length=seq_length,
        max_samples=limit,
        seed=seed,
        num_workers=num_preprocessing_workers,
        minimum_valid_tokens=minimum_valid_tokens,
        token_freq_path=token_freq_path,
        drop_reasoning=drop_reasoning,
        render_endpoint=render_endpoint,
        overwrite=overwrite,
        allow_empty_output=allow_empty_output,
        trust_remote_code=trust_remote_code,
        chat_template_kwargs=parse_json_object("--chat-template-kwargs", chat_template_kwargs),
        progress=True,
    )
    record: dict[str, Any] = {"verb": "prepare-data", "path": str(prepared.path), "reused": prepared.reused}
    manifest = prepared.manifest
    if manifest is not None:
        record |= {
            "num_rows": manifest.num_rows,
            "num_tokens": manifest.num_tokens,
            "longest_row": manifest.longest_row,
            "supervised_share": manifest.supervised_share,
            "dropped": manifest.dropped,
            "units": manifest.units,
            "num_without_reasoning": manifest.num_without_reasoning,
            "num_rendered_elsewhere": manifest.num_rendered_elsewhere,
        }
    training = ["speculators", "train", "--verifier", verifier, "--data", str(prepared.path)]
    return Result(record, [prepared], prepared.sentence(), training)


def inspect_mask(
    data: Annotated[str, typer.Argument(help="Prepared directory, or raw conversations (then with --verifier).")],
    verifier: Annotated[str | None, typer.Option(help="Verifier. Default: the one the directory was made for.")] = None,
    num_rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = DEFAULT_SHOWN_ROWS,
    first_row: Annotated[int, typer.Option(min=0, help="First row to show.")] = 0,
    seq_length: Annotated[int, typer.Option(min=2, help="For raw conversations: longest row.")] = DEFAULT_SEQ_LENGTH,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="JSON object for the chat template.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Show rows with the tokens that are trained on in green and the context dimmed."""
    from speculators import data_generation

    rows = data_generation.inspect_mask(
        data,
        model=verifier,
        num_rows=num_rows,
        first_row=first_row,
        seq_length=seq_length,
        trust_remote_code=trust_remote_code,
        chat_template_kwargs=parse_json_object("--chat-template-kwargs", chat_template_kwargs),
    )
    shown: list[RenderableType] = []
    for row in rows:
        title = f"row {row.index}: {row.num_supervised} of {row.num_tokens} tokens trained on"
        shown += [Rule(title), coloured(row)]
    counts = [{"index": row.index, "num_tokens": row.num_tokens, "num_supervised": row.num_supervised} for row in rows]
    num_tokens, num_supervised = sum(row.num_tokens for row in rows), sum(row.num_supervised for row in rows)
    sentence = f"{num_supervised:,} of {num_tokens:,} tokens in {len(rows)} rows are trained on"
    return Result({"verb": "inspect-mask", "rows": counts}, shown, sentence)


def coloured(row: InspectedRow) -> Text:
    """Without a terminal there are no colours: brackets mark the trained spans instead."""
    text = Text()
    for span in row.spans:
        if span.supervised:
            text.append("⟦", style="dim").append(visible(span.text), style="green").append("⟧", style="dim")
        else:
            text.append(visible(span.text), style="dim")
    return text


def generate_offline_data(
    data: Annotated[str, typer.Option(help="Prepared dataset (the output of prepare-data).")] = DEFAULT_OUTPUT,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Load the verifier here instead of asking a server.")
    ] = False,
    endpoint: Annotated[str, typer.Option(help="Server started by launch-vllm.")] = OfflineConfig.endpoint,
    server_states_path: Annotated[
        str, typer.Option(help="Directory that this server writes to: its --hidden-states-path.")
    ] = OfflineConfig.server_states_path,
    output: Annotated[str | None, typer.Option(help="Default: hidden_states in the prepared dataset.")] = None,
    verifier: Annotated[
        str | None,
        typer.Option(help="Only a check: what the server must serve. In process: the verifier. Default: the data's."),
    ] = None,
    target_layer_ids: Annotated[
        str | None,
        typer.Option(help="Layers, e.g. 2,6,9,12, the last layer at the end: of other servers, or in process."),
    ] = None,
    states_dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or fp8 (a scale per token). Default: as they come.")
    ] = None,
    last_states: Annotated[
        str, typer.Option(help="supervised: keep the last state only where a target is made of it. all: everywhere.")
    ] = OfflineConfig.last_states,
    shard_size: Annotated[str, typer.Option(help="Size of a file.")] = DEFAULT_SHARD_SIZE,
    max_disk: Annotated[
        str | None, typer.Option(help="Cap, e.g. 500GB: the oldest files make room for new ones. Default: none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows. Default: all.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = OfflineConfig.concurrency,
    validate_outputs: Annotated[
        bool, typer.Option("--validate-outputs", help="Read existing states in full; make damaged ones again.")
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
    dtype: Annotated[str, typer.Option(help="In process: precision of the verifier.")] = OfflineConfig.dtype,
    device: Device = OfflineConfig.device,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="In process: tokens of a forward. Default: by device.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Write what is missing; the same command continues a run that ended early."""
    from speculators import data_generation

    config = OfflineConfig(
        preprocessed_data=data,
        in_process=in_process,
        endpoint=endpoint,
        server_states_path=server_states_path,
        output=output,
        model=verifier,
        target_layer_ids=parse_layer_ids(target_layer_ids),
        states_dtype=states_dtype,
        last_states=last_states,
        shard_bytes=parse_bytes(shard_size),
        max_disk_bytes=None if max_disk is None else parse_bytes(max_disk),
        max_samples=limit,
        concurrency=concurrency,
        validate_outputs=validate_outputs,
        request_timeout_s=request_timeout,
        max_retries=max_retries,
        fail_on_error=fail_on_error,
        max_consecutive_errors=max_consecutive_errors,
        world_size=world_size,
        rank=rank,
        dtype=dtype,
        device=device,
        batch_tokens=batch_tokens,
        trust_remote_code=trust_remote_code,
    )
    report = data_generation.generate_offline_data(config, progress=True, note=say)
    for row, reason in list(report.failed.items())[:NUM_SHOWN]:
        say(f"row {row}: {reason}", "yellow")
    record = {
        "verb": "generate-offline-data",
        "directory": str(report.directory),
        "num_written": report.num_written,
        "num_tokens": report.num_tokens,
        "num_repaired": report.num_repaired,
        "num_kept": report.num_kept,
        "num_unfinished": report.num_unfinished,
        "num_bytes": report.num_bytes,
        "failed": {str(row): reason for row, reason in report.failed.items()},
    }
    return Result(record, [report], report.sentence())


def parse_layer_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise typer.BadParameter(f"--target-layer-ids {text}: numbers with commas, such as 2,6,9,12") from error


STORE_ACTIONS = ("info", "verify", "compact")


def store(
    action: Annotated[str, typer.Argument(help="info, verify or compact.")],
    states: Annotated[Path, typer.Argument(help="Prepared dataset, or its directory of hidden states.")],
    verifier: Annotated[str | None, typer.Option(help="To compute with. Default: the one recorded.")] = None,
    num_samples: Annotated[int, typer.Option(min=0, help="Samples computed anew by verify.")] = DEFAULT_RECOMPUTED,
    seed: Annotated[int, typer.Option(help="Which samples verify draws.")] = DEFAULT_SEED,
    device: Device = OfflineConfig.device,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Look after stored hidden states.

    info says what is stored; verify reads all of it and computes random samples anew; compact drops damaged and
    duplicate samples.
    """
    from speculators import data_generation

    if action not in STORE_ACTIONS:
        hint = did_you_mean(action, STORE_ACTIONS)
        raise ValueError(f"store {action}: no such action.{hint} Please give one of {', '.join(STORE_ACTIONS)}")
    if action == "info":
        report = data_generation.inspect_store(states)
        sentence = f"{report.num_samples + report.num_files:,} samples are stored"
    elif action == "compact":
        report = data_generation.compact_store(states, progress=True)
        sentence = f"{report.num_dropped:,} samples dropped"
    else:
        report = data_generation.verify_store(
            states,
            verifier=verifier,
            num_recomputed=num_samples,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=True,
        )
        sentence = f"{len(report.problems)} problems; {report.num_recomputed} samples computed anew"
    for problem in report.problems[:NUM_SHOWN]:
        say(problem, "yellow")
    code = 1 if action == "verify" and report.problems else 0
    return Result({"verb": "store", "action": action, **report.as_dict()}, [report], sentence, exit_code=code)
