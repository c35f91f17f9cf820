"""Examines a drafter with its verifier: what it drafts, whether that is what was trained, and what would help.

answers     the verifier's own greedy text, the text that a drafter serves for
decoded     rounds of the engine, each compared with the training forward
probes      settings beside the drafter's own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any

import torch

from speculators.data_generation.sources import LocalSource
from speculators.decoding.engine import Engine
from speculators.decoding.request import RequestOutput
from speculators.decoding.settings import SamplingParams
from speculators.decoding.stats import DecodeStats
from speculators.decoding.target import DecodingTarget, served_temperature
from speculators.draft_vocab import DraftVocabMixin
from speculators.evaluation.config import DiagnoseConfig
from speculators.evaluation.diagnosis import (
    FAULTY,
    FIT,
    INACTIVE,
    MISMATCH,
    Accuracy,
    Cause,
    Text,
    changed_cause,
    is_other_embedding,
    is_rounded,
    measure,
)
from speculators.evaluation.diagnosis_probes import Rebuild, Texts, probed, read_around
from speculators.evaluation.diagnosis_texts import (
    FEW_ROWS,
    HOLES,
    TRAINING_TEXT,
    Judged,
    Row,
    Training,
    context_cause,
    fit_causes,
    judge,
    mask_cause,
    outside_of_training,
    policy_cause,
    temperature_cause,
    vocabulary_cause,
)
from speculators.evaluation.parity_checks import (
    Check,
    RecordingProposer,
    compare_rounds,
    drafts_check,
    drafts_tokens,
    vocabulary_check,
)
from speculators.interfaces import CaptureSpec
from speculators.model import SpeculatorModel
from speculators.utils.chat_template import ChatRenderer
from speculators.utils.progress import Progress
from speculators.verifier import verifier_parts
from speculators.verifier.config import end_token_ids

ROOM = 0.9
"""Where this share of all drafts is accepted, only faults that are proved are causes: little is left to be won."""
UNTOLD_TEMPERATURE = "the verifier names none; vLLM samples at 1 unless a request says another: see --temperature 1"
BATCH = 4
"""Prompts decoded together."""


@dataclass(frozen=True)
class Decoded:
    """What the engine did with the drafter, and how its drafts compare with the training forward's."""

    outputs: list[RequestOutput]
    check: Check | None
    """None: not compared."""

    @cached_property
    def stats(self) -> DecodeStats:
        return reduce(add, (output.stats for output in self.outputs))

    @property
    def answers(self) -> list[list[int]]:
        return [output.token_ids for output in self.outputs]

    @property
    def rounds_by_prompt(self) -> list[tuple[int, ...]]:
        """Prompt -> rounds that accepted at least i drafts, of those in which something was drafted."""
        return [(output.stats.num_drafts, *output.stats.accepted_per_position) for output in self.outputs]

    @property
    def by_position(self) -> list[float]:
        """Share of the rounds in which position i, and all before it, was accepted."""
        return [count / max(self.stats.num_rounds, 1) for count in self.stats.accepted_per_position]


@torch.no_grad()
def decode(
    model: SpeculatorModel,
    target: DecodingTarget,
    prompts: Sequence[Sequence[int]],
    num_drafts: int,
    sampling: SamplingParams,
    *,
    compared: bool = False,
) -> Decoded:
    """Drafts and decodes; with `compared`, every round is replayed in the training forward."""
    verifier, size = target.model, max(map(len, prompts)) + sampling.max_tokens
    batch = min(BATCH, len(prompts))
    proposer = model.make_proposer(verifier, max_batch_size=batch, max_length=size)
    recorder = RecordingProposer(proposer, verifier_parts(verifier).config.vocab_size)
    engine = Engine(verifier, recorder, num_speculative_tokens=num_drafts, max_batch_size=batch, max_length=size)
    outputs = list(engine.generate([list(prompt) for prompt in prompts], sampling))
    if not compared:
        return Decoded(outputs, None)
    source = LocalSource(verifier, CaptureSpec(model.capture.aux_layer_ids, last_hidden=True))
    states = source.read([torch.tensor(text.token_ids, device=verifier.device) for text in recorder.texts])
    return Decoded(outputs, drafts_check(compare_rounds(model, recorder.texts, states, verifier.dtype)))


def answer(target: DecodingTarget, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The verifier's greedy answers."""
    size = max(map(len, prompts)) + max_tokens
    engine = Engine(target.model, max_batch_size=min(BATCH, len(prompts)), max_length=size)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return [output.token_ids for output in engine.generate([list(prompt) for prompt in prompts], sampling)]


@dataclass
class Examination:
    """One drafter, its verifier, its training text and the prompts that it drafts for; `causes` fills the rest."""

    model: SpeculatorModel
    target: DecodingTarget
    prompts: Sequence[Sequence[int]]
    training_rows: Sequence[Row]
    training: Training
    num_drafts: int
    config: DiagnoseConfig
    rebuilt: Rebuild
    measured: dict[str, Any] = field(default_factory=dict)
    not_examined: dict[str, str] = field(default_factory=dict)

    def causes(self, show: Progress) -> list[Cause]:
        """Raises `ValueError` where verifier and drafter do not run together."""
        decoded, found = self.drafting_causes(show)
        show("reading the answers and the training text", 0, None)
        # the engine's text is the verifier's, whatever is drafted
        answers = answer(self.target, self.prompts, self.config.max_tokens) if decoded is None else decoded.answers
        pairs = [(prompt, said) for prompt, said in zip(self.prompts, answers, strict=True) if len(said) > 1]
        answered = [([*prompt, *said], [0] * len(prompt) + [1] * len(said)) for prompt, said in pairs]
        new, known = self.read(answered), self.read(self.training_rows)
        own_ids = self.model.capture.aux_layer_ids
        base = measure(self.model, new, own_ids) if new else None
        if base is None:
            self.not_examined["training forward"] = "it reports no accuracy by position, so nothing can be probed"
            return found + self.text_causes(new, known, None, None, has_room=True)
        self.measured["right by position after true states"] = base.by_position
        on_known = measure(self.model, known, own_ids) if known else None
        show("probing neighbouring settings", 0, None)
        texts = Texts(new, known if on_known is not None else [], base, on_known)
        repairs = list(probed(self.model, self.target.model, texts, self.rebuilt))
        found += [repair.cause for repair in repairs]
        most = self.num_drafts if decoded is None else decoded.stats.num_drafted / max(decoded.stats.num_rounds, 1)
        length = base.acceptance_length if decoded is None else decoded.stats.acceptance_length
        causes = self.text_causes(new, known, base, on_known, has_room=length - 1 < ROOM * most)
        # with other masks, or holes in the training text itself, other tokens are judged than in validation
        if not any(cause.name == "mask" or outside_of_training(cause) > HOLES for cause in causes):
            found += self.changed_causes(known, on_known, [repair.on_known for repair in repairs])
        # what is wrong with drafter or verifier explains how well they fit a text
        explained = any(cause.rank <= FAULTY for cause in found)
        is_other = any(cause.name in ("verifier", "quantised-target") for cause in found)
        found += [c for c in causes if not ((explained and c.rank == FIT) or (is_other and c.name == "off-policy"))]
        return found + self.temperature_causes(known, new, decoded)

    def changed_causes(
        self, known: Sequence[Text], on_known: Accuracy | None, repaired: Sequence[Accuracy | None]
    ) -> list[Cause]:
        """Compares with what validation recorded beside the weights."""
        if on_known is None or self.training.validation is None or self.training.num_validated < FEW_ROWS:
            return []
        verifier = self.target.model
        is_surprised = judge(verifier, known, None).excess().low > 0  # a text of its own does not surprise it
        is_other = is_other_embedding(self.model, verifier)
        not_its = "the copied embedding" if is_other else "the training text" if is_surprised else None
        cause = changed_cause(on_known, self.training.validation, repaired, not_its, rounded=is_rounded(verifier))
        return [] if cause is None else [cause]

    def read(self, rows: Sequence[Row]) -> list[Text]:
        return read_around(self.target.model, rows, self.model.capture.aux_layer_ids)

    def drafting_causes(self, show: Progress) -> tuple[Decoded | None, list[Cause]]:
        """Decodes with the drafter; whether it drafts, and drafts what the training forward says."""
        mapped = vocabulary_check(self.model)
        found = []
        if mapped.passed is False:
            fix = "take d2t and t2d from where the drafter was trained, or write offsets into d2t"
            sentence = f"drafts become other tokens than in training: {mapped.detail}"
            found.append(Cause("vocabulary-map", sentence, {mapped.name: mapped.detail}, fix, FAULTY, 20.0))
        if type(self.model).make_proposer is SpeculatorModel.make_proposer or not drafts_tokens(self.model):
            self.not_examined["decoding"] = "the drafter cannot draft"
            return None, found
        show("drafting and decoding", 0, None)
        sampling = SamplingParams(max_tokens=self.config.max_tokens, temperature=0.0)
        decoded = decode(self.model, self.target, self.prompts, self.num_drafts, sampling, compared=True)
        stats, check = decoded.stats, decoded.check
        self.measured |= {
            "acceptance length": stats.acceptance_length,
            "accepted by position": decoded.by_position,
            "draft tokens per round": self.num_drafts,
        }
        if stats.num_dropped_drafts > stats.num_drafted:
            sentence = f"{stats.num_dropped_drafts} drafts were dropped: their scores are not finite, or no tokens"
            fix = "look for the damaged weights with `speculators check --deep`"
            evidence = {"dropped": stats.num_dropped_drafts, "offered": stats.num_drafted}
            found.append(Cause("inactive", sentence, evidence, fix, INACTIVE, 1.0))
        elif check is not None and check.passed is False and mapped.passed is not False:
            sentence = f"the engine drafts other tokens than training: {check.detail}"
            fix = "compare them with `speculators verify`; if the files are whole, report it: it is a defect"
            found.append(Cause("train-serve-mismatch", sentence, {check.name: check.detail}, fix, MISMATCH, 1.0))
        return decoded, found

    def text_causes(
        self,
        new: Sequence[Text],
        known: Sequence[Text],
        base: Accuracy | None,
        on_known: Accuracy | None,
        *,
        has_room: bool,
    ) -> list[Cause]:
        """Judges the training text, and the drafter on it against new text."""
        verifier, model = self.target.model, self.model
        kept_V = model.t2d if isinstance(model, DraftVocabMixin) else None
        judged: dict[str, Judged] = {"the answers to the prompts": judge(verifier, new, kept_V)} if new else {}
        if known:
            judged[TRAINING_TEXT] = own = judge(verifier, known, kept_V)
            self.measured |= {
                "training tokens that are the verifier's likeliest": own.mean("likeliest"),
                "surprise of the training text beyond its entropy": own.excess().value,
            }
        else:
            self.not_examined["training text"] = "the prepared data is not known: name it with --data"
        if not has_room:
            return []
        found: list[Cause | None] = []
        if known:
            found += [self.mask_cause(), policy_cause(judged[TRAINING_TEXT])]
        if on_known is not None:
            self.measured["right by position, training text"] = on_known.by_position
        if base is not None:
            fit = fit_causes(on_known, base, self.training)
            found += [vocabulary_cause(judged, base, fit), self.context_cause(new), *fit]
        return [cause for cause in found if cause is not None]

    def mask_cause(self) -> Cause | None:
        tokenizer = self.target.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            self.not_examined["masks"] = "the tokenizer has no chat template to compare them with"
            return None
        ends = end_token_ids(self.target.name, tokenizer, self.config.trust_remote_code) if self.target.name else ()
        return mask_cause(self.training_rows, ChatRenderer(tokenizer), ends)

    def context_cause(self, new: Sequence[Text]) -> Cause | None:
        """Compares the accuracy behind the longest training row with the accuracy before it."""
        limit = self.training.longest
        if limit is None or not any(len(text.token_ids_T) > limit for text in new):
            return None
        positions = [torch.arange(len(text.token_ids_T), device=text.token_ids_T.device) for text in new]
        ids = self.model.capture.aux_layer_ids
        before = measure(self.model, [t.only(at_T < limit) for t, at_T in zip(new, positions, strict=True)], ids)
        behind = measure(self.model, [t.only(at_T >= limit) for t, at_T in zip(new, positions, strict=True)], ids)
        assert before is not None and behind is not None
        return context_cause(before, behind, limit, "the longest training row")

    def temperature_causes(self, known: Sequence[Text], new: Sequence[Text], decoded: Decoded | None) -> list[Cause]:
        """Decodes again at the temperature of serving."""
        temperature = served_temperature(self.target) if self.config.temperature is None else self.config.temperature
        if temperature is None:
            self.not_examined["temperature"] = UNTOLD_TEMPERATURE
            return []
        self.measured["temperature of serving"] = temperature
        if not temperature or decoded is None:
            return []
        sampling = SamplingParams(max_tokens=self.config.max_tokens, temperature=temperature, seed=0)
        sampled = decode(self.model, self.target, self.prompts, self.num_drafts, sampling)
        ceiling = judge(self.target.model, new, None, temperature).mean("top_prob")
        trained = judge(self.target.model, known, None) if known else None
        lengths = decoded.stats.acceptance_length, sampled.stats.acceptance_length
        self.measured["acceptance length at the temperature of serving"] = lengths[1]
        cause = temperature_cause(temperature, *lengths, ceiling, trained)
        return [] if cause is None else [cause]
