"""`speculators inspect-mask`: rows as text, trained tokens in colour, so that a wrong mask is seen before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from speculators.cli.shared import TrustRemoteCode, out, parse_json_object
from speculators.data_generation.configs import DEFAULT_SEQ_LENGTH, DEFAULT_SHOWN_ROWS
from speculators.utils.report import visible

if TYPE_CHECKING:
    from speculators.data_generation.prepared import InspectedRow


def inspect_mask(
    data: Annotated[str, typer.Argument(help="Prepared directory, or raw conversations (then with --model).")],
    model: Annotated[str | None, typer.Option(help="Verifier. Default: the one the directory was made for.")] = None,
    num_rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = DEFAULT_SHOWN_ROWS,
    first_row: Annotated[int, typer.Option(min=0, help="First row to show.")] = 0,
    seq_length: Annotated[int, typer.Option(min=2, help="For raw conversations: longest row.")] = DEFAULT_SEQ_LENGTH,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="JSON object for the chat template.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> dict[str, Any]:
    """Show rows with the tokens that are trained on in green and the context dimmed."""
    from speculators import data_generation

    rows = data_generation.inspect_mask(
        data,
        model=model,
        num_rows=num_rows,
        first_row=first_row,
        seq_length=seq_length,
        trust_remote_code=trust_remote_code,
        chat_template_kwargs=parse_json_object("--chat-template-kwargs", chat_template_kwargs),
    )
    for row in rows:
        out().rule(f"row {row.index}: {row.num_supervised} of {row.num_tokens} tokens trained on")
        out().print(coloured(row))
    return {
        "verb": "inspect-mask",
        "rows": [
            {"index": row.index, "num_tokens": row.num_tokens, "num_supervised": row.num_supervised} for row in rows
        ],
    }


def coloured(row: InspectedRow) -> Text:
    """Without a terminal there are no colours: brackets mark the trained spans instead."""
    text = Text()
    for span in row.spans:
        if span.supervised:
            text.append("⟦", style="dim").append(visible(span.text), style="green").append("⟧", style="dim")
        else:
            text.append(visible(span.text), style="dim")
    return text
