"""The gate passes every algorithm as it is and fails what is broken on purpose, naming the first round that differs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators.evaluation.config import ParityConfig
from speculators.evaluation.parity import ParityError, check_parity
from speculators.evaluation.parity_checks import (
    RoundsCompared,
    accepted_check,
    compare_drafts,
    drafts_check,
    text_check,
)
from speculators.interfaces import CaptureSpec
from speculators.model import SpeculatorModel
from speculators.models.feedback_proposer import FeedbackProposer

PROMPTS = [[5, 9, 3, 8], [7] * 12, [1, 2], [30, 31, 32, 33, 34]]
CASES = {
    "eagle3": {"draft_vocab_size": 40, "draft_arch": "llama"},
    "eagle3, qwen3, whole vocabulary": {"num_layers": 2},
    "peagle": {"draft_vocab_size": 40, "mask_token_id": 0},
    "dflash": {"block_size": 5, "num_layers": 2, "mask_token_id": 0, "draft_vocab_size": 40},
    "dspark": {"block_size": 4, "num_layers": 1, "mask_token_id": 0},
    "mtp": {},
    "eagle": {},
    "medusa": {},
    "mlp": {},
}
DRAFTS, TEXT, VOCABULARY = "drafts: training = engine", "engine text = plain text", "draft vocabulary: d2t = t2d"


@pytest.fixture
def gate(make_checkpoint):
    def run(case: str, checkpoint: str | None = None, **changes):
        checkpoint = checkpoint or make_checkpoint(case.split(",")[0], **CASES[case])
        settings = {"checkpoint": checkpoint, "max_tokens": 16, "batch_size": 2, "device": "cpu", **changes}
        report = check_parity(ParityConfig(**settings), PROMPTS)
        return report, {check.name: check for check in report.checks}

    return run


@pytest.mark.parametrize("case", CASES)
def test_every_algorithm_drafts_what_it_was_trained_to(gate, case):
    """Four prompts on two rows: rows of different lengths, rows taken over by another prompt."""
    report, checks = gate(case)
    assert report.passed, report.failures
    assert checks[DRAFTS].passed is True and checks[TEXT].passed is True
    assert checks[VOCABULARY].passed is (True if "draft_vocab_size" in CASES[case] else None)
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize("case", ["mtp", "eagle", "dflash", "mlp"])
def test_a_checkpoint_in_bfloat16_passes_beside_a_verifier_that_is_not(gate, make_checkpoint, case):
    """What `train` writes. Embedding, norm and head are the verifier's, which has more digits."""
    flags = {key: value for key, value in CASES[case].items() if key != "draft_vocab_size"}
    checkpoint = Path(make_checkpoint(case, **flags))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}))
    report, _ = gate(case, str(checkpoint), max_tokens=40)
    assert report.passed, report.failures


def broken_proposers(monkeypatch, break_it):
    """Every proposer made from now on is what `break_it` makes of it."""
    for name in {case.split(",")[0] for case in CASES}:
        cls = SpeculatorModel.get_class(name)
        whole = cls.make_proposer

        def make(self, verifier, *, whole=whole, **sizes):
            return break_it(whole(self, verifier, **sizes))

        monkeypatch.setattr(cls, "make_proposer", make)


class StatesOneLate:
    """Pairs each token with the state before the one that predicted it."""

    def __init__(self, inner):
        self.inner, self.capture = inner, inner.capture

    def propose(self, committed, num_tokens, sampling):
        late = committed.states_BTD.roll(1, dims=1)
        return self.inner.propose(replace(committed, states_BTD=late), num_tokens, sampling)


@pytest.mark.parametrize("case", CASES)
def test_states_off_by_one_are_found_in_every_algorithm(gate, monkeypatch, case):
    broken_proposers(monkeypatch, StatesOneLate)
    report, checks = gate(case)
    assert not report.passed and checks[TEXT].passed is True  # the text is the verifier's all the same
    assert re.search(r"first: prompt 0, round [01] \(after [56] tokens\), draft \d: drafted", checks[DRAFTS].detail)
    with pytest.raises(ParityError, match=r"fails the parity gate: drafts: training = engine: \d+ of \d+ drafts"):
        raise ParityError(report)


def test_other_layers_than_the_trained_ones_are_found(gate, monkeypatch):
    def shift(proposer):
        proposer.capture = CaptureSpec(aux_layer_ids=tuple(i + 1 for i in proposer.capture.aux_layer_ids))
        return proposer

    broken_proposers(monkeypatch, shift)
    for case in ("eagle3", "peagle", "dflash"):
        assert gate(case)[1][DRAFTS].passed is False


def test_drafted_tokens_one_position_too_far_are_found(gate, monkeypatch):
    """A shift of all positions would be none: rotary positions are relative. Here steps of one token are shifted."""
    step = FeedbackProposer.step

    def too_far(self, token_ids_BT, hidden_BTH, span):
        if span.num_columns > 1:
            return step(self, token_ids_BT, hidden_BTH, span)
        tables = self.network.rope.tables(span.end + 1, self.device, self.dtype)
        self.cache.span = span
        return self.network.step(
            token_ids_BT, hidden_BTH, tables.at(span.positions(self.device) + 1), self.layer_attention
        )

    monkeypatch.setattr(FeedbackProposer, "step", too_far)
    for case in ("eagle3", "eagle"):
        _, checks = gate(case)
        assert checks[DRAFTS].passed is False and checks[TEXT].passed is True


@pytest.mark.parametrize("case", ["eagle3", "peagle", "dflash"])
def test_a_vocabulary_map_of_ids_in_place_of_offsets_is_found(gate, make_checkpoint, case):
    checkpoint = make_checkpoint(case, **CASES[case])
    file = f"{checkpoint}/model.safetensors"
    tensors = load_file(file)
    ids = tensors["t2d"].nonzero().flatten()
    save_file({**tensors, "d2t": ids}, file, metadata={"format": "pt"})
    report, checks = gate(case, checkpoint)
    assert checks[VOCABULARY].passed is False and "d2t must hold offsets" in checks[VOCABULARY].detail
    assert not report.passed and report.acceptance_length is None  # these drafts are no tokens: nothing to replay


@pytest.mark.parametrize("case", ["eagle3", "dflash"])
def test_two_tokens_changed_in_the_vocabulary_map_are_found_by_the_drafts_too(gate, make_checkpoint, case):
    checkpoint = make_checkpoint(case, **CASES[case])
    file = f"{checkpoint}/model.safetensors"
    tensors = load_file(file)
    ids = tensors["t2d"].nonzero().flatten()
    save_file({**tensors, "d2t": ids.roll(1) - torch.arange(len(ids))}, file, metadata={"format": "pt"})
    _, checks = gate(case, checkpoint)
    assert checks[VOCABULARY].passed is False and checks[DRAFTS].passed is False


def test_a_gap_below_rounding_is_a_tie_and_any_other_a_difference():
    logits_KV = torch.tensor([[1.0, 10.0, 9.9995], [3.0, 1.0, 2.0], [0.0, 1.0, 0.5]])
    found = RoundsCompared()
    compare_drafts(found, "here", logits_KV, [2, 0, 1], tolerance=1e-4)
    assert (found.num_drafts, found.num_ties, found.num_differing) == (3, 1, 0)
    assert found.largest_tie == pytest.approx(5e-4, rel=1e-2)
    compare_drafts(found, "there", logits_KV, [2, 2, 1], tolerance=1e-5)
    assert found.num_differing == 2 and "there, draft 1: drafted 2, training says 1" in found.first_difference
    compare_drafts(found, "where", logits_KV[:1], [1, 1, 7], tolerance=1e-5)
    assert found.num_differing == 4


def test_what_compares_nothing_does_not_pass():
    assert drafts_check(RoundsCompared()).passed is False
    assert drafts_check(RoundsCompared(is_comparable=False)).passed is None
    assert drafts_check(RoundsCompared(num_drafts=10, num_rounds=5, num_ties=2)).passed is False
    assert drafts_check(RoundsCompared(num_drafts=30, num_rounds=5, num_ties=2)).passed is True


def test_texts_may_part_at_a_tie_only():
    plain, found = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 7, 7]]
    assert text_check("t", plain, plain, lambda *a: False).passed is True
    assert text_check("t", plain, found, lambda *a: False).detail == "prompt 1, token 1: [7], plain decoding [5]"
    asked = []
    assert "1 part ways" in text_check("t", plain, found, lambda *a: asked.append(a) or True).detail
    assert asked == [(1, 1, 7)]
    assert text_check("t", plain, [[1, 2], [4, 5, 6]], lambda *a: True).passed is False


def test_accepted_drafts_may_differ_by_three_percent_or_one_round():
    assert accepted_check("a", [100, 200], [101, 207], num_drafts=4).passed is True
    assert accepted_check("a", [100, 200], [101, 209], num_drafts=4).passed is False
    assert accepted_check("a", [3, 2], [3, 5], num_drafts=4).passed is True
    assert "the same for 1 of 2 prompts" in accepted_check("a", [3, 2], [3, 5], num_drafts=4).detail
