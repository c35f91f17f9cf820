"""The text that a drafter was trained on and the text that it drafts for: masks, whose words they are, what the draft
vocabulary leaves out, and how much worse the drafter does on new text.

Shapes: N texts, T tokens, V verifier vocabulary.

The verifier's own words are told from others' by their surprise. Of a text that it sampled at temperature 1 the mean of
-log p(token) is the mean entropy of p; of its greedy text it is less; of anybody else's it is more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators.data_generation.masks import offset_of, opening_of, places_after, supervised_spans
from speculators.evaluation.diagnosis import DATA, FIT, MISMATCH, Accuracy, Cause, Text
from speculators.evaluation.statistics import Estimate, bootstrap
from speculators.utils.chat_template import ChatRenderer
from speculators.verifier.capture import logits_from_last_hidden

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids and their loss mask."""

MOST_MISPLACED = 0.5
"""Share of supervised spans that may begin elsewhere than where the template lets the verifier begin."""
LEAST_SUPERVISED = 0.01
OFF_POLICY_NATS = 0.2
"""Surprise per token beyond the verifier's entropy from which on a text is taken for somebody else's."""
GREEDY = 0.95
"""Share of tokens that are the verifier's likeliest, from which on a text is taken for its greedy one."""
TRAINING_TEXT, OUTSIDE = "the training text", "likeliest tokens outside"
HOLES = 0.05
"""Share of the verifier's likeliest tokens that may be outside the draft vocabulary: surely more is a cause."""
GAP = 0.25
"""Accuracy of the first draft on known text beyond that on new text, which says that the text was learnt by heart."""
FEW_ROWS = 5
"""Validation rows below which their accuracy says little."""
WEAK_ON_KNOWN = 0.5
"""Accuracy of the first draft on its own training text below which a drafter has not learnt it."""
FALLS = 0.75
"""A drafter that keeps less than this share of its accepted drafts in other conditions is out of its own."""
BEYOND = 0.2
"""Share of the tokens that must be beyond the trained length to judge them."""


# -- masks


def mask_cause(rows: Sequence[Row], renderer: ChatRenderer, end_ids: Collection[int]) -> Cause | None:
    """Compares where supervised spans begin and end with where the chat template lets the verifier begin and end."""
    opening, offsets, num_overrun, num_spans = opening_of(renderer), Counter[str](), 0, 0
    for ids, mask in rows:
        starts = places_after(opening, ids)
        for start, stop in supervised_spans(mask):
            num_spans += 1
            offsets[offset_of(start, starts)] += 1
            num_overrun += any(token in end_ids for token in list(ids)[start : stop - 1])
    num_tokens = sum(len(mask) for _, mask in rows)
    share = sum(sum(map(bool, mask)) for _, mask in rows) / max(num_tokens, 1)
    evidence = {
        "supervised share": share,
        "spans begin at an answer": f"{offsets['0']} of {num_spans}",
        "spans that begin elsewhere, by tokens from the next answer": {k: n for k, n in offsets.items() if k != "0"},
        "spans that run past an end of turn": f"{num_overrun} of {num_spans}",
    }
    misplaced = 1 - offsets["0"] / max(num_spans, 1)
    if share < LEAST_SUPERVISED:
        sentence = f"only {share:.1%} of the training tokens are supervised"
    elif opening and misplaced > MOST_MISPLACED:
        sentence = f"{misplaced:.0%} of the supervised spans begin where no answer of the verifier begins"
    elif num_overrun > MOST_MISPLACED * num_spans:
        sentence = f"{num_overrun} of {num_spans} supervised spans run past the end of the answer"
    else:
        return None
    fix = "look at the rows with inspect-mask, then prepare the data again with the verifier's own chat template"
    return Cause("mask", sentence, evidence, fix, DATA, 10.0)


# -- what the verifier says to a text


@dataclass(frozen=True)
class Judged:
    """The verifier's opinion of the supervised tokens of each text: sums over tokens, one number per text."""

    num_N: np.ndarray
    surprise_N: np.ndarray
    """-log p of the tokens."""
    entropy_N: np.ndarray
    likeliest_N: np.ndarray
    """Tokens that are the verifier's likeliest."""
    top_prob_N: np.ndarray
    """p of the likeliest token."""
    mass_outside_N: np.ndarray
    """Probability of tokens that the drafter cannot draft."""
    likeliest_outside_N: np.ndarray

    def mean(self, name: str) -> float:
        return float(getattr(self, f"{name}_N").sum() / max(self.num_N.sum(), 1))

    def excess(self) -> Estimate:
        """Surprise beyond the entropy, in nats per token."""
        counts = {"surprise": self.surprise_N, "entropy": self.entropy_N, "num": self.num_N}
        return bootstrap(counts, lambda sums: (sums["surprise"] - sums["entropy"]) / np.maximum(sums["num"], 1))

    def outside(self) -> Estimate:
        """Share of the verifier's likeliest tokens that the drafter cannot draft."""
        counts = {"outside": self.likeliest_outside_N, "num": self.num_N}
        return bootstrap(counts, lambda sums: sums["outside"] / np.maximum(sums["num"], 1))


@torch.no_grad()
def judge(verifier: PreTrainedModel, texts: Sequence[Text], kept_V: Tensor | None, temperature: float = 1.0) -> Judged:
    """Asks the verifier about every supervised token. `kept_V`: bool, the draft vocabulary; None: the whole."""
    sums = []
    dtype = next(verifier.parameters()).dtype
    for text in texts:
        at_T = text.supervised_T.clone()
        at_T[0] = False
        rows_RV = logits_from_last_hidden(verifier, text.last_hidden_TH[:-1][at_T[1:]].to(dtype)[None])[0].float()
        log_p_RV = (rows_RV / temperature).log_softmax(-1)
        probs_RV, tokens_R = log_p_RV.exp(), text.token_ids_T[at_T]
        best_R = rows_RV.argmax(-1)
        outside_V = None if kept_V is None else ~kept_V.to(rows_RV.device)
        sums.append(
            [
                len(tokens_R),
                -float(log_p_RV.gather(1, tokens_R[:, None]).sum()),
                -float((probs_RV * log_p_RV.nan_to_num(neginf=0.0)).sum()),
                int((best_R == tokens_R).sum()),
                float(probs_RV.amax(-1).sum()) if len(probs_RV) else 0.0,
                0.0 if outside_V is None else float(probs_RV[:, outside_V].sum()),
                0 if outside_V is None else int(outside_V[best_R].sum()),
            ]
        )
    return Judged(*np.array(sums, dtype=np.float64).reshape(-1, 7).T)


def policy_cause(judged: Judged) -> Cause | None:
    """Whether the training text was written by somebody else than the verifier."""
    excess = judged.excess()
    if excess.low <= OFF_POLICY_NATS:
        return None
    prob = float(np.exp(-judged.mean("surprise")))
    agreement = judged.mean("likeliest")
    sentence = f"the training answers are not the verifier's: it would choose {agreement:.0%} of their tokens"
    evidence = {
        "the verifier's probability of a training token (geometric mean)": prob,
        "training tokens that are its likeliest": agreement,
        "surprise beyond its entropy, nats per token": f"{excess.value:.2f} ({excess.low:.2f} to {excess.high:.2f})",
        "of its own text": "0 when sampled, below 0 when greedy",
    }
    fix = "let the verifier answer the prompts itself (speculators regenerate-responses), then train on that"
    return Cause("off-policy", sentence, evidence, fix, DATA, excess.value / OFF_POLICY_NATS)


def vocabulary_cause(judged: Mapping[str, Judged], held_out: Accuracy, fitting: Sequence[Cause]) -> Cause | None:
    """Whether the draft vocabulary lacks tokens that the verifier often chooses, by data set. `fitting`: other causes
    of wrong first drafts; where one explains more of them than the holes do, the holes come after it."""
    shares = {name: found.mean("likeliest_outside") for name, found in judged.items() if found.num_N.sum()}
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is None or judged[worst].outside().low <= HOLES:
        return None
    masses = {name: judged[name].mean("mass_outside") for name in shares}
    sentence = f"{shares[worst]:.0%} of what the verifier says in {worst} is outside the draft vocabulary"
    evidence = {
        OUTSIDE: shares,
        "probability outside": masses,
        "first drafts right": held_out.by_position[0],
        "at most": 1 - shares[worst],
    }
    fix = "train with a larger --draft-vocab-size, or on text of this domain: the vocabulary is its frequent tokens"
    others = max((cause.strength * GAP - shares[worst] for cause in fitting), default=0.0)
    rank, limit = (FIT, GAP) if others > shares[worst] else (DATA, HOLES)
    return Cause("vocabulary-holes", sentence, evidence, fix, rank, shares[worst] / limit)


def outside_of_training(cause: Cause) -> float:
    """Share of the verifier's likeliest tokens in the training text for which a cause has holes."""
    return float(cause.evidence.get(OUTSIDE, {}).get(TRAINING_TEXT, 0.0))


# -- known text and new text


@dataclass(frozen=True)
class Training:
    """What is known of the run that made a checkpoint."""

    num_rows: int | None = None
    num_supervised: int | None = None
    longest: int | None = None
    """Tokens of the longest training row."""
    validation: Mapping[str, float] | None = None
    """Metrics of this checkpoint's validation."""
    num_validated: int = 0
    """Rows of the validation."""
    best: tuple[str, float, float] | None = None
    """(name, its acceptance length in validation, this one's) of a clearly better checkpoint of the run."""
    from_split: bool = False
    """The new text is of the run's own validation rows."""


def fit_causes(known: Accuracy | None, new: Accuracy, training: Training) -> list[Cause]:
    """Compares the accuracy on training text, in validation and on the verifier's new answers."""
    validated = (training.validation or {}).get("full_acc_0")
    on_new, on_known = new.by_position[0], None if known is None else known.by_position[0]
    evidence: dict[str, Any] = {
        "first draft right, training text": on_known,
        "first draft right, validation": validated,
        "first draft right, new answers": on_new,
        "training rows": training.num_rows,
        "supervised tokens": training.num_supervised,
    }
    evidence = {name: value for name, value in evidence.items() if value is not None}
    causes = []
    if training.best is not None:
        name, best, own = training.best
        sentence = f"trained too long: {name} reached {best:.2f} tokens per round in validation, this one {own:.2f}"
        fix = f"use {name}, or train for fewer epochs, or on more text"
        causes.append(Cause("overfitted", sentence, evidence, fix, FIT, 1 + (best - own) / GAP))
    if on_known is not None and on_known - on_new > GAP and surely_apart(known, new):
        causes.append(generalisation_cause(on_known, on_new, training, evidence))
    if on_known is not None and on_known < WEAK_ON_KNOWN and not causes:
        sentence = f"it has not learnt its training text: {on_known:.0%} of first drafts right there"
        fix = "train longer, or with a larger learning rate; look at the curve in metrics.jsonl"
        causes.append(Cause("undertrained", sentence, evidence, fix, FIT, WEAK_ON_KNOWN - on_known))
    return causes


def generalisation_cause(on_known: float, on_new: float, training: Training, evidence: Mapping[str, Any]) -> Cause:
    """Says where the accuracy fell: from known text to validation, or from validation to these prompts."""
    strength = (on_known - on_new) / GAP
    is_told = training.num_validated >= FEW_ROWS and not training.from_split
    validated = (training.validation or {}).get("full_acc_0") if is_told else None
    if validated is not None and validated - on_new > max(on_known - validated, GAP / 2):
        sentence = f"the prompts are unlike the training text: {validated:.0%} of first drafts right in validation, "
        fix = "train on prompts of the kind that it will serve, answered by the verifier"
        return Cause("other-domain", f"{sentence}{on_new:.0%} here", evidence, fix, FIT, strength)
    sentence = f"it knows its training text by heart: {on_known:.0%} of first drafts right, {on_new:.0%} on new text"
    fix = "train on more conversations (10,000 and more for a chat model); more epochs of these will not help"
    return Cause("too-little-data", sentence, evidence, fix, FIT, strength)


def surely_apart(known: Accuracy | None, new: Accuracy) -> bool:
    """Whether the first draft is right more often on known text, beyond the chance in which texts were drawn."""
    return known is None or first_accuracy(known).low > first_accuracy(new).high


def first_accuracy(found: Accuracy) -> Estimate:
    counts = {"right": found.right_NK[:, 0], "judged": found.judged_NK[:, 0]}
    return bootstrap(counts, lambda sums: sums["right"] / np.maximum(sums["judged"], 1))


def context_cause(inside: Accuracy, beyond: Accuracy, limit: int, what: str) -> Cause | None:
    """Whether drafts behind position `limit` are right more seldom."""
    num = inside.num_judged + beyond.num_judged
    if beyond.num_judged < BEYOND * num or not inside.num_judged:
        return None
    before, after = inside.acceptance_length - 1, beyond.acceptance_length - 1
    if after >= FALLS * before or first_accuracy(beyond).high >= first_accuracy(inside).low:
        return None
    sentence = f"behind {limit} tokens ({what}) {after:.2f} drafts are right per round, before that {before:.2f}"
    evidence = {
        what: limit,
        "tokens judged before, behind": [inside.num_judged, beyond.num_judged],
        "first draft right, before": inside.by_position[0],
        "first draft right, behind": beyond.by_position[0],
    }
    fix = "train on conversations as long as those that it serves (--seq-length, --total-seq-len)"
    return Cause("context", sentence, evidence, fix, FIT, 10.0 * (1 - after / before))


def temperature_cause(
    temperature: float, greedy: float, sampled: float, ceiling: float, trained: Judged | None
) -> Cause | None:
    """Whether the drafter loses at the serving temperature. `greedy`, `sampled`: tokens per round; `ceiling`: mean
    probability of the verifier's likeliest token there."""
    if not temperature or greedy <= 1 or (sampled - 1) >= FALLS * (greedy - 1):
        return None
    agreement = None if trained is None else trained.mean("likeliest")
    learnt = "" if agreement is None or agreement < GREEDY else ", and was trained on greedy answers"
    sentence = f"it accepts {sampled:.2f} tokens per round at temperature {temperature:g}, {greedy:.2f} at 0{learnt}"
    evidence = {
        "acceptance length at temperature 0": greedy,
        f"acceptance length at temperature {temperature:g}": sampled,
        "probability of the verifier's likeliest token": ceiling,
        "training tokens that are its likeliest": agreement,
    }
    fix = f"train on answers drawn at the serving temperature (regenerate-responses --temperature {temperature:g})"
    kept = {name: value for name, value in evidence.items() if value is not None}
    return Cause("temperature", sentence, kept, fix, MISMATCH, 1 - (sampled - 1) / (greedy - 1))
