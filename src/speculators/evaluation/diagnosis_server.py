"""Examines a running engine: is its text the verifier's, does it draft with this checkpoint, and as well as ours does.

    greedy text       token for token against a plain server's, else against the verifier's own, near ties aside
    sampled tokens    their law is known: the verifier's. Two statistics of it, with false alarms and power stated
    counts            /metrics before and after, against our engine's on the same prompts, position by position
    which fault       the curve that the server's is nearest to, of our drafter with one setting changed

Shapes: K draft positions, S sampled tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

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
from speculators.evaluation.diagnosis_drafter import answer, decode
from speculators.evaluation.diagnosis_probes import Probe, Rebuild, probes_of, read_around, replaced, tried
from speculators.evaluation.parity import recorded_num_tokens
from speculators.evaluation.server_check import (
    counter_findings,
    differences,
    model_findings,
    sampled_law,
    tokenizer_findings,
)
from speculators.evaluation.server_client import MeasuredServer, Served, ask
from speculators.model import SpeculatorModel
from speculators.utils.progress import Progress

TIMEOUT_S, MAX_RETRIES = 300.0, 1
FEWER = 0.1
"""A position accepts less than in our engine when it lacks more than this share of the rounds."""
HARDLY = 0.1
"""Share of the rounds in which position 1 must be accepted for the curve to tell one fault from another."""
COLLAPSED = 0.5
"""Later positions collapse when less than this share of what they accept in our engine is left."""
NUM_DECODED = 6
"""Changed settings with which our engine decodes: those that the training forward finds nearest to the server."""
AS_SERVED = 0.05
"""Distance of two curves that are the same but for ties."""
EXPLAINS = 0.5
"""A changed setting explains the curve when it leaves less than this share of the distance."""
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
        causes += text_causes(served, prompts, plain_url, target, config, measured)
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


def connect(url: str) -> MeasuredServer:
    return MeasuredServer(url, timeout_s=TIMEOUT_S, max_retries=MAX_RETRIES, max_clients=1)


def causes_of_findings(findings: Iterable[Finding]) -> Iterator[Cause]:
    for found in findings:
        if found.severity == "error" and found.code in NAME_OF_FINDING:
            name = NAME_OF_FINDING[found.code]
            evidence = {found.code: f"{found.where}: {found.found}"}
            rank = INACTIVE if name == "inactive" else FAULTY
            yield Cause(name, f"{found.found}: {found.rule}", evidence, found.fix, rank, 100.0)


# -- the text


def text_causes(
    served: Served,
    prompts: Sequence[list[int]],
    plain_url: str | None,
    target: DecodingTarget,
    config: DiagnoseConfig,
    measured: dict[str, Any],
) -> Iterator[Cause]:
    """Compares greedy answers: with a plain server's, and with the verifier's own as it is here."""
    ours = [output.token_ids for output in answer(target, prompts, config.max_tokens)]
    differing = differences(target.model, prompts, ours, served.answers)
    measured["greedy answers as the verifier's"] = f"{len(prompts) - len(differing)} of {len(prompts)}"
    if plain_url is not None:
        with closing(connect(plain_url)) as plain:
            theirs = ask(plain, prompts, SamplingParams(max_tokens=config.max_tokens, temperature=0.0)).answers
        apart = differences(target.model, prompts, theirs, served.answers)
        measured["greedy answers as the plain server's"] = f"{len(prompts) - len(apart)} of {len(prompts)}"
        if differing and not apart:
            sentence = f"without drafts too it writes another text than {target.name}: it serves another verifier"
            fix = f"serve {target.name}, or name the verifier that is served with --verifier"
            yield Cause("verifier", sentence, {"first difference": next(iter(differing.values()))}, fix, FAULTY, 90.0)
            return
        differing = apart
    if differing:
        number, where = next(iter(differing.items()))
        sentence = f"its greedy text is not the verifier's, in {len(differing)} of {len(prompts)} answers"
        evidence = {"first difference": f"prompt {number}: {where}", "differing answers": len(differing)}
        fix = "serve the verifier that the drafter was trained for; if it is that one, report the engine: it must not"
        yield Cause("text-not-lossless", sentence, evidence, f"{fix} change the text", FAULTY, 50.0)


def law_causes(
    server: MeasuredServer,
    prompts: Sequence[list[int]],
    target: DecodingTarget,
    config: DiagnoseConfig,
    measured: dict[str, Any],
) -> Iterator[Cause]:
    """Tests whether sampled tokens have the verifier's law."""
    temperature = config.temperature or 1.0
    law = sampled_law(server, target.model, prompts, temperature, config.num_samples)
    measured[f"sampled law at temperature {temperature:g}"] = str(law)
    if not law.passed:
        more = "more" if law.likeliest.z > 0 else "less"
        sentence = f"its sampled text is not drawn from the verifier's law: likeliest tokens come {more} often"
        fix = "report the engine's rejection sampler; typical and synthetic acceptance are not lossless: leave them out"
        yield Cause("sampling-not-lossless", sentence, {"test": str(law)}, fix, FAULTY, 40.0)


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
    ours = decode(model, target, prompts, num_drafts, greedy).by_position
    theirs = served.by_position[: len(ours)]
    measured["accepted by position, our engine"] = ours
    apart = [a - b for a, b in zip(ours, theirs, strict=False)]
    evidence: dict[str, Any] = {"accepted by position, server": theirs, "accepted by position, our engine": ours}
    if not apart or max(map(abs, apart)) <= FEWER:
        return
    # where hardly anything is accepted, every fault looks alike
    accepts = theirs[0] > HARDLY
    named = fitting_probe(theirs, ours, prompts, served, model, target, rebuilt, greedy) if accepts else None
    if named is not None:
        probe, curve = named
        evidence[f"our engine with {probe.words}"] = curve
        sentence = f"its accepted drafts are those of this drafter with {probe.words}"
        yield Cause(probe.cause, sentence, evidence, reversed_fix(probe), FAULTY, 20.0)
    elif apart[0] <= FEWER and collapsed(theirs, ours):
        sentence = "position 1 is accepted as in our engine, later positions collapse: the engine feeds the drafter's "
        fix = "compare positions, masks and the state that the engine feeds back; another release of it may be right"
        yield Cause("later-positions", sentence + "own states back otherwise", evidence, fix, FAULTY, 20.0)
    else:
        how = "fewer" if apart[0] > 0 else "more"
        sentence = f"it accepts {how} drafts than this checkpoint does in our engine, from position 1 on: "
        fix = "look at the path in its --speculative-config and at the warnings of its loader"
        yield Cause("other-drafter", sentence + "it drafts with other weights", evidence, fix, FAULTY, 10.0)


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
    theirs: Sequence[float],
    ours: Sequence[float],
    prompts: Sequence[list[int]],
    served: Served,
    model: SpeculatorModel,
    target: DecodingTarget,
    rebuilt: Rebuild,
    greedy: SamplingParams,
) -> tuple[Probe, list[float]] | None:
    """Finds the changed setting with which our drafter accepts what the server does. Both draft greedily, so that the
    right one gives the same counts; the training forward chooses which ones are worth decoding."""
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
            likely.append((distance(expected_curve(ours, base, found), theirs), probe))
    curves = []
    for _, probe in sorted(likely, key=lambda pair: pair[0])[:NUM_DECODED]:
        with changed(probe, model, rebuilt) as other:
            curve = decode(other, target, prompts, len(ours), greedy).by_position
        curves.append((distance(curve, theirs), probe, curve))
    off, nearest, curve = min(curves, key=lambda found: found[0])
    return (nearest, curve) if off <= min(AS_SERVED, EXPLAINS * distance(ours, theirs)) else None


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


def distance(curve: Sequence[float], theirs: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(curve, theirs, strict=False)), default=0.0)
