"""Measures many cells in one call (data sets x draft tokens x temperatures x batch sizes), and goes on after a kill.

The output file is written after every cell, with the recipe that it was begun with: the same command measures the cells
that are missing, another one is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from speculators.data_generation.prepared import MANIFEST_NAME
from speculators.decoding.method import PLAIN, Method, parse_methods
from speculators.decoding.request_builder import usable_length
from speculators.decoding.target import DecodingTarget, VerifierSource, open_target
from speculators.evaluation.config import AXES, EvaluateConfig
from speculators.evaluation.prompts import NamedPrompts, load_prompt_set
from speculators.evaluation.records import Cell, MethodRow, environment
from speculators.evaluation.report import EvaluationReport, EvaluationStoppedError, load_result
from speculators.evaluation.run import measure_cell
from speculators.provenance import changed_settings, output_lock, package_versions, refuse_changes
from speculators.utils.files import read_json_object
from speculators.utils.progress import Progress, reporting, token_counter

logger = logging.getLogger(__name__)
MOST_POSITIONS = 1 << 30
"""More than any verifier has."""


@dataclass(frozen=True)
class PlannedCell:
    config: EvaluateConfig
    prompts: NamedPrompts
    methods: Sequence[Method]

    @property
    def cell(self) -> Cell:
        return Cell(
            dataset=self.prompts.name,
            num_speculative_tokens=self.config.num_speculative_tokens,
            temperature=self.config.temperature,
            batch_size=self.config.batch_size,
            num_threads=torch.get_num_threads(),
        )


def measure_methods(
    config: EvaluateConfig | Sequence[EvaluateConfig],
    verifier: VerifierSource,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool | Progress | None = None,
) -> EvaluationReport:
    """Measures every method of one cell, or of several (`config.cells_of`), and returns one report of all rows.

    `verifier`: what the configurations name, or the loaded model. `data`: what they name, or the rows that they name;
    for several data sets a mapping from name to either. `output`: JSON file of the report, written after each cell; one
    that the same call began is continued. `overwrite`: begun anew instead. Raises `ValueError` for a verifier, drafter
    or data set that cannot be read, for a verifier whose scores are not finite, and for an output of another call;
    `EvaluationStoppedError` on Ctrl-C, with the report of what was measured.
    """
    configs = [config] if isinstance(config, EvaluateConfig) else list(config)
    first = configs[0]
    path = None if output is None else Path(output)
    with nullcontext() if path is None else output_lock(Path(f"{path}.lock"), str(path), logger.warning):
        earlier = None if path is None or overwrite or not path.exists() else read_begun(path)
        target = open_target(
            verifier,
            tokenizer=tokenizer,
            dtype=first.dtype,
            device=first.device,
            trust_remote_code=first.trust_remote_code,
        )
        plan = planned_cells(configs, target, data if isinstance(data, Mapping) else {first.data: data})
        report = EvaluationReport(
            verifier=first.verifier,
            dataset=", ".join(dict.fromkeys(planned.prompts.name for planned in plan)),
            rows=(),
            settings=settings_of(configs, plan, target),
            environment=environment(),
            recipe={} if path is None else recipe_of(configs, plan, target),
        )
        if earlier is not None:
            report = continued(earlier, report, path)
        with threads_of(report):
            return measure_missing(report, plan, target, path, progress)


def measure_missing(
    report: EvaluationReport,
    plan: Sequence[PlannedCell],
    target: DecodingTarget,
    path: Path | None,
    progress: bool | Progress | None,
) -> EvaluationReport:
    """Measures the cells that the report does not hold, and saves it after each."""
    done = {cell.key for cell in report.cells}
    with reporting(progress) as show:
        for number, planned in enumerate(plan, start=1):
            if planned.cell.key in done:
                continue
            named = show if len(plan) == 1 else NumberedProgress(show, f"{number}/{len(plan)}")
            what = (planned.config, planned.methods, target, planned.prompts)
            try:
                measured = measure_cell(*what, named, token_counter(show))
            except KeyboardInterrupt as stop:
                if not report.cells:
                    raise
                raise EvaluationStoppedError(report) from stop
            added = replace(report, rows=(*report.rows, *map(with_training_rows, measured.rows)))
            if not measured.is_whole:
                of_cell = "" if len(plan) == 1 else f" of cell {number} of {len(plan)}"
                told = f"stopped after {measured.num_done} of {len(planned.prompts.all)} prompts{of_cell}"
                stopped = replace(added, interrupted=told)
                if path is not None:
                    stopped.save(path)
                raise EvaluationStoppedError(stopped)
            cells = (*report.cells, replace(planned.cell, time_s=measured.time_s, num_rows=len(measured.rows)))
            left = len(plan) - len(cells)
            unfinished = f"{len(cells)} of {len(plan)} cells are measured" if left else None
            report = replace(added, cells=cells, interrupted=unfinished)
            if path is not None:
                report.save(path)
    return report


class NumberedProgress:
    """Names the cell beside what is done."""

    def __init__(self, show: Progress, number: str) -> None:
        self.show, self.number = show, number

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.show(f"{what} {self.number}", done, total)


def planned_cells(
    configs: Sequence[EvaluateConfig], target: DecodingTarget, data: Mapping[str, Any]
) -> list[PlannedCell]:
    """Loads the prompts of each data set once, and gives each cell its methods. A method that says its number of draft
    tokens itself is the same in every cell that differs in that number alone: the first has it."""
    num_positions = usable_length(target.model, MOST_POSITIONS)
    most = num_positions - min(configs[0].max_tokens, num_positions // 2)
    prompts = {
        name: load_prompt_set(name, source, target.tokenizer, limit=configs[0].num_prompts).fitting(most)
        for name, source in data.items()
    }
    for name, number in Counter(of_set.name for of_set in prompts.values()).items():
        if number > 1:
            raise ValueError(f"two data sets are named {name!r}, so their rows look alike: measure one file per call")
    plan: list[PlannedCell] = []
    for config in configs:
        trees = {"speculative_token_tree": config.speculative_token_tree, "dynamic_tree": config.dynamic_tree}
        trees = {name: tree for name, tree in trees.items() if tree is not None}
        found = parse_methods(config.methods, config.num_speculative_tokens, trees)
        place = (config.data, config.temperature, config.batch_size)
        others = [
            other for other in plan if (other.config.data, other.config.temperature, other.config.batch_size) == place
        ]
        known = [method.speculative_config for other in others for method in other.methods]
        drafting = [m for m in found if m.speculative_config is not None and m.speculative_config not in known]
        if drafting or not others:
            plan.append(PlannedCell(config, prompts[config.data], [Method(PLAIN, None), *drafting]))
    return plan


def settings_of(
    configs: Sequence[EvaluateConfig], plan: Sequence[PlannedCell], target: DecodingTarget
) -> dict[str, Any]:
    """The settings of the one cell; where cells differ, the list of their values."""
    settings = asdict(configs[0])
    for axis in AXES:
        values = list(dict.fromkeys(getattr(config, axis) for config in configs))
        settings[axis] = values if len(values) > 1 else values[0]
    return settings | {
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "device": str(target.model.device),
        "speculative_configs": {m.name: m.speculative_config for planned in plan[::-1] for m in planned.methods},
    }


# -- going on with what was begun


def read_begun(path: Path) -> EvaluationReport:
    try:
        return load_result(path)
    except ValueError as error:
        raise ValueError(f"output {path} exists and is no result ({error}): name another --output") from error


def continued(earlier: EvaluationReport, now: EvaluationReport, path: Path | None) -> EvaluationReport:
    """The report that the file holds, without rows of a cell that was interrupted. Raises `ValueError` if it is of
    another recipe."""
    ways_out = "give the settings before to go on with it, name another --output, or measure anew with --overwrite"
    if not earlier.recipe:
        raise ValueError(f"output {path} is a result that does not say its recipe, of an earlier release: {ways_out}")
    refuse_changes(changed_settings(earlier.recipe, now.recipe), f"output {path}", ways_out)
    if earlier.interrupted is None:
        logger.warning("%s: measured already with these settings; --overwrite measures again", path)
        return earlier
    logger.warning("%s: going on, %d cells are measured", path, len(earlier.cells))
    return replace(earlier, rows=earlier.rows[: sum(cell.num_rows for cell in earlier.cells)])


def recipe_of(configs: Sequence[EvaluateConfig], plan: Sequence[PlannedCell], target: DecodingTarget) -> dict[str, Any]:
    """Everything that figures depend on and that a second call could change: settings, prompts, weights, versions."""
    settings = settings_of(configs, plan, target)
    drafters = {
        str(path): weights_sha256(Path(path))
        for config in settings["speculative_configs"].values()
        if (path := (config or {}).get("model")) and Path(path).is_dir()
    }
    return {
        "settings": settings,
        "prompts": {planned.prompts.name: planned.prompts.sha256[:16] for planned in plan},
        "verifier": sizes_of(Path(target.name)),
        "drafters": drafters,
        "versions": package_versions(),
        "num_cpus": os.cpu_count(),
    }


def weights_sha256(folder: Path) -> str:
    """Hashes what a drafter computes with."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def sizes_of(folder: Path) -> dict[str, int]:
    """File -> bytes: a verifier is too large to be hashed for each call."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def with_training_rows(row: MethodRow) -> MethodRow:
    """Adds how many rows the drafter was trained on, where its run and the prepared data are still there."""
    folder = Path(str((row.speculative_config or {}).get("model", ""))).resolve()
    try:
        data = yaml.safe_load((folder.parent / "run.yaml").read_text())["data"]["data_path"]
        return replace(row, training_rows=int(read_json_object(Path(data) / MANIFEST_NAME)["num_rows"]))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # of another project, or moved
        return row


@contextmanager
def threads_of(report: EvaluationReport) -> Iterator[None]:
    """Computes with as many threads as the cells before: their costs would not be comparable."""
    before, begun = torch.get_num_threads(), next((cell.num_threads for cell in report.cells), None)
    if begun is not None:
        torch.set_num_threads(begun)
    try:
        yield
    finally:
        torch.set_num_threads(before)
