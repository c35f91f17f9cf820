"""Regenerates responses: the verifier answers the prompts itself, so that a drafter learns the text it will see.

    <output>.jsonl          one row per answer, pre-tokenised: prepare-data reads the file unchanged
    <output>.errors.jsonl   conversations that failed; a resumed run tries them again
    <output>.quarantine.jsonl   bad rows: file, line, id, reason
    <output>.recipe.json    verifier, template and sampling; a run with others does not complete the file

Conversations are written in the order of the source, each as a whole after its last answer. A resumed run skips those
whose last turn is written, answers the others again from their own seeds, and so ends in the same file.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from speculators.data_generation.answering import Ended, Mix, RolloutBatches, refuse_equal_samples
from speculators.data_generation.configs import RegenerateConfig
from speculators.data_generation.conversations import FilteredRow, UnusableRow
from speculators.data_generation.datasets import RawRows, load_raw_dataset
from speculators.data_generation.records import (
    Finished,
    finished_conversations,
    json_line,
    open_recipe,
    template_date,
    template_sha256,
    tokenizer_sha256,
)
from speculators.data_generation.rollout import Generate, Provenance, Rollout, make_rollout
from speculators.utils.chat_template import ChatRenderer
from speculators.utils.files import absolute_if_directory, atomic_write
from speculators.utils.progress import Progress, reporting
from speculators.utils.report import PathReport, WorkFailedError, facts_table

logger = logging.getLogger(__name__)


@dataclass
class RegenerationReport(PathReport):
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
    num_from_text: int = 0
    """Answers that a server gave as text, and that were tokenised here."""
    num_already_done: int = 0
    num_failed: int = 0
    first_error: str = ""
    num_non_finite: int = 0
    """Answers that ended because the verifier's scores were not finite; their conversations failed."""
    num_read: int = 0
    """Conversations of the source; a prompt that is answered several times counts as several."""
    num_filtered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows of the source that could not be answered."""
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    """The bad rows: file, line, id, reason."""
    prompts: str = ""
    """The shape in which prompts were recognised, and the first of them."""

    def check(self) -> None:
        ended = self.num_conversations + self.num_already_done + self.num_failed
        assert self.num_read == ended + len(self.quarantine) + self.num_filtered, f"{self} does not add up"

    def tables(self) -> list[Table]:
        from_text = f", {self.num_from_text:,} tokenised from text" if self.num_from_text else ""
        facts = {
            "file": self.path,
            "prompts": self.prompts or "none",
            "conversations": f"{self.num_conversations:,}, and {self.num_already_done:,} of an earlier run",
            "answers": f"{self.num_rows:,} of {self.num_tokens:,} tokens, {self.num_cut:,} cut at the limit{from_text}",
            "failed": f"{self.num_failed:,}",
            "left out": "; ".join(f"{count} x {reason}" for reason, count in self.dropped.items()) or "nothing",
        }
        return [facts_table("Regenerated", facts)]

    def sentence(self) -> str:
        return f"{self.num_conversations:,} conversations answered, {self.num_failed:,} failed"

    def raise_for_errors(self) -> None:
        """Raises `WorkFailedError` when the verifier is damaged: the rows that it did answer are doubtful."""
        if self.num_non_finite:
            raise WorkFailedError(
                f"the verifier's scores were not finite in {self.num_non_finite} answers: see {self.errors_path}"
            )

    def reasons(self) -> str:
        """Lists why conversations gave no row, for a message."""
        reasons = [f"{num_dropped} x {reason}" for reason, num_dropped in self.dropped.most_common(5)]
        if self.num_failed:
            reasons.append(f"{self.num_failed} failed, the first by {self.first_error} (see {self.errors_path})")
        return "; ".join(reasons) or "no conversation to answer"


def regenerate_responses(
    conversations: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    generate: Generate,
    *,
    output: str | os.PathLike[str],
    verifier: str | None = None,
    threaded: bool = False,
    max_prompt_tokens: int | None = None,
    stop_token_ids: Collection[int] | None = None,
    endpoint: str = "in-process",
    sampling_params: Mapping[str, Any] | None = None,
    max_consecutive_errors: int = 8,
    progress: bool | Progress | None = None,
    **settings: Any,
) -> RegenerationReport:
    """Answers every user turn of `conversations` (rows, or a source for `load_raw_dataset`) with `generate`.

    Answers `batch_size` conversations together, turn by turn, or, `threaded`, calls `generate` from that many threads,
    a conversation in each. `max_prompt_tokens`: conversations end before a longer prompt. `verifier` (its name),
    `endpoint` and `sampling_params` are only recorded. `settings`: the fields of `RegenerateConfig`.
    Raises `ValueError` for a setting that does not exist, a wrong or used `output` (.jsonl), one of another recipe, or
    no answer; the error of `generate` after `max_consecutive_errors` in sequence.
    """
    config, path, sampling_params = RegenerateConfig(**settings), Path(output), dict(sampling_params or {})
    mix = Mix(tuple(config.temperatures), tuple(config.system_prompts), sampling_params.get("seed"))
    refuse_equal_samples(config.num_samples, mix, sampling_params)
    refuse_output(path, config.resume)
    rows = load_raw_dataset(conversations)
    report = RegenerationReport(path, path.with_suffix(".errors.jsonl"))
    stop_ids = {tokenizer.eos_token_id} if stop_token_ids is None else set(stop_token_ids)
    template_kwargs = config.chat_template_kwargs
    answering = RolloutBatches(
        tokenizer=tokenizer,
        generate=generate,
        provenance=Provenance(endpoint, sampling_params, stop_ids, config.drop_reasoning),
        max_prompt_tokens=max_prompt_tokens,
        max_consecutive_errors=max_consecutive_errors,
        renderer=ChatRenderer(tokenizer, template_kwargs) if getattr(tokenizer, "chat_template", None) else None,
    )
    recipe = {
        "verifier": None if verifier is None else absolute_if_directory(verifier),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": template_sha256(tokenizer),
        "chat_template_kwargs": dict(template_kwargs or {}),
        "template_date": template_date(tokenizer, template_kwargs),
        "sampling_params": sampling_params,
        "temperatures": list(config.temperatures),
        "system_prompts": list(config.system_prompts),
        "drop_reasoning": config.drop_reasoning,
        "stop_token_ids": sorted(stop_ids),
        "max_prompt_tokens": max_prompt_tokens,
    }
    open_recipe(path, recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = len(rows) if config.limit is None else min(config.limit, len(rows))
    unanswered = rollouts(rows, num_rows, config, mix, finished_conversations(path), report)
    answered = answering.at_once if threaded else answering.in_batches
    write_answers(report, answered(unanswered, config.batch_size), num_rows, progress)
    if report.quarantine and path.exists():
        with atomic_write(path.with_suffix(".quarantine.jsonl")) as quarantine:
            quarantine.writelines(map(json_line, report.quarantine))
    report.check()
    warn_about(report)
    if report.num_rows == 0 and report.num_already_done == 0:
        raise WorkFailedError(f"nothing was answered: {num_rows} rows in {rows.name}, {report.reasons()}")
    return report


def refuse_output(path: Path, resume: bool) -> None:
    """Raises `ValueError` for a file that cannot hold the rows, and for one that is to be kept."""
    if path.suffix != ".jsonl":
        raise ValueError(f"output {str(path)!r} must end in .jsonl: it holds one row per line")
    if path.exists() and not resume:
        raise ValueError(f"{str(path)!r} exists; pass resume (--resume) to complete it, or choose another output")


def write_answers(
    report: RegenerationReport, ended: Iterable[Ended], num_rows: int, progress: bool | Progress | None
) -> None:
    """Appends the rows of each conversation as a whole, in order; the failed go into the file of errors."""
    path = report.path
    try:
        with (
            reporting(progress) as show,
            path.open("a", encoding="utf-8") as written,
            report.errors_path.open("w", encoding="utf-8") as errors,
        ):
            show("regenerate", 0, num_rows)
            for rollout, error in ended:
                if error is None:
                    written.write("".join(json_line(row) for row in rollout.answers))
                    written.flush()
                    count(report, rollout)
                else:
                    report.num_failed += 1
                    report.first_error = report.first_error or str(error)
                    errors.write(json_line(failure(rollout, error)))
                    errors.flush()
                show("regenerate", rollout.index + 1, num_rows)
    finally:
        for file in (path, report.errors_path):
            if file.exists() and file.stat().st_size == 0:
                file.unlink()
        if not path.exists():
            path.with_suffix(".recipe.json").unlink(missing_ok=True)


def rollouts(
    rows: RawRows, num_rows: int, config: RegenerateConfig, mix: Mix, finished: Finished, report: RegenerationReport
) -> Iterator[Rollout]:
    """Yields the conversations that still need answers; counts the others in the report.

    An id is the row's own, else a hash of what it asks. Raises `ValueError` when a finished id asked something else.
    """
    preset_field = None if rows.config is None else rows.config.prompt_field
    seen: Counter[str] = Counter()
    for index in range(num_rows):
        row = rows[index]
        try:
            first = make_rollout(index, row, "", config.prompt_field, preset_field)
        except UnusableRow as reason:
            report.num_read += 1
            report.num_filtered += isinstance(reason, FilteredRow)
            report.dropped[reason.reason] += 1
            if not isinstance(reason, FilteredRow):
                own_id = row.get("id") if isinstance(row, Mapping) else None
                report.quarantine.append({**rows.place(index), "id": own_id, "reason": str(reason)})
            continue
        if not report.prompts:
            report.prompts = first.example()
            logger.warning("%s: %s", rows.name, report.prompts)
        report.num_read += config.num_samples
        own_id = row.get("id") if isinstance(row, Mapping) else None
        primary_id = first.content_sha256[:16] if own_id is None else str(own_id)
        seen[primary_id] += 1
        if seen[primary_id] > 1:
            primary_id = f"{primary_id}-{seen[primary_id] - 1}"
        for sample in range(config.num_samples):
            content = finished.get((primary_id, sample))
            if content is None:
                yield mix.start(first, primary_id, sample)
            elif content == first.content_sha256:
                report.num_already_done += 1
            else:
                raise ValueError(
                    f"row {index} of {rows.name} has the id {primary_id!r}, under which {report.path} holds the answer "
                    "to another prompt; give each prompt an id of its own, or choose another output"
                )


def count(report: RegenerationReport, rollout: Rollout) -> None:
    report.num_conversations += 1
    report.num_rows += len(rollout.answers)
    for row in rollout.answers:
        report.num_tokens += row["metadata"]["usage"]["completion_tokens"]
        report.num_cut += row["metadata"]["finish_reason"] == "length"
        report.num_from_text += row["metadata"].get("tokenised_from_text", False)


def failure(rollout: Rollout, error: Exception) -> dict[str, Any]:
    return {"primary_id": rollout.primary_id, "idx": rollout.index, "error": f"{type(error).__name__}: {error}"}


def warn_about(report: RegenerationReport) -> None:
    for reason, num_dropped in report.dropped.most_common():
        logger.warning("left out %d: %s", num_dropped, reason)
    if report.num_failed:
        logger.warning("%d conversations failed; see %s", report.num_failed, report.errors_path)
    if report.num_from_text:
        logger.warning(
            "%d answers came as text, so the verifier may have written other tokens of it; vLLM gives the tokens",
            report.num_from_text,
        )
    if report.num_cut:
        logger.warning("%d of %d answers were cut at the length limit", report.num_cut, report.num_rows)
