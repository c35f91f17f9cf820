"""Whether a running server is the one a checkpoint was trained for: asked before the first request of a user.

/v1/models    which model was loaded          /tokenize    the same tokens as the verifier's tokenizer
/metrics      whether anything drafts, and, after some traffic, whether any draft was accepted

and whether its text is the verifier's, by asking: greedy answers token for token, sampled ones by their law, which is
known. Shapes: S sampled tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from transformers import PreTrainedModel

from speculators.checkpoint.findings import Finding, error, warning
from speculators.data_generation.preprocessing import load_tokenizer
from speculators.data_generation.vllm_client import InvalidResponseError, TransientError, checked_json
from speculators.decoding.settings import SamplingParams
from speculators.decoding.target import DecodingTarget
from speculators.evaluation.config import DiagnoseConfig
from speculators.evaluation.diagnosis import FAULTY, INACTIVE, Cause
from speculators.evaluation.parity_checks import LOW_PRECISION_TIE_TOLERANCE
from speculators.evaluation.server_client import MeasuredServer, Served, ask
from speculators.evaluation.statistics import first_difference
from speculators.utils.files import is_same_model

PROBE = "Hello, Wörld!  12345 <|im_start|>\n\tdef f(x): return x**2  # 你好"
"""Words, spaces, digits, code, a marker and other scripts: two tokenizers rarely agree on all of it."""
TIMEOUT_S = 30.0
"""Of a check; a diagnosis, which asks for answers, waits longer."""
ANSWER_TIMEOUT_S, MAX_RETRIES = 300.0, 1


def server_findings(url: str, checkpoint: str, verifier: str | None) -> Iterable[Finding]:
    """Reports how the server at `url` differs from what `checkpoint` and its `verifier` need.

    Raises `ValueError` for an address that is none, `ServerUnavailableError` when nothing answers there.
    """
    with closing(MeasuredServer(url, timeout_s=TIMEOUT_S, max_retries=0, max_clients=1)) as server:
        if verifier is None:
            found, rule = "the checkpoint names no verifier", "only the one it was trained for accepts its drafts"
            yield warning("server-not-compared", "verifier", found, rule, "name it with --verifier")
        else:
            yield from model_findings(server, checkpoint, verifier)
            yield from tokenizer_findings(server, verifier)
        yield from counter_findings(server, checkpoint)


def counter_findings(server: MeasuredServer, checkpoint: str) -> Iterable[Finding]:
    where, counters = f"{server.base_url}/metrics", server.counters()
    if not counters.speculates:
        fix = f"start it again with this drafter: speculators serve {checkpoint}"
        yield error("server-drafts-nothing", where, "no counters of drafts", "a server that drafts counts them", fix)
    elif counters.num_drafts and not counters.num_accepted:
        found, fix = (f"0 of {counters.num_drafted} drafts accepted", "ask `speculators verify` about the checkpoint")
        yield error("server-accepts-nothing", where, found, "a drafter of this verifier is accepted", fix)


def model_findings(server: MeasuredServer, checkpoint: str, verifier: str) -> Iterable[Finding]:
    """`vllm serve CHECKPOINT` loads the verifier and may name the checkpoint; both are right."""
    root = server.served.root
    if not any(may_be(root, name) for name in (verifier, checkpoint)):
        rule, fix = f"the drafter was trained for {verifier}", "serve that verifier, or train a drafter for this one"
        yield error("server-other-model", f"{server.base_url}/v1/models", root, rule, fix)


def may_be(root: str, name: str) -> bool:
    """Says whether a server that loaded `root` may serve `name`: the same model, or, where one of the two is not a
    directory here, one of the same last name: a hub id and its copy on another disk."""
    if is_same_model(root, name):
        return True
    are_here = os.path.isdir(root) and os.path.isdir(name)
    return not are_here and os.path.basename(root.rstrip("/")).lower() == os.path.basename(name.rstrip("/")).lower()


def tokenizer_findings(server: MeasuredServer, verifier: str) -> Iterable[Finding]:
    """Compares the tokens of one text; a server without `/tokenize` is reported as not compared."""
    where = f"{server.base_url}/tokenize"
    request = {"model": server.served.name, "prompt": PROBE, "add_special_tokens": False}
    try:
        theirs = checked_json(server.client.post(where, json=request)).get("tokens")
    except (InvalidResponseError, TransientError) as refusal:
        theirs, found = None, str(refusal)
    else:
        found = "an answer without tokens"
    if not isinstance(theirs, list):
        rule, fix = "vLLM's server tells how it tokenises", "compare the tokenizers by hand"
        yield warning("server-not-compared", where, found, rule, fix)
        return
    ours = load_tokenizer(verifier).encode(PROBE, add_special_tokens=False)
    if theirs != ours:
        pairs = enumerate(zip(theirs, ours, strict=False))
        first = next((i for i, (their, our) in pairs if their != our), min(len(theirs), len(ours)))
        found, rule = f"{len(theirs)} tokens, another at {first}", f"the tokenizer of {verifier} makes {len(ours)}"
        yield error("server-other-tokenizer", where, found, rule, "serve the verifier with its own tokenizer")


# -- its text

FALSE_ALARM, POWER = 0.01, 0.9
"""Chance that a lossless server fails the sampled test, and the chance with which it finds what it says it finds."""
NUM_LAW_TOKENS = 8
"""Tokens of a sampled answer. The first one comes from the prompt: no draft had a part in it."""


@torch.no_grad()
def differences(
    verifier: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]],
) -> dict[int, str]:
    """Prompt -> where its answer parts from the expected one at another place than a near tie."""
    found = {}
    for number, (ours, theirs) in enumerate(zip(expected, given, strict=True)):
        at = first_difference(ours, theirs)
        if at is None:
            continue
        if at < min(len(ours), len(theirs)):
            ids = torch.tensor([[*prompts[number], *ours[:at]]], device=verifier.device)
            logits_V = verifier(input_ids=ids, use_cache=False).logits[0, -1].float()
            gap = abs(float(logits_V[ours[at]] - logits_V[theirs[at]]))
            if gap <= LOW_PRECISION_TIE_TOLERANCE * max(1.0, float(logits_V.abs().max())):
                continue
        found[number] = f"token {at}: {list(theirs[at : at + 1])}, the verifier says {list(ours[at : at + 1])}"
    return found


@dataclass
class Score:
    """Sum of observed minus expected, and its variance under the verifier's law: about N(0, 1) after division."""

    excess: float = 0.0
    variance: float = 0.0

    def add(self, excess: torch.Tensor, variance: torch.Tensor) -> None:
        self.excess, self.variance = self.excess + float(excess), self.variance + float(variance)

    @property
    def z(self) -> float:
        return self.excess / max(self.variance, 1e-12) ** 0.5


@dataclass
class SampledLaw:
    """Two statistics of sampled tokens. Given the tokens before, a token is the likeliest one with the probability of
    that one, and its log p has a known mean and variance: both sums are martingales, so that the dependence between
    tokens does no harm."""

    likeliest: Score
    surprise: Score
    num_tokens: int = 0

    @property
    def limit(self) -> float:
        """Of |z|: two statistics, two sides."""
        return NormalDist().inv_cdf(1 - FALSE_ALARM / 4)

    @property
    def passed(self) -> bool:
        return max(abs(self.likeliest.z), abs(self.surprise.z)) <= self.limit

    @property
    def found_with_power(self) -> float:
        """Share of the tokens by which likeliest ones must be too many, or too few, to be found with `POWER`."""
        width = (self.limit + NormalDist().inv_cdf(POWER)) * self.likeliest.variance**0.5
        return width / max(self.num_tokens, 1)

    def __str__(self) -> str:
        return (
            f"z {self.likeliest.z:.1f} (likeliest tokens) and {self.surprise.z:.1f} (log-probability), limit "
            f"{self.limit:.1f}, {self.num_tokens} tokens; false alarms {FALSE_ALARM:.0%}, power {POWER:.0%} for a "
            f"share of likeliest tokens that is wrong by {self.found_with_power:.1%}"
        )


@torch.no_grad()
def sampled_law(
    server: MeasuredServer,
    verifier: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    num_samples: int,
) -> SampledLaw:
    """Samples short answers of a server and compares every token behind the first with the verifier's law."""
    law = SampledLaw(Score(), Score())
    for number in range(num_samples):
        prompt = prompts[number % len(prompts)]
        sampling = SamplingParams(max_tokens=NUM_LAW_TOKENS, temperature=temperature, seed=number, ignore_eos=True)
        token_ids = server.answer(sampling, prompt)
        ids = torch.tensor([[*prompt, *token_ids]], device=verifier.device)
        logits_SV = verifier(input_ids=ids, use_cache=False).logits[0, len(prompt) : -1].float()
        log_p_SV = (logits_SV / temperature).log_softmax(-1).clamp_min(-30.0)
        p_SV, drawn_S = log_p_SV.exp(), ids[0, len(prompt) + 1 :]
        top_S, best_S = p_SV.max(-1)
        law.likeliest.add(((best_S == drawn_S).float() - top_S).sum(), (top_S * (1 - top_S)).sum())
        mean_S = (p_SV * log_p_SV).sum(-1)
        variance_S = (p_SV * log_p_SV**2).sum(-1) - mean_S**2
        law.surprise.add((log_p_SV.gather(1, drawn_S[:, None])[:, 0] - mean_S).sum(), variance_S.sum())
        law.num_tokens += len(drawn_S)
    return law


# -- what a difference means


def connect(url: str) -> MeasuredServer:
    return MeasuredServer(url, timeout_s=ANSWER_TIMEOUT_S, max_retries=MAX_RETRIES, max_clients=1)


def text_causes(
    served: Served,
    prompts: Sequence[list[int]],
    ours: Sequence[list[int]],
    plain_url: str | None,
    target: DecodingTarget,
    config: DiagnoseConfig,
    measured: dict[str, Any],
) -> Iterator[Cause]:
    """Compares greedy answers: with a plain server's, and with the verifier's own as it is here."""
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


def inactive_causes(path: Path, engine_config: Mapping[str, Any], config: DiagnoseConfig) -> Iterator[Cause]:
    """Settings with which an engine drafts nothing, or not with this checkpoint."""
    num_drafts = engine_config.get("num_speculative_tokens", config.num_speculative_tokens)
    fix = f"serve it as `speculators serve {path}` does"
    if num_drafts == 0:
        sentence = "num_speculative_tokens is 0: nothing is drafted, every token is the verifier's own"
        yield Cause("inactive", sentence, {"num_speculative_tokens": 0}, fix, INACTIVE)
    drafts_with = engine_config.get("model")
    method = engine_config.get("method")
    if drafts_with is not None and os.path.realpath(drafts_with) != str(path.resolve()):
        sentence = f"the engine drafts with {drafts_with}, not with this checkpoint"
        yield Cause("inactive", sentence, {"model": drafts_with}, fix, INACTIVE)
    elif drafts_with is None and method is not None:
        sentence = f"the engine drafts by method {method!r}; its config names no checkpoint"
        yield Cause("inactive", sentence, {"method": method}, fix, INACTIVE)
