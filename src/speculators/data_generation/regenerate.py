"""Regenerates responses: the verifier answers the prompts itself, so that a drafter learns the text it will see.

    <output>.jsonl          one row per answer, pre-tokenised: prepare-data reads the file unchanged
    <output>.errors.jsonl   conversations that failed; a resumed run tries them again

A conversation is written as a whole after its last answer: a resumed run skips what is written and repeats nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from speculators.data_generation.configs import DEFAULT_ANSWERED_TOGETHER
from speculators.data_generation.conversations import UnusableRow
from speculators.data_generation.datasets import RawRows, load_raw_dataset
from speculators.data_generation.rollout import Provenance, Rollout, make_rollout
from speculators.utils.chat_template import ChatRenderer, ChatTemplateError
from speculators.utils.progress import Progress, reporting
from speculators.utils.report import TableReport, facts_table

logger = logging.getLogger(__name__)

Generate = Callable[[list[list[int]]], list[list[int]]]
"""Takes prompts (token ids), returns the generated tokens (without prompt, with end token) in the same order."""


@dataclass
class RegenerationReport(TableReport, os.PathLike[str]):
    """Counts what a regeneration wrote; accepted wherever a path of data is."""

    path: Path
    errors_path: Path
    num_conversations: int = 0
    """Conversations answered in this run."""
    num_rows: int = 0
    num_tokens: int = 0
    """Generated tokens."""
    num_cut: int = 0
    """Answers cut at the length limit."""
    num_already_done: int = 0
    num_failed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows of the source that could not be answered."""

    def __fspath__(self) -> str:
        return str(self.path)

    def tables(self) -> list[Table]:
        facts = {
            "file": self.path,
            "conversations": f"{self.num_conversations:,}, and {self.num_already_done:,} of an earlier run",
            "answers": f"{self.num_rows:,} of {self.num_tokens:,} tokens, {self.num_cut:,} cut at the limit",
            "failed": f"{self.num_failed:,}",
            "left out": "; ".join(f"{count} x {reason}" for reason, count in self.dropped.items()) or "nothing",
        }
        return [facts_table("Regenerated", facts)]

    def reasons(self) -> str:
        """Lists why conversations gave no row, for a message."""
        reasons = [f"{num_dropped} x {reason}" for reason, num_dropped in self.dropped.most_common(5)]
        if self.num_failed:
            reasons.append(f"{self.num_failed} failed (see {self.errors_path})")
        return "; ".join(reasons) or "no conversation to answer"


def regenerate_responses(
    conversations: str | os.PathLike[str] | Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    generate: Generate,
    *,
    output: str | os.PathLike[str],
    limit: int | None = None,
    batch_size: int = DEFAULT_ANSWERED_TOGETHER,
    max_prompt_tokens: int | None = None,
    resume: bool = False,
    stop_token_ids: Collection[int] | None = None,
    endpoint: str = "in-process",
    sampling_params: Mapping[str, Any] | None = None,
    max_consecutive_errors: int = 8,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool | Progress | None = None,
) -> RegenerationReport:
    """Answers every user turn of `conversations` (rows, or a source for `load_raw_dataset`) with `generate`.

    Answers `batch_size` conversations together, turn by turn. `limit`: most conversations. `max_prompt_tokens`:
    conversations end before a longer prompt. `resume` completes an existing `output` (a .jsonl file). `endpoint` and
    `sampling_params` are only recorded in the rows. Raises `ValueError` for a wrong or existing `output` and when
    nothing was answered; raises the error of `generate` after `max_consecutive_errors` failures in sequence.
    """
    path = Path(output)
    if path.suffix != ".jsonl":
        raise ValueError(f"output {str(path)!r} must end in .jsonl: it holds one row per line")
    if path.exists() and not resume:
        raise ValueError(f"{str(path)!r} exists; pass resume (--resume) to complete it, or choose another output")
    rows = load_raw_dataset(conversations)
    report = RegenerationReport(path, path.with_suffix(".errors.jsonl"))
    stop_ids = {tokenizer.eos_token_id} if stop_token_ids is None else set(stop_token_ids)
    answering = RolloutBatches(
        tokenizer=tokenizer,
        generate=generate,
        provenance=Provenance(endpoint, sampling_params or {}, stop_ids),
        max_prompt_tokens=max_prompt_tokens,
        max_consecutive_errors=max_consecutive_errors,
        renderer=ChatRenderer(tokenizer, chat_template_kwargs) if getattr(tokenizer, "chat_template", None) else None,
    )
    already_done = finished_ids(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = len(rows) if limit is None else min(limit, len(rows))
    unanswered = rollouts(rows, num_rows, already_done, report)
    try:
        with (
            reporting(progress) as show,
            path.open("a", encoding="utf-8") as written,
            report.errors_path.open("w", encoding="utf-8") as errors,
        ):
            for batch in batches(unanswered, batch_size):
                for rollout, error in answering.answer(batch):
                    if error is None:
                        written.write("".join(json_line(row) for row in rollout.answers))
                        written.flush()
                        count(report, rollout)
                    else:
                        report.num_failed += 1
                        errors.write(json_line(failure(rollout, error)))
                        errors.flush()
                show("regenerate", batch[-1].index + 1, num_rows)
    finally:
        for file in (path, report.errors_path):
            if file.exists() and file.stat().st_size == 0:
                file.unlink()
    warn_about(report)
    if report.num_rows == 0 and report.num_already_done == 0:
        raise ValueError(f"nothing was answered: {num_rows} rows in {rows.name}, {report.reasons()}")
    return report


@dataclass
class RolloutBatches:
    """Answers batches of rollouts turn by turn until each conversation is over."""

    tokenizer: PreTrainedTokenizerBase
    generate: Generate
    provenance: Provenance
    max_prompt_tokens: int | None
    max_consecutive_errors: int
    renderer: ChatRenderer | None
    num_consecutive_errors: int = 0

    def answer(self, batch: Sequence[Rollout]) -> Iterator[tuple[Rollout, Exception | None]]:
        """Yields each rollout as soon as it is over, with the error that ended it or None."""
        waiting = list(batch)
        while waiting:
            asked: list[tuple[Rollout, list[int]]] = []
            for rollout in waiting:
                try:
                    prompt = self.prompt_of(rollout)
                except (UnusableRow, ChatTemplateError) as error:
                    yield rollout, error
                    continue
                if prompt is None:
                    yield rollout, None
                else:
                    asked.append((rollout, prompt))
            waiting = []
            for (rollout, prompt), answer in zip(asked, self.ask([prompt for _, prompt in asked]), strict=True):
                try:
                    if isinstance(answer, Exception):
                        raise answer
                    rollout.accept(prompt, answer, self.tokenizer, self.provenance)
                except Exception as error:  # whatever the caller's generate raised for this prompt
                    yield rollout, error
                else:
                    waiting.append(rollout)

    def prompt_of(self, rollout: Rollout) -> list[int] | None:
        """Returns the next prompt; None when the conversation is over. Raises `UnusableRow` when it has no answer."""
        if self.renderer is None and rollout.prompt_ids is None:
            self.renderer = ChatRenderer(self.tokenizer)  # raises: the tokenizer has no template
        prompt = rollout.next_prompt(self.renderer)
        if prompt is None and not rollout.answers:
            raise UnusableRow("no turn of this conversation needs an answer")
        if prompt is None or self.max_prompt_tokens is None or len(prompt) <= self.max_prompt_tokens:
            return prompt
        if rollout.answers:
            return None  # the conversation outgrew the window: its answers so far are kept
        raise UnusableRow(f"prompt of {len(prompt)} tokens is longer than max_prompt_tokens={self.max_prompt_tokens}")

    def ask(self, prompts: list[list[int]]) -> list[list[int] | Exception]:
        """Generates answers; if the whole batch fails, tries each prompt alone, so one bad prompt costs one row."""
        if not prompts:
            return []
        try:
            answers: list[list[int] | Exception] = list(self.generate(prompts))
        except Exception as error:
            if len(prompts) == 1:
                return [self.failed(error)]
            logger.warning("a batch of %d prompts failed (%s); trying each prompt alone", len(prompts), error)
            return [self.ask([prompt])[0] for prompt in prompts]
        if len(answers) != len(prompts):
            raise ValueError(f"generate returned {len(answers)} answers for {len(prompts)} prompts; one each is needed")
        self.num_consecutive_errors = 0
        return answers

    def failed(self, error: Exception) -> Exception:
        """Returns the error as an answer; raises it after so many in sequence that the verifier must be gone."""
        self.num_consecutive_errors += 1
        if self.num_consecutive_errors >= self.max_consecutive_errors:
            raise error
        return error


def rollouts(
    rows: RawRows, num_rows: int, already_done: Collection[str], report: RegenerationReport
) -> Iterator[Rollout]:
    """Yields the conversations that still need answers; counts the others in the report."""
    prompt_field = None if rows.config is None else rows.config.prompt_field
    seen: set[str] = set()
    for index in range(num_rows):
        row = rows[index]
        primary_id = str(row["id"]) if isinstance(row, Mapping) and row.get("id") is not None else str(index)
        if primary_id in seen:
            primary_id = f"{primary_id}-{index}"
        seen.add(primary_id)
        if primary_id in already_done:
            report.num_already_done += 1
            continue
        try:
            yield make_rollout(index, row, primary_id, prompt_field)
        except UnusableRow as reason:
            report.dropped[str(reason)] += 1


def finished_ids(path: Path) -> set[str]:
    """Returns the conversations that an earlier run wrote; removes a last line that was cut off in writing.

    Raises `ValueError` for a line that regeneration did not write.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    finished = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            finished.add(str(json.loads(line)["primary_id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {str(path)!r} is not a regenerated row ({error}); remove it or choose another output"
            ) from error
    return finished


def batches(items: Iterator[Rollout], size: int) -> Iterator[list[Rollout]]:
    batch: list[Rollout] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def count(report: RegenerationReport, rollout: Rollout) -> None:
    report.num_conversations += 1
    report.num_rows += len(rollout.answers)
    for row in rollout.answers:
        report.num_tokens += row["metadata"]["usage"]["completion_tokens"]
        report.num_cut += row["metadata"]["finish_reason"] == "length"


def failure(rollout: Rollout, error: Exception) -> dict[str, Any]:
    return {"primary_id": rollout.primary_id, "idx": rollout.index, "error": f"{type(error).__name__}: {error}"}


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def warn_about(report: RegenerationReport) -> None:
    for reason, num_dropped in report.dropped.most_common():
        logger.warning("left out %d: %s", num_dropped, reason)
    if report.num_failed:
        logger.warning("%d conversations failed; see %s", report.num_failed, report.errors_path)
    if report.num_cut:
        logger.warning("%d of %d answers were cut at the length limit", report.num_cut, report.num_rows)
