"""Examines a running engine: is its text the verifier's, does it draft with this checkpoint, and as well as ours does.

    greedy text       token for token against a plain server's, else against the verifier's own, near ties aside
    sampled tokens    their law is known: the verifier's. Two statistics of it, with false alarms and power stated
    counts            /metrics before and after each answer, against our engine's for the same prompt
    which fault       our drafter with one setting changed accepts what the server does

Shapes: K draft positions, S sampled tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import zip_longest
from operator import sub
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from speculators.checkpoint.findings import Finding
from speculators.decoding.settings import SamplingParams
from speculators.decoding.target import DecodingTarget
from speculators.evaluation.config import DiagnoseConfig
from speculators.evaluation.diagnosis import (
    DATA,
    FAULTY,
    INACTIVE,
    MISMATCH,
    Accuracy,
    Cause,
    Diagnosis,
    measure_together,
    ranked,
)
from speculators.evaluation.diagnosis_drafter import Decoded, answer, decode
from speculators.evaluation.diagnosis_probes import Probe, Rebuild, probes_of, read_around, tried
from speculators.evaluation.parity import recorded_num_tokens
from speculators.evaluation.parity_checks import ACCEPTED_TOLERANCE
from speculators.evaluation.server_check import (
    connect,
    counter_findings,
    law_causes,
    model_findings,
    text_causes,
    tokenizer_findings,
)
from speculators.evaluation.server_client import Served, ask
from speculators.model import SpeculatorModel
from speculators.nn.draft_tokens import verifier_ids
from speculators.utils.progress import Progress
from speculators.utils.util import replaced
from speculators.verifier import verifier_parts

FEWER = 0.1
"""A position accepts less than in our engine when it lacks more than this share of the rounds."""
HARDLY = 0.1
"""Share of the rounds in which position 1 must be accepted for the curve to tell one fault from another."""
COLLAPSED = 0.5
"""Later positions collapse when less than this share of what they accept in our engine is left."""
NUM_DECODED = 6
"""Changed settings with which our engine decodes: those that the training forward finds nearest to the server."""
AS_SERVED = 0.05
"""Distance of counts that are the same but for ties."""
EXPLAINS = 0.25
"""A changed setting explains the counts when it leaves less than this share of the distance."""
NAME_OF_FINDING = {
    "server-drafts-nothing": "inactive",
    "server-other-model": "verifier",
    "server-other-tokenizer": "tokenizer",
}


def diagnose_server(
    url: str,
    plain_url: str | None,
    path: Path | None,
    model: SpeculatorModel | None,
    target: DecodingTarget,
    prompts: Sequence[list[int]],
    rebuilt: Rebuild | None,
    config: DiagnoseConfig,
    show: Progress,
) -> Diagnosis:
    """`path`, `model`, `rebuilt`: the checkpoint that the server should draft with; None: whatever it drafts with.

    Raises `ServerUnavailableError` when nothing answers at one of the addresses.
    """
    measured: dict[str, Any] = {}
    not_examined: dict[str, str] = {}
    with closing(connect(url)) as server:
        show("asking the server what it serves", 0, None)
        name = str(path) if path is not None else target.name
        findings = [*model_findings(server, name, target.name), *tokenizer_findings(server, target.name)]
        findings += counter_findings(server, name)
        causes = list(causes_of_findings(findings))
        show("answers", 0, len(prompts))
        served = ask(server, prompts, SamplingParams(max_tokens=config.max_tokens, temperature=0.0))
        measured |= served.facts()
        show("comparing the text", 0, None)
        ours = answer(target, prompts, config.max_tokens)
        causes += text_causes(served, prompts, ours, plain_url, target, config, measured)
        show("sampling", 0, None)
        causes += law_causes(server, prompts, target, config, measured)
        if served.speculates and not served.stats.num_drafted:
            sentence, fix = "it counts drafts, and offered none in these answers", "look at its --speculative-config"
            causes.append(Cause("inactive", sentence, {"drafts": 0}, fix, INACTIVE))
        elif served.stats.num_drafted and model is not None and rebuilt is not None:
            show("drafting in our engine", 0, None)
            causes += count_causes(served, prompts, model, target, rebuilt, config, measured)
        elif served.stats.num_drafted:
            causes += collapse_alone(served)
            not_examined["accepted counts"] = "no checkpoint to compare them with: name it"
    checkpoint = None if path is None else str(path)
    return Diagnosis(checkpoint, target.name or None, server.base_url, ranked(causes), measured, not_examined)


def causes_of_findings(findings: Iterable[Finding]) -> Iterator[Cause]:
    for found in findings:
        if found.severity == "error" and found.code in NAME_OF_FINDING:
            name = NAME_OF_FINDING[found.code]
            evidence = {found.code: f"{found.where}: {found.found}"}
            rank = INACTIVE if name == "inactive" else FAULTY
            yield Cause(name, f"{found.found}: {found.rule}", evidence, found.fix, rank, 100.0)


# -- the counts


def count_causes(
    served: Served,
    prompts: Sequence[list[int]],
    model: SpeculatorModel,
    target: DecodingTarget,
    rebuilt: Rebuild,
    config: DiagnoseConfig,
    measured: dict[str, Any],
) -> Iterator[Cause]:
    """Compares the accepted drafts with those of our engine, and names the setting that the curve fits."""
    wanted = config.num_speculative_tokens or recorded_num_tokens(model)
    most = type(model).contract.most_drafts(model.config)
    served_k = len(served.accepted_per_position)
    if served_k != wanted:
        sentence = f"it drafts {served_k} tokens per round, the checkpoint says {wanted}"
        fix = f"write num_speculative_tokens {wanted} into its --speculative-config, or measure which K is best"
        yield Cause("draft-tokens", sentence, {"served": served_k, "checkpoint": wanted}, fix, MISMATCH, 1.0)
    num_drafts = min(served_k, most or served_k)
    greedy = SamplingParams(max_tokens=config.max_tokens, temperature=0.0)
    decoded = decode(model, target, prompts, num_drafts, greedy)
    ours, theirs = decoded.by_position, served.by_position[: len(decoded.by_position)]
    off = distance(decoded, served)
    measured["accepted by position, our engine"] = ours
    measured["rounds in which another number of drafts was accepted, at least"] = off
    if not ours or off <= ACCEPTED_TOLERANCE:
        return
    evidence: dict[str, Any] = {"accepted by position, server": theirs, "accepted by position, our engine": ours}
    apart = [a - b for a, b in zip(ours, theirs, strict=False)]
    # where hardly anything is accepted, every fault looks alike
    accepts = theirs[0] > HARDLY
    named = fitting_probe(off, ours, prompts, served, model, target, rebuilt, greedy) if accepts else None
    if named is not None:
        probe, curve = named
        evidence[f"our engine with {probe.words}"] = curve
        sentence = f"its accepted drafts are those of this drafter with {probe.words}"
        yield Cause(probe.cause, sentence, evidence, reversed_fix(probe), FAULTY, 20.0)
    elif off <= FEWER:
        return  # so few may be ties, in the low precision of an engine
    elif apart[0] <= FEWER and collapsed(theirs, ours):
        sentence = "position 1 is accepted as in our engine, later positions collapse: the engine feeds the drafter's "
        fix = "compare positions, masks and the state that the engine feeds back; another release of it may be right"
        yield Cause("later-positions", sentence + "own states back otherwise", evidence, fix, FAULTY, 20.0)
    else:
        sentence = f"it drafts other tokens than this checkpoint does in our engine: {off:.0%} of the rounds, or more, "
        fix = "look at the path in its --speculative-config and at the warnings of its loader"
        yield Cause("other-drafter", sentence + "accept another number of them", evidence, fix, FAULTY, 10.0)


def distance(decoded: Decoded, served: Served) -> float:
    """Share of the rounds, at the worst position, that surely accepted another number of drafts, prompt by prompt;
    position 0: the rounds themselves. Answers that part ways at a tie have others and are not compared; where all do,
    the curves are."""
    apart, num_rounds, depth = Counter[int](), 0, len(decoded.by_position)
    rows = zip(decoded.answers, decoded.rounds_by_prompt, served.answers, served.rounds_by_prompt, strict=True)
    for own, ours, answered, theirs in rows:
        if own == answered:
            num_rounds += ours[0]
            both = zip_longest(ours, theirs[: depth + 1], fillvalue=0)
            apart.update({k: abs(a - b) for k, (a, b) in enumerate(both)})
    if not num_rounds:
        return max(map(abs, map(sub, decoded.by_position, served.by_position)), default=0.0)
    return max(apart.values(), default=0) / num_rounds


def map_probes(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Probe]:
    """What an engine may make of the map from draft ids to tokens. The training forward does not read it."""
    d2t_D = dict(model.named_buffers()).get("d2t")
    if d2t_D is None:
        return
    rows_D = torch.arange(len(d2t_D), device=d2t_D.device)
    others = {
        "draft ids taken for tokens": torch.zeros_like(d2t_D),
        "offsets of d2t taken for tokens": d2t_D - rows_D,
        "tokens of d2t taken for offsets": d2t_D + rows_D,
        "d2t moved by +1": d2t_D.roll(1),
        "d2t moved by -1": d2t_D.roll(-1),
    }
    fix = "serve d2t of the checkpoint, as offsets"
    for words, other_D in others.items():
        ids_D = verifier_ids(other_D)
        if int(ids_D.min()) >= 0 and int(ids_D.max()) < verifier_parts(verifier).config.vocab_size:
            yield Probe("vocabulary-map", words, fix, tensors={"d2t": other_D})


def collapsed(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    return any(given < COLLAPSED * own for given, own in zip(theirs[1:], ours[1:], strict=True))


def collapse_alone(served: Served) -> Iterator[Cause]:
    """What the curve alone says, where no checkpoint is known."""
    rates = served.by_position
    if len(rates) > 1 and rates[0] > FEWER and rates[1] < HARDLY * rates[0]:
        sentence = "position 1 is accepted, later positions hardly ever: the engine feeds the drafter otherwise"
        fix = "name the checkpoint, so that the curve can be compared with ours"
        yield Cause("later-positions", sentence, {"accepted by position, server": rates}, fix, DATA, 1.0)


def reversed_fix(probe: Probe) -> str:
    return f"the engine was told, or assumes, {probe.words}: serve the checkpoint's own config.json"


def fitting_probe(
    apart: float,
    ours: Sequence[float],
    prompts: Sequence[list[int]],
    served: Served,
    model: SpeculatorModel,
    target: DecodingTarget,
    rebuilt: Rebuild,
    greedy: SamplingParams,
) -> tuple[Probe, list[float]] | None:
    """Finds the changed setting with which our drafter accepts what the server does, prompt by prompt. Both draft
    greedily, so that the right one gives the same counts; the training forward chooses which are worth decoding."""
    rows = [
        ([*prompt, *ids], [0] * len(prompt) + [1] * len(ids))
        for prompt, ids in zip(prompts, served.answers, strict=True)
    ]
    own_ids = tuple(model.capture.aux_layer_ids)
    texts = read_around(target.model, rows, own_ids)
    base = measure_together(model, texts, own_ids)
    if base is None:
        return None
    likely: list[tuple[float, Probe]] = []
    for probe in probes_of(model, target.model):
        found = tried(probe, model, texts, own_ids, rebuilt, measure_together)
        if found is not None:
            expected = expected_curve(ours, base, found)
            likely.append((max(map(abs, map(sub, expected, served.by_position)), default=0.0), probe))
    found_by_distance = []
    nearest_ones = [probe for _, probe in sorted(likely, key=lambda pair: pair[0])[:NUM_DECODED]]
    for probe in [*nearest_ones, *map_probes(model, target.model)]:
        with changed(probe, model, rebuilt) as other:
            decoded = decode(other, target, prompts, len(ours), greedy)
        found_by_distance.append((distance(decoded, served), probe, decoded.by_position))
        if not found_by_distance[-1][0]:
            break  # nothing is nearer
    off, nearest, curve = min(found_by_distance, key=lambda found: found[0])
    return (nearest, curve) if off <= min(AS_SERVED, EXPLAINS * apart) else None


@contextmanager
def changed(probe: Probe, model: SpeculatorModel, rebuilt: Rebuild) -> Iterator[SpeculatorModel]:
    """Inside, the drafter as the probe changes it, whole, so that it can draft."""
    if probe.layer_ids is None and probe.change is None:
        with replaced(model, probe.tensors or {}):
            yield model
        return
    config = copy.deepcopy(model.config)
    if probe.change is not None:
        probe.change(config)
    else:
        key = "target_layer_ids"
        setattr(config, type(model).recorded_keys.get(key, key), list(probe.layer_ids or ()))
    yield rebuilt(config)


def expected_curve(ours: Sequence[float], base: Accuracy, found: Accuracy) -> list[float]:
    """Our engine's curve, changed as the training forward's is: rounds begin at other places than all tokens."""
    factors = [b / max(a, 1e-9) for a, b in zip(base.by_position, found.by_position, strict=True)]
    return [rate * min(factors[min(k, len(factors) - 1)], 2.0) for k, rate in enumerate(ours)]
