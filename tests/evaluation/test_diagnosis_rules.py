"""The rules of `diagnose` on made-up numbers: what separates one cause from another."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import GenerationConfig

from speculators.checkpoint.findings import error, warning
from speculators.cli.app import main
from speculators.data_generation.masks import offset_of, supervised_spans
from speculators.decoding.request import RequestOutput
from speculators.decoding.stats import DecodeStats
from speculators.decoding.target import served_temperature
from speculators.diagnosis import better_checkpoint
from speculators.evaluation.diagnosis import FAULTY, FIT, Accuracy, Cause, causes_of_check, changed_cause, ranked
from speculators.evaluation.diagnosis_drafter import Decoded
from speculators.evaluation.diagnosis_server import collapsed, distance, expected_curve
from speculators.evaluation.diagnosis_texts import (
    Judged,
    Training,
    context_cause,
    fit_causes,
    temperature_cause,
    vocabulary_cause,
)
from speculators.evaluation.server_check import SampledLaw, Score
from speculators.evaluation.server_client import Served
from speculators.train.checkpointer import CURVE_FILE
from speculators.train.events import DECODED


def accuracy(first: float, second: float = 0.0, num_texts: int = 8, num: int = 100) -> Accuracy:
    right_NK = np.tile([first * num, second * num], (num_texts, 1))
    return Accuracy(right_NK, np.full((num_texts, 2), float(num)), np.ones(num_texts))


def names(*args) -> list[str]:
    return [cause.name for cause in fit_causes(*args)]


def test_the_place_where_accuracy_falls_names_the_cause():
    told = Training(validation={"full_acc_0": 0.3}, num_validated=40)
    assert names(accuracy(0.9), accuracy(0.28), told) == ["too-little-data"]  # known 0.9, validation 0.3, new 0.28
    told = Training(validation={"full_acc_0": 0.85}, num_validated=40)
    assert names(accuracy(0.9), accuracy(0.28), told) == ["other-domain"]
    few = Training(validation={"full_acc_0": 0.85}, num_validated=2)  # two rows say nothing
    assert names(accuracy(0.9), accuracy(0.28), few) == ["too-little-data"]
    assert names(accuracy(0.3), accuracy(0.28), Training()) == ["undertrained"]
    assert names(accuracy(0.8), accuracy(0.7), Training()) == []
    better = Training(best=("run/3", 2.4, 1.9))
    assert names(accuracy(0.8), accuracy(0.7), better) == ["overfitted"]


def test_a_context_behind_the_trained_length_is_a_cause_only_where_drafts_get_worse():
    assert context_cause(accuracy(0.8, 0.6), accuracy(0.3, 0.1), 64, "limit").name == "context"
    assert context_cause(accuracy(0.8, 0.6), accuracy(0.78, 0.6), 64, "limit") is None
    assert context_cause(accuracy(0.8, 0.6), accuracy(0.3, 0.1, num=5), 64, "limit") is None  # hardly anything is there


def test_fewer_right_drafts_than_in_validation_are_a_change_and_a_grid_of_weights_says_rounded():
    validation = {"full_acc_0": 0.8, "full_acc_1": 0.6}

    def cause(not_its: str | None, rounded: bool = False) -> Cause:
        return changed_cause(accuracy(0.5, 0.2), validation, [], not_its, rounded=rounded)

    assert cause(None).name == cause(None, rounded=True).name == "changed-since-training"
    assert cause("the training text").name == "verifier"
    rounded = cause("the training text", rounded=True)
    assert rounded.name == "quantised-target" and "another model" in rounded.sentence  # both are said
    assert changed_cause(accuracy(0.8, 0.6), validation, [], "the training text", rounded=True) is None


def test_accuracy_at_positions_that_are_judged_less_often_counts_as_much_as_in_validation():
    """P-EAGLE judges fewer tokens the deeper they are; validation divides each position by its own number."""
    right_NK, judged_NK = np.tile([80.0, 30.0], (8, 1)), np.tile([100.0, 50.0], (8, 1))
    found = Accuracy(right_NK, judged_NK, np.ones(8))
    assert changed_cause(found, {"full_acc_0": 0.8, "full_acc_1": 0.6}, [], None, rounded=False) is None


def test_holes_of_the_vocabulary_are_a_cause_only_where_the_texts_surely_have_them():
    def judged(outside_N: list[float]) -> Judged:
        zeros_N = np.zeros(len(outside_N))
        return Judged(np.full(len(outside_N), 25.0), *[zeros_N] * 5, np.array(outside_N))

    def cause(outside_N: list[float]) -> Cause | None:
        return vocabulary_cause({"answers": judged(outside_N)}, accuracy(0.6), [])

    assert cause([0.0, 0.0, 7.0, 0.0, 0.0]) is None  # 5.6 % by one text
    assert cause([7.0, 6.0, 8.0, 5.0, 7.0]).name == "vocabulary-holes"


def test_a_temperature_is_a_cause_from_a_quarter_of_the_drafts_on():
    assert temperature_cause(1.0, 3.0, 2.4, 0.7, None).name == "temperature"
    assert temperature_cause(1.0, 3.0, 2.6, 0.7, None) is None
    assert temperature_cause(0.0, 3.0, 3.0, 0.7, None) is None


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({}, None),
        ({"do_sample": False}, None),  # vLLM samples at 1 all the same
        ({"temperature": 0.6}, 0.6),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"do_sample": True}, 1.0),
    ],
)
def test_the_temperature_of_serving_is_that_of_the_generation_config_with_or_without_do_sample(values, temperature):
    target = SimpleNamespace(model=SimpleNamespace(generation_config=GenerationConfig(**values)))
    assert served_temperature(target) == temperature


def test_spans_and_their_distance_from_an_answer():
    assert supervised_spans([0, 1, 1, 0, 1]) == [(1, 3), (4, 5)]
    assert [offset_of(4, places) for places in ({4}, {3, 20}, {6}, {90}, set())] == ["0", "+1", "-2", "none", "none"]


def test_causes_are_ranked_by_proof_then_strength_and_joined_by_name():
    found = ranked(
        [
            Cause("too-little-data", "", {}, "", FIT, 9.0),
            Cause("rope", "", {"a": 1}, "", FAULTY, 0.2),
            Cause("norms", "", {}, "", FAULTY, 0.3),
            Cause("rope", "by check", {"b": 2}, "", FAULTY, 10.0),
        ]
    )
    assert [cause.name for cause in found] == ["rope", "norms", "too-little-data"]
    assert found[0].sentence == "by check" and found[0].evidence == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("finding", "name"),
    [
        (error("config-changed", "transformer_layer_config.rope_theta", "1", "", ""), "rope"),
        (error("config-changed", "eagle_aux_hidden_state_layer_ids", "1", "", ""), "aux-layers"),
        (error("tensor-missing", "layers.0.hidden_norm.weight", "", "", ""), "norms"),
        (error("verifier-differs", "x: model.norm.weight", "", "", ""), "verifier"),
        (warning("verifier-precision", "x", "", "", ""), "quantised-target"),
        (error("weights-unreadable", "model.safetensors", "", "", ""), "checkpoint"),
        (warning("record-missing", "training_record.json", "", "", ""), None),
    ],
)
def test_findings_of_the_check_become_causes(finding, name):
    assert [cause.name for cause in causes_of_check([finding])] == ([] if name is None else [name])


def test_the_law_of_sampled_tokens_has_the_stated_false_alarms_and_power():
    """Draws of one Bernoulli law, and of one that is wrong by the share that the test says it finds."""
    rng, p, num = np.random.default_rng(0), 0.7, 400

    def failures(true_p: float) -> float:
        draws = rng.random((2000, num)) < true_p
        laws = [
            SampledLaw(Score(float(hits - num * p), num * p * (1 - p)), Score(0.0, 1.0), num) for hits in draws.sum(1)
        ]
        return float(np.mean([not law.passed for law in laws]))

    found = SampledLaw(Score(0.0, num * p * (1 - p)), Score(0.0, 1.0), num).found_with_power
    assert failures(p) < 0.01
    both_sides = [failures(p - found), failures(p + found)]  # of the law's own variance; theirs are wider and narrower
    assert np.mean(both_sides) == pytest.approx(0.9, abs=0.05) and min(both_sides) > 0.85


def test_curves_are_compared_position_by_position():
    half, full = accuracy(0.4, 0.1), accuracy(0.8, 0.4)
    assert expected_curve([0.6, 0.4], full, half) == pytest.approx([0.3, 0.1])
    assert collapsed([0.8, 0.1], [0.8, 0.6]) and not collapsed([0.8, 0.5], [0.8, 0.6])


def counted(token_ids: list[int], *accepted: int) -> RequestOutput:
    """An answer whose rounds drafted two tokens and accepted so many."""
    stats = DecodeStats(Counter((2, 2, number) for number in accepted), len(token_ids))
    return RequestOutput([], token_ids, stats=stats)


def test_counts_of_a_server_are_compared_prompt_by_prompt():
    """Sums that are equal hide drafts that are not; answers that part ways at a tie have other rounds."""
    decoded = Decoded([counted([1, 2], 2, 0), counted([3, 4], 1, 1)], None)

    def served(answers: list[list[int]], accepted: list[tuple[int, ...]]) -> Served:
        return Served(answers, DecodeStats(), 4, accepted, True)

    assert decoded.rounds_by_prompt == [(2, 1, 1), (2, 2, 0)]
    answers = decoded.answers
    assert distance(decoded, served(answers, [(2, 1, 1), (2, 2, 0)])) == 0
    assert distance(decoded, served(answers, [(2, 2, 0), (2, 1, 1)])) == 2 / 4  # the sums are 4, 3 and 1 both times
    assert distance(decoded, served(answers, [(2, 1, 1), (3, 2, 0)])) == 1 / 4  # a round more, and as many accepted
    assert distance(decoded, served([[1, 2], [3, 5]], [(2, 1, 1), (2, 0, 0)])) == 0
    assert distance(decoded, served([[1, 9], [3, 5]], [(2, 1, 1), (2, 0, 0)])) == 1 / 2  # none is the same: the curves


def test_neither_checkpoint_nor_server_is_an_error_of_the_command_line(capsys):
    assert main(["diagnose"]) == 2
    assert "nothing to diagnose" in capsys.readouterr().err
    assert main(["diagnose", "--plain-url", "http://x:1"]) == 2


def test_a_better_epoch_is_found_beside_a_line_that_was_cut_off(tmp_path):
    epochs = [{"step": step, "epoch": step, "split": "val", DECODED: length} for step, length in ((1, 2.4), (2, 2.0))]
    lines = "".join(json.dumps(line) + "\n" for line in epochs)
    (tmp_path / CURVE_FILE).write_text(lines + '{"step": 3, "epo')
    assert better_checkpoint(tmp_path / "2", {DECODED: 2.0}) == ("epoch 1", 2.4, 2.0)
