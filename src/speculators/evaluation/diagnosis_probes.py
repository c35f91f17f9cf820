"""What the accuracy of a drafter would be with a neighbouring setting in place of its own.

A wrong setting is found by its repair: the same weights, on the same text, are right more often with the layers, rope,
norms, options or weights that they were trained with. Nothing has to be known of the training.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators.checkpoint.formats import build_without_data
from speculators.config import SpeculatorModelConfig
from speculators.evaluation.diagnosis import FAULTY, Accuracy, Cause, Text, measure, measure_together, read_texts
from speculators.evaluation.statistics import Estimate
from speculators.model import SpeculatorModel
from speculators.nn.draft_tokens import select_rows, stand_for_others
from speculators.nn.rope import rope_parameters
from speculators.utils.util import replaced
from speculators.verifier import verifier_parts

THETAS = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0, 5_000_000.0)
"""Of rope, as published models have them."""
NUM_SCREENED = 2
"""Texts on which every probe is tried; those that help are tried on all."""
LEAST_SAVED, LEAST_SAVED_ON_KNOWN = 0.1, 0.05
"""Share of the loss that a probe must save, surely: on new text, and on the training text, where the loss is as low as
training could make it with its own settings."""
LEAST_GAIN = 0.1
"""Tokens per round that other norm weights must win too: a factor on them sharpens the law, which saves loss alone."""
LESS_LIKELY = 0.5
"""Probes that win less than this share of the best one's gain are side effects of the same fault."""


@dataclass(frozen=True)
class Probe:
    """One change of the drafter, and what it would mean if it helped."""

    cause: str
    words: str
    """Says what was changed: "with ..." goes before it."""
    fix: str
    layer_ids: tuple[int, ...] | None = None
    tensors: Mapping[str, Tensor] | None = None
    change: Callable[[Any], None] | None = None
    """Changes a copy of the config."""


@dataclass(frozen=True)
class Texts:
    """Texts that every probe is tried on, and what the drafter is right on as it is."""

    new: Sequence[Text]
    known: Sequence[Text]
    """Of its training; empty: not known. There its loss is lowest with the settings of training."""
    on_new: Accuracy
    on_known: Accuracy | None

    @property
    def few(self) -> list[Text]:
        return [*self.known[: NUM_SCREENED - 1], *self.new][:NUM_SCREENED]


@dataclass(frozen=True)
class Repair:
    """A probe that is clearly better than the drafter as it is."""

    cause: Cause
    on_known: Accuracy | None


def probed(model: SpeculatorModel, verifier: PreTrainedModel, texts: Texts, rebuilt: Rebuild) -> Iterator[Repair]:
    """Tries every probe; yields those that are clearly better than the drafter as it is, the best of each cause."""
    own_ids = tuple(model.capture.aux_layer_ids)
    screened = measure_together(model, texts.few, own_ids)
    assert screened is not None  # `on_new` was measured
    least = LEAST_SAVED if texts.on_known is None else LEAST_SAVED_ON_KNOWN
    helpful = []
    for probe in probes_of(model, verifier):
        found = tried(probe, model, texts.few, own_ids, rebuilt, measure_together)
        if found is not None and found.loss < (1 - least / 2) * screened.loss:
            helpful.append((found.loss, probe))
    best: dict[str, Repair] = {}
    for _, probe in sorted(helpful, key=lambda pair: pair[0]):
        if probe.cause not in best and (repair := judged(probe, model, texts, own_ids, rebuilt)) is not None:
            best[probe.cause] = repair
    most = max((repair.cause.strength for repair in best.values()), default=0.0)
    yield from (repair for repair in best.values() if repair.cause.strength >= LESS_LIKELY * most)


def judged(
    probe: Probe, model: SpeculatorModel, texts: Texts, own_ids: tuple[int, ...], rebuilt: Rebuild
) -> Repair | None:
    """Measures a probe on all texts. On the training text, where it is known, it must save loss surely, and some of it
    on new text too: what a drafter has not learnt can be bettered by many a change."""
    found = tried(probe, model, texts.new, own_ids, rebuilt, measure)
    if found is None:
        return None
    base, saved, on_known = texts.on_new, found.saved_from(texts.on_new), None
    gain = found.acceptance_length - base.acceptance_length
    if saved.value <= 0 or gain < (LEAST_GAIN if probe.cause == "norms" else 0):
        return None
    least, where = LEAST_SAVED, ""
    if texts.on_known is not None:
        on_known = tried(probe, model, texts.known, own_ids, rebuilt, measure)
        if on_known is None:
            return None
        least, where, saved = LEAST_SAVED_ON_KNOWN, " on its training text", on_known.saved_from(texts.on_known)
    if saved.low <= 0 or saved.value <= least:
        return None
    return Repair(as_cause(probe, base, found, saved, where), on_known)


def as_cause(probe: Probe, base: Accuracy, found: Accuracy, saved: Estimate, where: str) -> Cause:
    before, after = base.acceptance_length, found.acceptance_length
    sentence = (
        f"with {probe.words} its loss{where} is {saved.value:.0%} lower and {after:.2f} tokens per round are accepted "
        f"in place of {before:.2f}"
    )
    evidence = {
        "teacher-forced acceptance length": before,
        f"with {probe.words}": after,
        f"loss saved{where}": f"{saved.value:.0%} ({saved.low:.0%} to {saved.high:.0%})",
        "first draft right": f"{base.by_position[0]:.0%}, then {found.by_position[0]:.0%}",
    }
    return Cause(probe.cause, sentence, evidence, probe.fix, FAULTY, saved.value)


Measure = Callable[[SpeculatorModel, Sequence[Text], Sequence[int]], Accuracy | None]
Rebuild = Callable[[SpeculatorModelConfig], SpeculatorModel]
"""Makes the drafter anew, with its weights, by another config."""


def tried(
    probe: Probe,
    model: SpeculatorModel,
    texts: Sequence[Text],
    own_ids: tuple[int, ...],
    rebuilt: Rebuild,
    measuring: Measure,
) -> Accuracy | None:
    """None: the drafter cannot be built or run so."""
    ids = probe.layer_ids or own_ids
    if probe.change is None:
        with replaced(model, probe.tensors or {}):
            return measuring(model, texts, ids)
    config = copy.deepcopy(model.config)
    try:
        probe.change(config)
        if build_without_data(type(model), config).state_dict().keys() != model.state_dict().keys():
            return None
        other = rebuilt(config)
    except ValueError:
        return None
    return measuring(other, texts, ids)


def probes_of(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Probe]:
    num_layers = len(verifier_parts(verifier).layers)
    yield from layer_probes(tuple(model.capture.aux_layer_ids), num_layers)
    yield from config_probes(model, verifier)
    yield from norm_probes(model)
    yield from verifier_weight_probes(model, verifier)


def read_around(
    verifier: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], ids: Sequence[int]
) -> list[Text]:
    """Runs the verifier over rows and keeps every layer that a probe may read beside the layers `ids`."""
    num_layers = len(verifier_parts(verifier).layers)
    read = {i for some in [tuple(ids), *neighbours(tuple(ids), num_layers)] for i in some}
    return read_texts(verifier, rows, sorted(read))


def neighbours(ids: tuple[int, ...], num_layers: int) -> list[tuple[int, ...]]:
    """Layers that might be meant by these: ids that count otherwise, one that is beside, and the usual choice."""
    shifted = [tuple(i + by for i in ids) for by in (-1, 1, -2, 2)]
    single = [(*ids[:at], i + by, *ids[at + 1 :]) for at, i in enumerate(ids) for by in (-1, 1)]
    usual = [(2, num_layers // 2, num_layers - 3)] if len(ids) == 3 else []
    last = [(*ids[:-1], num_layers)] if ids else []
    found = dict.fromkeys([*shifted, *single, *usual, *last])
    return [other for other in found if other != ids and all(0 <= i <= num_layers for i in other)]


def layer_probes(ids: tuple[int, ...], num_layers: int) -> Iterator[Probe]:
    for other in neighbours(ids, num_layers):
        fix = f"write {list(other)} where config.json lists the layers {list(ids)}"
        yield Probe("aux-layers", f"the verifier's layers {list(other)} in place of {list(ids)}", fix, other)
    if 1 < len(ids) <= 4:
        for other in itertools.permutations(ids):
            if other != ids:
                fix = f"put the column chunks of fc into the order of the layers {list(other)}: engines sort the ids"
                yield Probe("aux-order", f"the states in the order {list(other)}", fix, other)


def config_probes(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Probe]:
    """Rope of the verifier and of published models, every switch of the config turned, the whole text in sight."""
    nested = getattr(model.config, "transformer_layer_config", None)
    if nested is not None:
        own = rope_parameters(nested)
        theirs = rope_parameters(verifier_parts(verifier).config)
        others = [
            theirs,
            *({**own, "rope_theta": theta} for theta in (*THETAS, own["rope_theta"] * 10, own["rope_theta"] / 10)),
        ]
        for other in others:
            if other != own:
                words = f"rope {other['rope_type']} of theta {other['rope_theta']:g} in place of {own['rope_theta']:g}"
                fix = "write the rope parameters of training into transformer_layer_config"
                yield Probe("rope", words, fix, change=with_rope(other))
        if getattr(nested, "sliding_window", None):
            words = f"the whole text in sight in place of a window of {nested.sliding_window}"
            fix = "write the window of training, or null, into transformer_layer_config.sliding_window"
            yield Probe("context", words, fix, change=open_window)
    shared = SpeculatorModelConfig.model_fields.keys() | model.contract.training_keys
    for name in type(model.config).model_fields.keys() - shared:
        value = getattr(model.config, name)
        if isinstance(value, bool):
            words, fix = f"{name} {not value}", f"write {name}: {str(not value).lower()} into config.json"
            yield Probe("options", words, fix, change=turned(name))


def turned(name: str) -> Callable[[Any], None]:
    return lambda config: setattr(config, name, not getattr(config, name))


def with_rope(values: Mapping[str, Any]) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        nested = config.transformer_layer_config
        nested.rope_parameters = dict(values)
        if getattr(nested, "rope_theta", None) is not None:
            nested.rope_theta = values["rope_theta"]

    return change


def open_window(config: Any) -> None:
    nested = config.transformer_layer_config
    nested.sliding_window, nested.use_sliding_window = None, False
    nested.layer_types = ["full_attention"] * nested.num_hidden_layers


def norm_probes(model: SpeculatorModel) -> Iterator[Probe]:
    """Norm weights that were exchanged, lost, or are stored as w - 1 or w + 1."""
    norms = {
        name: weight.data
        for name, weight in model.named_parameters()
        if weight.ndim == 1 and "norm" in name and not name.startswith("verifier_")
    }
    fix = "take the weights from where the drafter was trained"
    for name, weight in norms.items():
        # w - 1 of a weight near 1 would switch its layer off, which betters a damaged one
        mean = float(weight.mean())
        offsets = [(weight + by, f"w {by:+d}") for by in (1, -1) if abs(mean + by - 1) < abs(mean - 1)]
        for other, words in ((torch.ones_like(weight), "1"), *offsets):
            yield Probe("norms", f"{name} as {words}", fix, tensors={name: other})
    for one, two in itertools.combinations(norms, 2):
        if norms[one].shape == norms[two].shape:
            swapped = {one: norms[two], two: norms[one]}
            yield Probe("norms", f"{one} and {two} exchanged", fix, tensors=swapped)


def verifier_weight_probes(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Probe]:
    """The verifier's own embedding and head, and heads whose rows stand for the tokens beside."""
    own = dict(model.named_parameters())
    embedding, head = own.get("embed_tokens.weight"), own.get("lm_head.weight")
    theirs = cast("Tensor", verifier.get_input_embeddings().weight).data.float()
    if embedding is not None and embedding.shape == theirs.shape:
        fix = "use the verifier that the drafter was trained for, or take the embedding from where it was trained"
        yield Probe("embedding", "the verifier's embedding", fix, tensors={"embed_tokens.weight": theirs})
    output = verifier.get_output_embeddings()
    if head is None or output is None:
        return
    head_VH = cast("Tensor", output.weight).data.float()
    rows_DH = select_rows(head_VH, getattr(model, "t2d", None))
    if rows_DH.shape == head.shape:
        fix = "take head, d2t and t2d from where the drafter was trained"
        cause = "vocabulary-map" if stand_for_others(head.data, head_VH, rows_DH) else "head"
        yield Probe(cause, "the verifier's head", fix, tensors={"lm_head.weight": rows_DH})
    fix = "take d2t, t2d and the head from where the drafter was trained"
    for by in (-1, 1):
        shifted = {"lm_head.weight": head.data.roll(by, 0)}
        yield Probe("vocabulary-map", f"the head's rows moved by {by:+d}", fix, tensors=shifted)
