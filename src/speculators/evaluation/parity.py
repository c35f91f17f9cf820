"""The parity gate: a checkpoint drafts the same tokens where it is trained, measured and served.

    prompts -> engine, speculative and plain              text equal: decoding is lossless
            -> every round again by the training forward  drafts equal: what was trained is what drafts
            -> vLLM, speculative and plain                text equal, as many accepted: what drafts is what serves

All greedy. The training forward is `SpeculatorModel.draft_logits`; `parity_checks` runs it over every round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators.data_generation.rollout import load_prompts
from speculators.data_generation.sources import LocalSource
from speculators.decoding import Engine, RequestOutput, SamplingParams
from speculators.decoding.target import load_tokenizer
from speculators.evaluation.config import ParityConfig, VllmTarget
from speculators.evaluation.parity_checks import (
    Check,
    RecordingProposer,
    RoundsCompared,
    accepted_check,
    compare_rounds,
    drafts_check,
    drafts_tokens,
    finite_check,
    text_check,
    tie_tolerance,
    vocabulary_check,
)
from speculators.evaluation.parity_vllm import VllmRun, decode_in_vllm, speculative_run
from speculators.evaluation.records import environment
from speculators.evaluation.report import SavedReport
from speculators.interfaces import CaptureSpec, Proposer
from speculators.model import SpeculatorModel
from speculators.utils.progress import Progress, doing, reporting
from speculators.utils.report import facts_table
from speculators.utils.util import chosen_device
from speculators.verifier import load_verifier, verifier_parts

REPORT_NAME = "parity.json"


@dataclass(frozen=True)
class ParityReport(SavedReport):
    checkpoint: str
    verifier: str
    num_prompts: int
    num_tokens: int
    """Longest answer."""
    num_speculative_tokens: int
    acceptance_length: float | None
    """Of the engine; None when nothing could be replayed."""
    checks: tuple[Check, ...]
    time_s: float

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def facts(self) -> dict[str, str]:
        """For people: each check with its verdict."""
        verdicts = {True: "pass", False: "FAIL", None: "not checked"}
        return {check.name: f"{verdicts[check.passed]}: {check.detail}" for check in self.checks}

    @property
    def failures(self) -> list[str]:
        return [f"{check.name}: {check.detail}" for check in self.checks if check.passed is False]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "environment": environment()}

    def tables(self) -> list[Table]:
        length = "" if self.acceptance_length is None else f", acceptance length {self.acceptance_length:.2f}"
        title = f"Parity of {self.num_prompts} prompts x {self.num_tokens} tokens, K = {self.num_speculative_tokens}"
        return [facts_table(title + length, self.facts())]

    def sentence(self) -> str:
        verdicts = [check.passed for check in self.checks]
        left = f", {verdicts.count(None)} could not be made" if None in verdicts else ""
        return f"{verdicts.count(True)} of {len(verdicts)} checks passed" + left

    def raise_for_errors(self) -> None:
        """Raises `ParityError`, with every failed check, unless the gate is passed."""
        if not self.passed:
            raise ParityError(self)


class ParityError(RuntimeError):
    """Training, engine and server do not draft the same tokens, or do not give the verifier's text."""

    def __init__(self, report: ParityReport) -> None:
        super().__init__(f"{report.checkpoint} fails the parity gate: " + "; ".join(report.failures))


@dataclass(frozen=True)
class Replayed:
    """Answers of the engine, and its rounds compared with the training forward."""

    verifier: PreTrainedModel
    prompts: list[list[int]]
    plain: list[RequestOutput]
    speculative: list[RequestOutput]
    rounds: RoundsCompared

    @property
    def acceptance_length(self) -> float:
        return reduce(add, (output.stats for output in self.speculative)).acceptance_length

    @torch.no_grad()
    def is_tie(self, number: int, at: int, other: int) -> bool:
        """Whether the verifier cannot tell `other` from what plain decoding says at a position."""
        expected = self.plain[number].token_ids
        ids = torch.tensor([[*self.prompts[number], *expected[:at]]], device=self.verifier.device)
        logits_V = self.verifier(input_ids=ids, use_cache=False).logits[0, -1]
        gap = abs(float(logits_V[expected[at]] - logits_V[other]))
        return gap <= tie_tolerance(logits_V.dtype) * max(1.0, float(logits_V.abs().max()))


def check_parity(
    config: ParityConfig,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]] = "",
    verifier: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool | Progress | None = None,
) -> ParityReport:
    """Replay prompts through training, engine and, if asked for, vLLM.

    `prompts`: token ids; None: the first ones of `source`, conversations as `load_prompts` reads them.
    `verifier`, `tokenizer`: in place of loading them. Raises `ValueError` for what cannot be read.
    """
    begun_s = time.perf_counter()
    # fp32 while loading, so that copies of the verifier's weights are not rounded to the checkpoint's type
    model = SpeculatorModel.from_pretrained(config.checkpoint, verifier=config.verifier, dtype=torch.float32)
    verifier_path = config.verifier or recorded_verifier(model, config.checkpoint)
    if verifier is None:
        verifier = load_verifier(
            verifier_path,
            dtype=getattr(torch, config.dtype),
            device=chosen_device(config.device),
            trust_remote_code=config.trust_remote_code,
        )
    model.to(verifier.device)  # type: ignore[arg-type]
    if prompts is None:
        tokenizer = tokenizer or load_tokenizer(verifier_path, config.trust_remote_code)
        prompts = load_prompts(source, tokenizer, limit=config.num_prompts)
    cut_prompts = [list(prompt)[-config.max_prompt_tokens :] for prompt in prompts]
    num_drafts = config.num_speculative_tokens or recorded_num_tokens(model)

    checks, replayed = [vocabulary_check(model)], None
    if type(model).make_proposer is SpeculatorModel.make_proposer:
        checks.append(Check("engine", None, "the algorithm has no make_proposer: it can only be trained"))
    elif drafts_tokens(model):
        with reporting(progress) as show:
            show("replaying in the engine", 0, None)
            with doing(f"replaying {len(cut_prompts)} prompts in the engine"):
                replayed = replay(model, verifier, cut_prompts, num_drafts, config)
                checks += engine_checks(replayed)
            if isinstance(config.vllm, str):
                checks.append(Check("vLLM", None, config.vllm))
            elif config.vllm is not None:
                show("replaying in vLLM", 0, None)
                with doing(f"replaying {len(cut_prompts)} prompts in vLLM, plainly and with drafts"):
                    checks += vllm_checks(config, config.vllm, verifier_path, num_drafts, replayed)
    return ParityReport(
        checkpoint=str(config.checkpoint),
        verifier=verifier_path,
        num_prompts=len(cut_prompts),
        num_tokens=config.max_tokens,
        num_speculative_tokens=num_drafts,
        acceptance_length=None if replayed is None else replayed.acceptance_length,
        checks=tuple(checks),
        time_s=time.perf_counter() - begun_s,
    )


def replay(
    model: SpeculatorModel,
    verifier: PreTrainedModel,
    prompts: list[list[int]],
    num_drafts: int,
    config: ParityConfig,
    proposer: Proposer | None = None,
) -> Replayed:
    """Decodes plainly and with drafts, then compares every round with the training forward. `proposer`: in place of the
    model's own."""
    batch_size, max_length = min(config.batch_size, len(prompts)), max(map(len, prompts)) + config.max_tokens
    if proposer is None:
        proposer = model.make_proposer(verifier, max_batch_size=batch_size, max_length=max_length)
    recorder = RecordingProposer(proposer, verifier_parts(verifier).config.vocab_size)
    sampling = SamplingParams(max_tokens=config.max_tokens, temperature=0.0, ignore_eos=True)
    plain = Engine(verifier, max_batch_size=batch_size, max_length=max_length).generate(prompts, sampling)
    engine = Engine(
        verifier, recorder, num_speculative_tokens=num_drafts, max_batch_size=batch_size, max_length=max_length
    )
    speculative = engine.generate(prompts, sampling)
    source = LocalSource(verifier, CaptureSpec(model.capture.aux_layer_ids, last_hidden=True))
    states = source.read([torch.tensor(text.token_ids, device=verifier.device) for text in recorder.texts])
    rounds = compare_rounds(model, recorder.texts, states, verifier.dtype)
    return Replayed(verifier, prompts, plain, speculative, rounds)


def engine_checks(replayed: Replayed) -> list[Check]:
    plain = [output.token_ids for output in replayed.plain]
    speculative = [output.token_ids for output in replayed.speculative]
    return [
        finite_check([*replayed.plain, *replayed.speculative]),
        drafts_check(replayed.rounds),
        text_check("engine text = plain text", plain, speculative, replayed.is_tie),
    ]


def vllm_checks(
    config: ParityConfig, target: VllmTarget, verifier: str, num_drafts: int, replayed: Replayed
) -> list[Check]:
    shared: dict[str, Any] = {
        "prompts": replayed.prompts,
        "max_tokens": config.max_tokens,
        "engine": {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code},
    }
    plain, speculative = decode_in_vllm(
        target.python, [VllmRun(verifier, **shared), speculative_run(target, num_drafts, **shared)], env=target.env
    )
    for name, run in (("vLLM serves the verifier", plain), ("vLLM serves the checkpoint", speculative)):
        if run.error is not None:
            return [Check(name, False, run.error)]
    ours = [output.stats.num_accepted for output in replayed.speculative]
    return [
        text_check("vLLM text = vLLM plain text", plain.token_ids, speculative.token_ids, replayed.is_tie),
        accepted_check("accepted: vLLM = engine", ours, speculative.accepted, num_drafts),
    ]


def recorded_verifier(model: SpeculatorModel, checkpoint: str) -> str:
    path = model.config.recorded_verifier
    if path is None:
        raise ValueError(f"{checkpoint} names no verifier; give it with --verifier")
    return path


def recorded_num_tokens(model: SpeculatorModel) -> int:
    recorded = model.config.speculators_config
    methods = recorded.proposal_methods if recorded is not None else []
    return max([getattr(method, "speculative_tokens", 0) or 0 for method in methods], default=0) or 1
