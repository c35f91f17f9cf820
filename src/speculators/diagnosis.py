"""`sp.diagnose`: measures a drafter with its verifier and its data, and names why its drafts are not accepted.

    files -> check                              what differs from training
    prompts -> the verifier's answers           the text that it drafts for
        -> drafted and decoded              is what drafts what was trained; does it draft at all
        -> training forward, with probes    would other layers, rope, norms, options, weights be right more often
training rows -> the verifier's opinion     masks, whose words, draft vocabulary; known text against new text
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators import assets
from speculators.checkpoint.io import local_directory
from speculators.config import SpeculatorModelConfig
from speculators.data_generation.configs import is_prepared
from speculators.data_generation.prepared import PreparedData
from speculators.data_generation.rollout import load_prompts
from speculators.decoding.request_builder import usable_length
from speculators.decoding.target import DecodingTarget, VerifierSource, open_target
from speculators.deploy.check import check_checkpoint
from speculators.evaluation.config import DiagnoseConfig
from speculators.evaluation.diagnosis import INACTIVE, MISMATCH, Diagnosis, causes_of_check, ranked
from speculators.evaluation.diagnosis_drafter import Examination
from speculators.evaluation.diagnosis_probes import Rebuild
from speculators.evaluation.diagnosis_server import diagnose_server
from speculators.evaluation.diagnosis_texts import Row, Training
from speculators.evaluation.parity import recorded_num_tokens
from speculators.evaluation.server_check import inactive_causes
from speculators.losses.metrics import expected_acceptance_length
from speculators.model import SpeculatorModel
from speculators.train.checkpoint_files import METRICS_FILE
from speculators.train.checkpointer import CURVE_FILE
from speculators.train.events import DECODED
from speculators.train.keys import DataKeys
from speculators.train.logger import step_of
from speculators.train.validation import prompt_of
from speculators.training_keys import default_of
from speculators.utils.names import model_name, refuse_unknown
from speculators.utils.progress import Progress, no_progress_bars, reporting

MOST_PROMPT_TOKENS, MOST_ROW_TOKENS = 1024, 1024
"""Longer prompts lose their beginning, longer training rows their end."""
BETTER = 0.15
"""A checkpoint of the same run is better when its validation accepted so many tokens per round more."""
RUN_FILE = "run.yaml"


@no_progress_bars()
def diagnose(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    verifier: VerifierSource | None = None,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    server: str | None = None,
    plain_url: str | None = None,
    engine_config: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool | Progress = False,
    **settings: Any,
) -> Diagnosis:
    """Names why a drafter's tokens are not accepted: `report.causes`, the likeliest first, none where it is healthy.

    `checkpoint`: directory, hub id, or the result of training, export or conversion. `verifier`: None: the one that it
    names. `data`: prepared directories (the training text; None: the run's own) and conversations to draft for (None:
    the run's validation rows, else built-in ones). `engine_config`: an engine's speculative config, to see whether it
    drafts with this checkpoint at all. `server`: address of a running engine, which is then examined; `plain_url`: one
    of the same verifier without a drafter. `settings`: the fields of `DiagnoseConfig`.
    Raises `ValueError` for a checkpoint, verifier or data that cannot be read, and when neither checkpoint nor server
    is given; `ServerUnavailableError` when nothing answers there.
    """
    refuse_unknown("setting of diagnose", settings, [field.name for field in fields(DiagnoseConfig)])
    config = DiagnoseConfig(**settings)
    if checkpoint is None and server is None:
        raise ValueError("nothing to diagnose: name a checkpoint, or a running server (--server)")
    if plain_url is not None and server is None:
        raise ValueError(f"plain_url={plain_url!r} is compared with a server: name that one too (--server)")
    path = None if checkpoint is None else local_directory(checkpoint)
    given = [data] if isinstance(data, str | os.PathLike) else list(data or ())
    with reporting(progress) as show:
        if server is not None:
            return diagnose_running(path, verifier, given, server, plain_url, tokenizer, config, show)
        assert path is not None
        return diagnose_checkpoint(path, verifier, given, engine_config or {}, tokenizer, config, show)


def diagnose_running(
    path: Path | None,
    verifier: VerifierSource | None,
    data: Sequence[str | os.PathLike[str]],
    server: str,
    plain_url: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: DiagnoseConfig,
    show: Progress,
) -> Diagnosis:
    """Examines a running engine. The verifier is loaded too: its law is what the server's text is compared with."""
    name = recorded_verifier(path, verifier)
    if name is None and verifier is None:
        raise ValueError("the server's text is compared with its verifier's: name it with --verifier, or a checkpoint")
    target = opened(verifier or str(name), tokenizer, config)
    model = None if path is None else SpeculatorModel.from_pretrained(path, verifier=name, dtype=torch.float32)
    prompts = prompts_of(data, find_training(path, data), target, config)
    rebuilt = None if model is None else rebuilding(model, target)
    found = diagnose_server(server, plain_url, path, model, target, prompts.token_ids, rebuilt, config, show)
    if path is None or model is None or any(cause.rank <= MISMATCH for cause in found.causes):
        return found
    # it drafts as our engine does with this checkpoint, so what is wrong with the checkpoint is wrong with the server
    examination = begin(path, model, target, data, config)
    own = [*causes_of_check(check_checkpoint(path, verifier=name).findings), *examination.causes(show)]
    measured, not_examined = examination.measured | found.measured, examination.not_examined | found.not_examined
    return replace(found, causes=ranked([*found.causes, *own]), measured=measured, not_examined=not_examined)


def recorded_verifier(path: Path | None, verifier: VerifierSource | None) -> str | None:
    if verifier is not None:
        return model_name(verifier) or None
    return None if path is None else check_checkpoint(path).verifier


def opened(
    verifier: VerifierSource, tokenizer: PreTrainedTokenizerBase | None, config: DiagnoseConfig
) -> DecodingTarget:
    options = {} if isinstance(verifier, PreTrainedModel) else {"dtype": config.dtype, "device": config.device}
    return open_target(verifier, tokenizer=tokenizer, trust_remote_code=config.trust_remote_code, **options)


def diagnose_checkpoint(
    path: Path,
    verifier: VerifierSource | None,
    data: Sequence[str | os.PathLike[str]],
    engine_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    config: DiagnoseConfig,
    show: Progress,
) -> Diagnosis:
    show("checking the files", 0, None)
    report = check_checkpoint(path, verifier=None if verifier is None else model_name(verifier) or None)
    causes = [*causes_of_check(report.findings), *inactive_causes(path, engine_config, config)]
    found = Diagnosis(str(path), report.verifier, None, ranked(causes), {})
    if verifier is None and report.verifier is None:
        raise ValueError(f"{path} names no verifier; give it with --verifier")
    if any(cause.rank == INACTIVE for cause in causes):
        return replace(found, not_examined={"drafts": "nothing is drafted"})
    try:
        model = SpeculatorModel.from_pretrained(path, verifier=report.verifier, dtype=torch.float32)
        target = opened(verifier or str(report.verifier), tokenizer, config)
        examination = begin(path, model, target, data, config)
    except ValueError as problem:
        if not causes:
            raise
        return replace(found, not_examined={"drafts": str(problem)})
    causes += examination.causes(show)
    return replace(found, causes=ranked(causes), measured=examination.measured, not_examined=examination.not_examined)


def begin(
    path: Path,
    model: SpeculatorModel,
    target: DecodingTarget,
    data: Sequence[str | os.PathLike[str]],
    config: DiagnoseConfig,
) -> Examination:
    """Gathers everything that is examined."""
    model.to(target.model.device)  # type: ignore[arg-type]
    training = find_training(path, data)
    prompts = prompts_of(data, training, target, config)
    return Examination(
        model,
        target,
        prompts.token_ids,
        training.rows(config.num_rows),
        replace(training.known, from_split=prompts.from_split),
        config.num_speculative_tokens or recorded_num_tokens(model),
        config,
        rebuilding(model, target),
    )


def rebuilding(model: SpeculatorModel, target: DecodingTarget) -> Rebuild:
    """Returns what builds the drafter anew by another config, with its own weights."""
    verifier, weights = model.config.recorded_verifier, dict(model.state_dict())

    def rebuilt(changed: SpeculatorModelConfig) -> SpeculatorModel:
        options = {"config": changed, "state_dict": weights, "verifier": verifier, "dtype": torch.float32}
        other: SpeculatorModel = SpeculatorModel.from_pretrained(None, **options)
        return other.to(target.model.device)  # type: ignore[arg-type]

    return rebuilt


@dataclass(frozen=True)
class Prompts:
    token_ids: list[list[int]]
    from_split: bool
    """Of validation rows of the run."""


@dataclass(frozen=True)
class TrainingData:
    """The prepared rows of a run, as far as they are here."""

    prepared: PreparedData | None
    known: Training
    train_ratio: float

    def rows(self, num_rows: int) -> list[Row]:
        """Rows of the training split, evenly spaced."""
        if self.prepared is None:
            return []
        dataset = self.prepared.dataset()
        cut = max(int(len(dataset) * self.train_ratio), 1)
        indices = [i * cut // min(num_rows, cut) for i in range(min(num_rows, cut))]
        pairs = ((row["input_ids"].tolist(), row["loss_mask"].tolist()) for row in dataset.select(indices))
        return [(ids[:MOST_ROW_TOKENS], mask[:MOST_ROW_TOKENS]) for ids, mask in pairs]

    def validation_prompts(self, num_prompts: int) -> list[list[int]]:
        if self.prepared is None:
            return []
        dataset = self.prepared.dataset()
        cut = int(len(dataset) * self.train_ratio)
        rows = dataset.select(range(cut, min(cut + num_prompts, len(dataset))))
        return [prompt_of(row["input_ids"].tolist(), row["loss_mask"].tolist()) for row in rows]


def find_training(path: Path | None, data: Sequence[str | os.PathLike[str]]) -> TrainingData:
    """Finds the training rows, given or recorded by the run, and what its records say."""
    file = None if path is None else path.parent / RUN_FILE
    run = yaml.safe_load(file.read_text()) or {} if file is not None and file.is_file() else {}
    recorded = (run.get("data") or {}).get("data_path")
    sources = [*data, *([recorded] if recorded else [])]
    prepared = next((PreparedData.open(source) for source in sources if is_prepared(Path(source))), None)
    manifest = None if prepared is None else prepared.manifest
    metrics = None if path is None else path / METRICS_FILE
    validation = json.loads(metrics.read_text()) if metrics is not None and metrics.is_file() else None
    ratio = (run.get("data") or {}).get("train_data_ratio", default_of(DataKeys, "train_data_ratio"))
    num_rows = None if manifest is None else manifest.num_rows
    known = Training(
        num_rows=num_rows,
        num_supervised=None if manifest is None else manifest.num_supervised_tokens,
        longest=None if manifest is None else manifest.longest_row,
        validation=validation,
        num_validated=0 if num_rows is None else num_rows - int(num_rows * ratio),
        best=None if path is None else better_checkpoint(path, validation),
    )
    return TrainingData(prepared, known, ratio)


def metric_of(validation: Mapping[str, float]) -> float | None:
    """Tokens per round: decoded where that was measured."""
    return validation.get(DECODED) or expected_acceptance_length(validation)


def better_checkpoint(path: Path, validation: Mapping[str, float] | None) -> tuple[str, float, float] | None:
    """Finds the epoch of the run whose validation accepted clearly more than this checkpoint's."""
    own = None if validation is None else metric_of(validation)
    curve = path.parent / CURVE_FILE
    if own is None or not curve.is_file():
        return None
    lines = [json.loads(line) for line in curve.read_text().splitlines() if step_of(line)]
    lengths = {line["epoch"]: metric_of(line) or 0.0 for line in lines if line["split"] == "val"}
    best = max(lengths, key=lambda epoch: lengths[epoch], default=None)
    if best is None or lengths[best] - own < BETTER:
        return None
    folder = path.parent / str(best)
    return str(folder) if folder.is_dir() else f"epoch {best}", lengths[best], own


def prompts_of(
    data: Sequence[str | os.PathLike[str]], training: TrainingData, target: DecodingTarget, config: DiagnoseConfig
) -> Prompts:
    """Given prompts, else those of the run's validation rows, else built-in ones."""
    sources = [source for source in data if not is_prepared(Path(source))]
    found = [load_prompts(source, target.tokenizer, limit=config.num_prompts) for source in sources]
    held_out = [] if sources else training.validation_prompts(config.num_prompts)
    chosen = [prompt for prompts in found for prompt in prompts] or held_out
    chosen = chosen or load_prompts(assets.prompts_path("heldout"), target.tokenizer, limit=config.num_prompts)
    longest = max(usable_length(target.model, MOST_PROMPT_TOKENS + config.max_tokens) - config.max_tokens, 1)
    return Prompts([list(prompt)[-longest:] for prompt in chosen], bool(held_out))
