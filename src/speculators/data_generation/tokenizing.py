"""Turns raw rows into training rows, in one or several processes, and counts why rows are dropped. The loss mask says
which tokens of a conversation the verifier wrote; it is made with a tokenizer's own chat template.

The boundary of an assistant turn j is found by rendering, never by searching for marker strings:

    P = tokens(messages[:j]     with the generation prompt)     ... <user> hi <assistant>
    F = tokens(messages[:j + 1] without it)                     ... <user> hi <assistant> hello <end>
    loss mask                                                       0    0    0           1     1

One row per assistant turn, because that is what the verifier saw: templates drop earlier reasoning, so the rows of
one conversation need not be prefixes of each other.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from speculators.data_generation.conversations import Conversation, TokenRow, UnusableRow, parse_row
from speculators.utils.chat_template import ChatRenderer, ChatTemplateError

CHUNK_ROWS = 64
"""Raw rows per unit of work: small enough for a lively progress bar, large enough to hide the cost of passing them."""
ROWS_WORTH_A_WORKER = 2000
"""Below this many raw rows another process costs more than it saves."""


@dataclass(frozen=True)
class MaskSpan:
    """A run of tokens that are all supervised, or all context."""

    start: int
    stop: int
    supervised: bool
    text: str


@dataclass
class TurnRows:
    """The rows of one conversation, and why some of its turns gave no row."""

    rows: list[TokenRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def turn_rows(conversation: Conversation, renderer: ChatRenderer, max_length: int) -> TurnRows:
    """Makes one row per assistant turn that follows another turn, clipped to `max_length` tokens.

    Raises `UnusableRow` when a boundary cannot be found.
    """
    found = TurnRows()
    messages, tools = conversation.messages, conversation.tools
    for j, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if j == 0:
            found.dropped["opening assistant turn (context only)"] += 1
            continue
        prompt = renderer.token_ids(messages[:j], tools, add_generation_prompt=True)
        if len(prompt) >= max_length:
            found.dropped["turn's prompt fills the whole window (seq_length)"] += 1
            continue
        full = renderer.token_ids(messages[: j + 1], tools, add_generation_prompt=False)[:max_length]
        context = partial(renderer.token_ids, messages[:j], tools, add_generation_prompt=False)
        start = generation_start(prompt, full, context)
        found.rows.append(TokenRow(full, [0] * start + [1] * (len(full) - start)))
    return found


def generation_start(prompt: Sequence[int], full: Sequence[int], context: Callable[[], list[int]]) -> int:
    """Finds the index of the first token that the verifier wrote.

    `context()` returns the tokens of the earlier messages without generation prompt. The full text need not start with
    the prompt: a generation prompt may open a reasoning block that the rendered answer lacks, or a merge of the
    tokenizer may span the boundary. Then the end of their common prefix is the boundary, provided that it contains all
    earlier messages. Raises `UnusableRow` otherwise.
    """
    if list(full[: len(prompt)]) == list(prompt):
        return len(prompt)
    shared = common_prefix_length(prompt, full)
    context_ids = context()
    if len(context_ids) <= shared and list(full[: len(context_ids)]) == list(context_ids):
        return shared
    raise UnusableRow("the template renders earlier turns differently once the answer follows (no boundary)")


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def merge_prefix_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Joins a row into the next one of the conversation where it is a prefix of it: same states, fewer tokens."""
    merged: list[TokenRow] = []
    for row in rows:
        previous = merged[-1] if merged else None
        if previous is not None and row.input_ids[: len(previous.input_ids)] == previous.input_ids:
            mask = previous.loss_mask + row.loss_mask[len(previous.loss_mask) :]
            merged[-1] = TokenRow(row.input_ids, mask)
        else:
            merged.append(row)
    return merged


def agrees_with_template(row: TokenRow, generation_mask: Sequence[int]) -> bool:
    """Says whether our boundary is where the template's own {% generation %} block of the last turn starts.

    Compares only the start: blocks differ in whether they include the end-of-turn marker.
    """
    start = row.loss_mask.index(1)
    mask = list(generation_mask[: len(row.input_ids)])
    return mask[start] == 1 and (start == 0 or mask[start - 1] == 0)


def mask_spans(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]
) -> list[MaskSpan]:
    """Splits the row into runs of supervised and context text, for printing in two colours."""
    spans: list[MaskSpan] = []
    ids, mask = [int(token) for token in input_ids], [bool(bit) for bit in loss_mask]
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or mask[stop] != mask[start]:
            text = str(tokenizer.decode(ids[start:stop], skip_special_tokens=False))
            spans.append(MaskSpan(start, stop, mask[start], text))
            start = stop
    return spans


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeOptions:
    """Settings that decide how a raw row becomes training rows."""

    seq_length: int
    minimum_valid_tokens: int = 1
    """Rows with fewer supervised tokens in the window are dropped."""
    vocab_size: int | None = None
    """Pre-tokenised ids must be below it; None = not known."""
    merge_turns: bool = False
    """One row for several turns of a conversation where the earlier row is a prefix of the later one."""

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise ValueError(f"seq_length={self.seq_length}; a row needs a context token and a supervised one: >= 2")
        if self.minimum_valid_tokens < 0:
            raise ValueError(f"minimum_valid_tokens={self.minimum_valid_tokens} is negative; 1 or more is useful")


@dataclass
class Tokenized:
    """Training rows, and counts of what happened to the raw ones."""

    rows: list[TokenRow] = field(default_factory=list)
    num_read: int = 0
    """Raw rows read."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of raw rows or turns that gave no training row."""
    unknown_roles: Counter[str] = field(default_factory=Counter)
    num_cross_checked: int = 0
    """Rows whose boundary could be compared with the template's own {% generation %} blocks."""
    num_disagreeing: int = 0

    def add(self, other: Tokenized) -> None:
        self.rows += other.rows
        self.add_counts(other)

    def add_counts(self, other: Tokenized) -> None:
        self.num_read += other.num_read
        self.dropped += other.dropped
        self.unknown_roles += other.unknown_roles
        self.num_cross_checked += other.num_cross_checked
        self.num_disagreeing += other.num_disagreeing


class RowTokenizer:
    """Turns raw rows into training rows, in any process. Only conversations need a chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: TokenizeOptions,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.template_kwargs = template_kwargs
        self.renderer: ChatRenderer | None = None

    def chunk(self, raw_rows: Iterable[Any]) -> Tokenized:
        done = Tokenized()
        for raw_row in raw_rows:
            done.num_read += 1
            try:
                rows = self.rows_of(raw_row, done)
            except (UnusableRow, ChatTemplateError) as reason:
                done.dropped[str(reason)] += 1
                continue
            done.rows += [row for row in rows if self.is_useful(row, done.dropped)]
        return done

    def rows_of(self, raw_row: Any, done: Tokenized) -> list[TokenRow]:
        parsed = parse_row(raw_row, done.unknown_roles)
        if isinstance(parsed, TokenRow):
            return [self.cut(parsed)]
        if self.renderer is None:
            self.renderer = ChatRenderer(self.tokenizer, self.template_kwargs)
        found = turn_rows(parsed, self.renderer, self.options.seq_length)
        done.dropped += found.dropped
        if self.renderer.marks_generations and found.rows and not found.dropped:
            done.num_cross_checked += 1
            last_assistant = max(j for j, message in enumerate(parsed.messages) if message["role"] == "assistant")
            mask = self.renderer.generation_mask(parsed.messages[: last_assistant + 1], parsed.tools)
            done.num_disagreeing += not agrees_with_template(found.rows[-1], mask)
        return merge_prefix_rows(found.rows) if self.options.merge_turns else found.rows

    def cut(self, row: TokenRow) -> TokenRow:
        vocab_size = self.options.vocab_size
        if vocab_size is not None and row.input_ids and not 0 <= min(row.input_ids) <= max(row.input_ids) < vocab_size:
            raise ValueError(
                f"a pre-tokenised row has token ids {min(row.input_ids)}..{max(row.input_ids)} but the verifier's "
                f"vocabulary is 0..{vocab_size - 1}; was it tokenised for another model?"
            )
        return TokenRow(row.input_ids[: self.options.seq_length], row.loss_mask[: self.options.seq_length])

    def is_useful(self, row: TokenRow, dropped: Counter[str]) -> bool:
        num_supervised = sum(row.loss_mask)
        if num_supervised == 0:
            dropped["no supervised token in the window"] += 1
        elif num_supervised < self.options.minimum_valid_tokens:
            dropped["fewer supervised tokens than minimum_valid_tokens"] += 1
        return num_supervised >= max(1, self.options.minimum_valid_tokens)


def default_num_workers(num_rows: int) -> int:
    auto = max(1, min(128, math.floor(0.75 * (os.cpu_count() or 1)) // 4))
    return max(1, min(auto, num_rows // ROWS_WORTH_A_WORKER))


def tokenize_chunks(
    raw_rows: Any, order: Sequence[int], row_tokenizer: RowTokenizer, num_workers: int | None = None
) -> Iterator[Tokenized]:
    """Tokenises `raw_rows[i] for i in order` chunk by chunk; yields in that order for any number of processes."""
    chunks = [order[start : start + CHUNK_ROWS] for start in range(0, len(order), CHUNK_ROWS)]
    if num_workers is None:
        num_workers = default_num_workers(len(order))
    if num_workers <= 1:
        for chunk in chunks:
            yield row_tokenizer.chunk(raw_rows[int(i)] for i in chunk)
        return
    # fork: the rows and the tokenizer are inherited, not pickled, and scripts need no __main__ guard
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with context.Pool(num_workers, initializer=start_worker, initargs=(raw_rows, row_tokenizer)) as pool:
        yield from pool.imap(tokenize_in_worker, chunks)


WORKER: dict[str, Any] = {}


def start_worker(raw_rows: Any, row_tokenizer: RowTokenizer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one thread; forked thread pools would hang
    torch.set_num_threads(1)
    WORKER.update(raw_rows=raw_rows, row_tokenizer=row_tokenizer)


def tokenize_in_worker(chunk: Sequence[int]) -> Tokenized:
    done: Tokenized = WORKER["row_tokenizer"].chunk(WORKER["raw_rows"][int(i)] for i in chunk)
    return done


def warn_about(done: Tokenized) -> None:
    """Logs each unusual thing once, with its count."""
    for role, count in sorted(done.unknown_roles.items()):
        logger.warning("role %r is unknown; its %d turns were treated as the assistant's", role, count)
    for reason, count in done.dropped.most_common():
        logger.warning("dropped %d: %s", count, reason)
    if done.num_disagreeing:
        logger.warning(
            "in %d of %d conversations the mask starts elsewhere than the template's own {%% generation %%} block; "
            "look at some with inspect_mask",
            done.num_disagreeing,
            done.num_cross_checked,
        )
