"""Turns raw rows into training rows, in one or several processes, and counts why rows are dropped."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import httpx
import torch
from transformers import PreTrainedTokenizerBase

from speculators.data_generation.answering import as_openai
from speculators.data_generation.configs import TokenizeOptions, default_num_workers
from speculators.data_generation.conversations import BrokenTokenRow, FilteredRow, TokenRow, UnusableRow, parse_row
from speculators.data_generation.masks import (
    agrees_with_template,
    generation_start,
    last_assistant,
    merge_prefix_rows,
    turn_rows,
)
from speculators.data_generation.records import Outcome, Tokenized
from speculators.data_generation.vllm_client import (
    InvalidResponseError,
    TransientError,
    checked_json,
    describe,
    make_client,
    with_retries,
)
from speculators.utils.chat_template import TEMPLATE_DATE, ChatRenderer, ChatTemplateError, rename_reasoning

logger = logging.getLogger(__name__)

CHUNK_ROWS = 64
"""Raw rows per unit of work: small enough for a lively progress bar, large enough to hide the cost of passing them."""


class RowTokenizer:
    """Turns raw rows into training rows, in any process. Only conversations need a chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: TokenizeOptions,
        template_kwargs: Mapping[str, Any] | None = None,
        render_endpoint: str | None = None,
    ) -> None:
        """`render_endpoint`: vLLM server whose rendering of each conversation is compared with ours."""
        self.tokenizer = tokenizer
        self.options = options
        self.template_kwargs = template_kwargs
        self.render_endpoint = render_endpoint
        self.server: httpx.Client | None = None
        self.renderer: ChatRenderer | None = None

    def chunk(self, conversations: Iterable[Sequence[tuple[int, Any]]]) -> Tokenized:
        """Tokenises conversations, each a sequence of raw rows with their indices."""
        done = Tokenized()
        with nullcontext() if self.render_endpoint is None else make_render_client(self.render_endpoint) as self.server:
            for rows in conversations:
                done.outcomes.append([self.outcome(index, raw_row, done) for index, raw_row in rows])
        return done

    def outcome(self, index: int, raw_row: Any, done: Tokenized) -> Outcome:
        own_id = raw_row.get("id", raw_row.get("primary_id")) if isinstance(raw_row, Mapping) else None
        outcome = Outcome(index, None if own_id is None else str(own_id))
        try:
            rows = self.rows_of(raw_row, outcome, done)
        except FilteredRow as reason:
            outcome.problem = reason
            outcome.filtered = Counter({reason.reason: 1})
        except UnusableRow as problem:
            outcome.problem = problem
        except ChatTemplateError as refusal:
            outcome.problem = UnusableRow(str(refusal))
        else:
            outcome.rows = [row for row in rows if self.is_useful(row, outcome.filtered)]
        return outcome

    def rows_of(self, raw_row: Any, outcome: Outcome, done: Tokenized) -> list[TokenRow]:
        parsed = parse_row(raw_row, done.unknown_roles)
        if isinstance(parsed, TokenRow):
            outcome.num_turns = 1
            return [self.cut(parsed)]
        outcome.num_turns = sum(message["role"] == "assistant" for message in parsed.messages)
        if self.renderer is None:
            self.renderer = ChatRenderer(self.tokenizer, self.template_kwargs)
        found = turn_rows(parsed, self.renderer, self.options.seq_length)
        self.refuse_without_embedding(found.rows)
        outcome.filtered += found.filtered
        outcome.num_without_reasoning = found.num_without_reasoning
        if self.renderer.marks_generations and found.rows and not found.filtered:
            done.num_cross_checked += 1
            mask = self.renderer.generation_mask(parsed.messages[: last_assistant(parsed.messages) + 1], parsed.tools)
            done.num_disagreeing += not agrees_with_template(found.rows[-1], mask)
        if self.server is not None and found.rows and not found.filtered:
            messages = parsed.messages[: last_assistant(parsed.messages) + 1]
            problem = self.compare_with_server(messages, parsed.tools, found.rows[-1])
            done.num_rendered_elsewhere += 1
            done.rendered_otherwise += [f"row {outcome.index} (id {outcome.row_id}): {problem}"] if problem else []
        return merge_prefix_rows(found.rows) if self.options.merge_turns else found.rows

    def compare_with_server(self, messages: list[Any], tools: list[Any] | None, row: TokenRow) -> str | None:
        """Says where the row of the last answer differs from what the server renders; None: it does not."""
        assert self.renderer is not None
        template = self.renderer.template
        kwargs = {key: value for key, value in (self.template_kwargs or {}).items() if key != TEMPLATE_DATE}

        def rendered(num_messages: int, add_generation_prompt: bool) -> list[int]:
            sent = [as_openai(rename_reasoning(message, template)) for message in messages[:num_messages]]
            token_ids: list[int] = with_retries(render_conversation)(
                self.server, sent, add_generation_prompt=add_generation_prompt, tools=tools, chat_template_kwargs=kwargs
            )
            return token_ids

        num_earlier, start = len(messages) - 1, row.loss_mask.index(1)
        try:
            prompt, whole = rendered(num_earlier, True), rendered(len(messages), False)
            expected_start = generation_start(prompt, whole, lambda: rendered(num_earlier, False))
        except InvalidResponseError as refusal:
            return str(refusal)
        except UnusableRow:  # earlier turns are rendered differently once the answer follows: the prompt alone compares
            whole, expected_start = [*prompt, *row.input_ids[start:]], len(prompt)
        num_compared = min(len(whole), len(row.input_ids))  # cut at seq_length; with the token that ends a turn in GLM
        differing = next((i for i in range(num_compared) if row.input_ids[i] != whole[i]), None)
        if differing is not None:
            ours, theirs = (self.renderer.decode(ids[differing : differing + 12]) for ids in (row.input_ids, whole))
            return f"token {differing} begins {ours!r} here, {theirs!r} there"
        if start != expected_start:
            return f"the answer begins at token {start} here, at {expected_start} there"
        return None

    def cut(self, row: TokenRow) -> TokenRow:
        vocab_size = self.options.vocab_size
        if vocab_size is not None and row.input_ids and not 0 <= min(row.input_ids) <= max(row.input_ids) < vocab_size:
            raise BrokenTokenRow(
                "token ids are outside the verifier's vocabulary",
                f"{min(row.input_ids)}..{max(row.input_ids)} but the vocabulary is 0..{vocab_size - 1}; was the row "
                "tokenised for another model?",
            )
        return row.clipped(self.options.seq_length)

    def refuse_without_embedding(self, rows: Sequence[TokenRow]) -> None:
        """Raises `ValueError` for a token of the tokenizer that the verifier has no embedding for."""
        largest, vocab_size = max((max(row.input_ids) for row in rows), default=-1), self.options.vocab_size
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"the tokenizer writes token {largest} ({self.tokenizer.decode([largest])!r}) and has "
                f"{len(self.tokenizer)} tokens, but the verifier's embedding has {vocab_size} rows: use the tokenizer "
                "that belongs to this verifier, or give the verifier rows for it (resize_token_embeddings, then save)"
            )

    def is_useful(self, row: TokenRow, filtered: Counter[str]) -> bool:
        num_supervised = sum(row.loss_mask)
        if num_supervised == 0:
            filtered["no supervised token in the window"] += row.num_turns
        elif num_supervised < self.options.minimum_valid_tokens:
            filtered["fewer supervised tokens than minimum_valid_tokens"] += row.num_turns
        return num_supervised >= max(1, self.options.minimum_valid_tokens)


class RenderError(TransientError):
    """The server did not render; another attempt may find it in a better state."""


def render_conversation(
    endpoint: str | httpx.Client,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    truncate_prompt_tokens: int | None = None,
    truncation_side: str | None = None,
    timeout: float = 30.0,
) -> list[int]:
    """Asks a vLLM server (base URL without /v1, started with --enable-scale-out) for the tokens of a conversation.

    `timeout` in seconds. Raises `InvalidResponseError` for what it refuses, `RenderError` when it fails.
    """
    optional = {
        "tools": list(tools) if tools else None,
        "chat_template_kwargs": dict(chat_template_kwargs) if chat_template_kwargs else None,
        "truncate_prompt_tokens": truncate_prompt_tokens,
        "truncation_side": truncation_side,
    }
    request = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    request |= {key: value for key, value in optional.items() if value is not None}
    with make_render_client(endpoint) if isinstance(endpoint, str) else nullcontext(endpoint) as client:
        try:
            response = client.post("chat/completions/render", json=request, timeout=timeout)
            body = checked_json(response)
        except (httpx.TransportError, TransientError) as error:
            raise RenderError(describe(error), getattr(error, "retry_after_s", 0.0)) from error
    token_ids = body.get("token_ids")
    if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
        raise RenderError(f"{response.url} answered without token_ids: {str(body)[:200]}")
    return token_ids


def make_render_client(endpoint: str) -> httpx.Client:
    return make_client(f"{endpoint.rstrip('/').removesuffix('/v1')}/v1")


def tokenize_chunks(
    raw_rows: Any,
    conversations: Sequence[Sequence[int]],
    row_tokenizer: RowTokenizer,
    num_workers: int | None = None,
    max_rows: int | None = None,
) -> Iterator[Tokenized]:
    """Tokenises the conversations, given as indices into `raw_rows`, until there are `max_rows` training rows.

    Yields in their order for any number of processes.
    """
    num_rows = 0
    for done in tokenized(raw_rows, list(chunked(conversations)), row_tokenizer, num_workers):
        done.settle(None if max_rows is None else max_rows - num_rows)
        num_rows += len(done.rows)
        yield done
        if num_rows == max_rows:
            return


def tokenized(
    raw_rows: Any, chunks: Sequence[Sequence[Sequence[int]]], row_tokenizer: RowTokenizer, num_workers: int | None
) -> Iterator[Tokenized]:
    if num_workers is None:
        num_workers = default_num_workers(sum(len(rows) for chunk in chunks for rows in chunk))
    if num_workers <= 1:
        for chunk in chunks:
            yield row_tokenizer.chunk(read(raw_rows, chunk))
        return
    # fork: the rows and the tokenizer are inherited, not pickled, and scripts need no __main__ guard
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with context.Pool(num_workers, initializer=start_worker, initargs=(raw_rows, row_tokenizer)) as pool:
        yield from pool.imap(tokenize_in_worker, chunks)


def chunked(conversations: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Groups conversations into chunks of about `CHUNK_ROWS` rows."""
    chunk: list[Sequence[int]] = []
    for conversation in conversations:
        chunk.append(conversation)
        if sum(len(rows) for rows in chunk) >= CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def read(raw_rows: Any, conversations: Iterable[Sequence[int]]) -> Iterator[list[tuple[int, Any]]]:
    return ([(int(i), raw_rows[int(i)]) for i in rows] for rows in conversations)


WORKER: dict[str, Any] = {}


def start_worker(raw_rows: Any, row_tokenizer: RowTokenizer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one thread; forked thread pools would hang
    torch.set_num_threads(1)
    WORKER.update(raw_rows=raw_rows, row_tokenizer=row_tokenizer)


def tokenize_in_worker(chunk: Sequence[Sequence[int]]) -> Tokenized:
    done: Tokenized = WORKER["row_tokenizer"].chunk(read(WORKER["raw_rows"], chunk))
    return done


def warn_about(done: Tokenized) -> None:
    """Logs each unusual thing once, with its count."""
    for role, count in sorted(done.unknown_roles.items()):
        logger.warning("role %r is unknown; its %d turns were treated as the assistant's", role, count)
    for reason, count in done.dropped.most_common():
        logger.warning("left out %d: %s", count, reason)
    if done.num_cut_tokens:
        logger.warning(
            "%d rows are cut to the longest row (seq_length) and lose %d trained tokens",
            done.num_cut_rows,
            done.num_cut_tokens,
        )
    if done.num_without_reasoning:
        logger.warning("reasoning dropped by the template: %d rows", done.num_without_reasoning)
    if done.num_disagreeing:
        logger.warning(
            "in %d of %d conversations the mask starts elsewhere than the template's own {%% generation %%} block; "
            "look at some with inspect_mask",
            done.num_disagreeing,
            done.num_cross_checked,
        )
