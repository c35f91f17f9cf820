"""`Cause` and `Diagnosis`: why drafts are not accepted, with the numbers that say so and the way out; and `Accuracy`,
how often the drafts of a training forward are right, which most causes are judged by.

Shapes: N texts, K draft positions, T tokens, H hidden size, A aux layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from speculators.checkpoint.findings import SUSPECT_WARNINGS, Finding, fault_of
from speculators.evaluation.records import environment
from speculators.evaluation.report import SavedReport
from speculators.evaluation.statistics import Estimate, bootstrap
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.model import SpeculatorModel
from speculators.utils.quantized import is_on_grid
from speculators.utils.report import facts_table, shown, visible
from speculators.verifier import capture_states, decoder_of, verifier_parts

Evidence = Mapping[str, Any]

INACTIVE, FAULTY, MISMATCH, DATA, FIT = range(5)
"""Ranks of causes. What nothing can be accepted with comes first, then what a probe or the record of training proves,
then training and serving that differ, then the text that was trained on, then how well the drafter fits new text."""


@dataclass(frozen=True)
class Cause:
    """One reason for a low acceptance."""

    name: str
    """Short and stable: scripts may compare it."""
    sentence: str
    evidence: Evidence
    fix: str
    rank: int
    strength: float = 0.0
    """Orders causes of one rank: tokens per round that are lost, or how far beyond its limit the evidence is."""

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "sentence": self.sentence, "evidence": dict(self.evidence), "fix": self.fix}


@dataclass(frozen=True)
class Diagnosis(SavedReport):
    """The causes, the likeliest first; none for a healthy drafter."""

    checkpoint: str | None
    verifier: str | None
    server: str | None
    causes: tuple[Cause, ...]
    measured: dict[str, Any]
    """What was measured, whether or not it speaks for a cause."""
    not_examined: dict[str, str] = field(default_factory=dict)
    """What could not be examined, and why."""

    @property
    def healthy(self) -> bool:
        return not self.causes

    @property
    def first(self) -> str | None:
        """Name of the likeliest cause."""
        return self.causes[0].name if self.causes else None

    def tables(self) -> list[Table]:
        facts = {name: shown(value) for name, value in self.measured.items()}
        facts |= {f"not examined: {what}": why for what, why in self.not_examined.items()}
        tables = [facts_table("Measured", facts)]
        for number, cause in enumerate(self.causes, start=1):
            evidence = {name: shown(value) for name, value in cause.evidence.items()}
            title = escape(visible(f"{number}. {cause.name}"))
            tables.append(facts_table(title, {"cause": cause.sentence, **evidence, "way out": cause.fix}))
        return tables

    def sentence(self) -> str:
        if not self.causes:
            return "nothing found"
        first, *others = self.causes
        more = f"; further: {', '.join(cause.name for cause in others)}" if others else ""
        return f"{first.name}: {first.sentence}{more}"

    def to_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "causes": [cause.as_dict() for cause in self.causes], "healthy": self.healthy}
        return {**values, "environment": environment()}


def ranked(causes: Iterable[Cause]) -> tuple[Cause, ...]:
    """Sorts causes, the likeliest first, and joins those of one name: their evidence is of one thing."""
    by_name: dict[str, Cause] = {}
    for cause in causes:
        known = by_name.get(cause.name)
        if known is None:
            by_name[cause.name] = cause
            continue
        better, other = sorted((known, cause), key=order)
        joined = {**other.evidence, **better.evidence}
        by_name[cause.name] = replace(better, evidence=joined, strength=max(better.strength, other.strength))
    return tuple(sorted(by_name.values(), key=order))


def order(cause: Cause) -> tuple[int, float]:
    return cause.rank, -cause.strength


# -- how often drafts are right

STEP = re.compile(r"full_acc_(\d+)_(sum|total)")


@dataclass(frozen=True)
class Text:
    """One text, and what the verifier computed over it."""

    token_ids_T: Tensor
    supervised_T: Tensor
    """bool: tokens that the verifier is taken to have written."""
    stream_by_id: Mapping[int, Tensor]
    """Aux layer id -> [T, H]."""
    last_hidden_TH: Tensor

    def states(self, layer_ids: Sequence[int]) -> VerifierStates:
        aux_TD = torch.cat([self.stream_by_id[i] for i in layer_ids], -1) if layer_ids else None
        return VerifierStates(self.token_ids_T, aux_TD, self.last_hidden_TH)

    def only(self, kept_T: Tensor) -> Text:
        """The same text, supervised only where `kept_T` is true."""
        return Text(self.token_ids_T, self.supervised_T & kept_T, self.stream_by_id, self.last_hidden_TH)


@torch.no_grad()
def read_texts(
    verifier: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], layer_ids: Sequence[int]
) -> list[Text]:
    """Runs the verifier over (token ids, loss mask) pairs and keeps the given layers."""
    spec = CaptureSpec(tuple(sorted(set(layer_ids))), last_hidden=True)
    decoder = decoder_of(verifier)
    texts = []
    for token_ids, mask in rows:
        token_ids_T = torch.tensor(list(token_ids), device=verifier.device)
        with capture_states(verifier, spec) as states:
            decoder(input_ids=token_ids_T[None], use_cache=False)
        assert states.last_hidden is not None
        streams = {i: states.stream_by_id[i][0].float() for i in spec.aux_layer_ids}
        supervised_T = torch.tensor(list(mask), device=verifier.device).bool()
        texts.append(Text(token_ids_T, supervised_T, streams, states.last_hidden[0].float()))
    return texts


@dataclass(frozen=True)
class Accuracy:
    """How often the drafts of the training forward are the verifier's choice, up to and including each position."""

    right_NK: np.ndarray
    judged_NK: np.ndarray
    loss_N: np.ndarray
    """Training loss of each text. It moves with settings that hardly change which token is likeliest."""

    @property
    def by_position(self) -> list[float]:
        return [float(x) for x in self.right_NK.sum(0) / np.maximum(self.judged_NK.sum(0), 1)]

    @property
    def acceptance_length(self) -> float:
        """Tokens per round where every draft is made after true states."""
        return 1.0 + sum(self.by_position)

    @property
    def num_judged(self) -> int:
        return int(self.judged_NK[:, 0].sum()) if self.judged_NK.size else 0

    @property
    def loss(self) -> float:
        return float((self.loss_N * self.judged_NK[:, 0]).sum() / max(self.num_judged, 1))

    def saved_from(self, other: Accuracy) -> Estimate:
        """Share of the other's loss that this one saves, texts resampled in pairs."""
        num_N = self.judged_NK[:, 0]
        sums = {"own": self.loss_N * num_N, "other": other.loss_N * num_N}
        return bootstrap(sums, lambda sums: 1 - sums["own"] / np.maximum(sums["other"], 1e-9))


@torch.no_grad()
def measure(model: SpeculatorModel, texts: Sequence[Text], layer_ids: Sequence[int]) -> Accuracy | None:
    """Runs the training forward over each text. None: the algorithm reports no accuracy by position."""
    parts = [measure_together(model, [text], layer_ids) for text in texts]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or not found:
        return None
    columns = ("right_NK", "judged_NK", "loss_N")
    return Accuracy(*(np.concatenate([getattr(part, name) for part in found]) for name in columns))


@torch.no_grad()
def measure_together(model: SpeculatorModel, texts: Sequence[Text], layer_ids: Sequence[int]) -> Accuracy | None:
    """The same over one packed row: a single forward, and one number for all texts."""
    rows = [model.training_row(text.states(layer_ids), text.supervised_T.long()) for text in texts]
    for number, row in enumerate(rows):
        row["document_ids"] = torch.full_like(row["document_ids"], number)
    packed = {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}
    metrics = model(**packed, **type(model).get_trainer_kwargs()[1])[2]
    found = {(int(m[1]), m[2]): float(value) for name, value in metrics.items() if (m := STEP.fullmatch(name))}
    depth = 1 + max((k for k, _ in found), default=-1)
    if not depth:
        return None
    right_NK, judged_NK = (np.array([[found[k, part] for k in range(depth)]]) for part in ("sum", "total"))
    loss = metrics["loss_sum"] / max(float(metrics["loss_total"]), 1.0) if "loss_sum" in metrics else metrics["loss"]
    return Accuracy(right_NK, judged_NK, np.array([float(loss)]))


SURELY_FEWER = 0.97
"""Known text is easier than new text, so less than this share of the drafts that were right on new text is a change."""


def changed_cause(
    on_known: Accuracy,
    validation: Mapping[str, float],
    repaired: Iterable[Accuracy | None],
    not_its: str | None,
    *,
    rounded: bool,
) -> Cause | None:
    """Whether the drafter is right less often on its own training text than validation once recorded of text that it
    had never seen. `repaired`: with each probe that helps. `not_its`: what is not this verifier's."""
    recorded = [validation.get(f"full_acc_{k}") for k in range(len(on_known.by_position))]
    once = sum(share for share in recorded if share is not None)
    now = None if None in recorded else fewer_right(on_known, once)
    if now is None or any(found is not None and fewer_right(found, once) is None for found in repaired):
        return None  # as it was; or that setting brings it back
    fix = "take weights and config.json from where it was trained"
    evidence: dict[str, Any] = {
        "drafts right per round, training text": f"{now.value:.2f} ({now.low:.2f} to {now.high:.2f})",
        "drafts right per round, validation, as recorded": once,
    }
    if not_its is not None:
        name, strength = "quantised-target" if rounded else "verifier", 2 * CERTAIN  # copies that differ are a sign
        fix = "use the verifier of training, or train a drafter for this one"
        which = "its layers are rounded to 4 bits, which training's were not, or it is" if rounded else "it was"
        why = f"and {not_its} is not this verifier's: {which} another model, or has other weights or precision since"
    else:
        name, strength = "changed-since-training", CERTAIN / 2
        why = "weights or settings were changed since, which no probe brings back"
    sentence = f"{now.value:.2f} drafts right per round on its own training text, {once:.2f} in validation when saved"
    return Cause(name, f"{sentence}: {why}", evidence, fix, FAULTY, strength)


def fewer_right(found: Accuracy, once: float) -> Estimate | None:
    """Drafts right per round, where that is surely less than it once was."""
    depth = range(found.right_NK.shape[1])  # of which an algorithm may judge fewer tokens the deeper they are
    parts = {"right": found.right_NK, "judged": found.judged_NK}
    counts = {f"{name}_{k}": part_NK[:, k] for name, part_NK in parts.items() for k in depth}
    now = bootstrap(counts, lambda sums: sum(sums[f"right_{k}"] / np.maximum(sums[f"judged_{k}"], 1) for k in depth))
    return now if now.high < SURELY_FEWER * once else None


ROUNDED = 0.01
"""Relative distance of a copied embedding that saving in bfloat16 does not leave."""


def is_other_embedding(model: SpeculatorModel, verifier: PreTrainedModel) -> bool:
    """Whether the drafter's embedding, where it is a copy, is another one than this verifier's."""
    own_VH = dict(model.named_parameters()).get("embed_tokens.weight")
    theirs_VH = cast("Tensor", verifier.get_input_embeddings().weight)
    if own_VH is None or own_VH.shape != theirs_VH.shape or getattr(model.config, "embed_requires_grad", False):
        return False
    return float((own_VH - theirs_VH).norm() / theirs_VH.norm()) > ROUNDED


def is_rounded(verifier: PreTrainedModel) -> bool:
    """Whether most matrices of its layers hold values of a coarse grid, whatever its files say."""
    matrices = [weight for weight in verifier_parts(verifier).layers.parameters() if weight.ndim > 1]
    return sum(map(is_on_grid, matrices)) > len(matrices) / 2


# -- what the check of the checkpoint found, as causes

CERTAIN = 10.0
"""Strength of an error of the check: it needs no measurement."""


def causes_of_check(findings: Iterable[Finding]) -> list[Cause]:
    """Returns what is wrong with the files: errors, and warnings about weights that differ from those in training."""
    causes = []
    for found in findings:
        if found.severity == "error" or found.code in SUSPECT_WARNINGS:
            evidence = {f"check {found.code}": f"{found.where}: {found.found}; {found.rule}"}
            sentence = f"{found.where}: {found.found}; {found.rule}"
            causes.append(Cause(fault_of(found), sentence, evidence, found.fix, FAULTY, CERTAIN))
    return causes
