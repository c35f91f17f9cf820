"""Validation decodes held-out prompts: the figure is the engine's, and training goes on as if nothing was decoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import speculators
from speculators.data_generation import PreparedData
from speculators.decoding import Engine, SamplingParams
from speculators.decoding.stats import DecodeStats
from speculators.evaluation.measurement import decode_greedily
from speculators.model import SpeculatorModel
from speculators.train import validation
from speculators.train.config import ConfigError, TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.events import Note, Started, StepDone, Validated, line
from speculators.train.logger import TrainingProgress
from speculators.train.run import train
from speculators.train.validation import MAX_TOKENS, PromptDecoder
from speculators.verifier import load_verifier

ALGORITHMS = sorted(file.parent.name for file in Path(speculators.__file__).parent.glob("models/*/core.py"))
READ_AUX_STATES = ("eagle3", "peagle", "dflash", "dspark")


@pytest.fixture(scope="module")
def verifier(verifier_path):
    return load_verifier(str(verifier_path), dtype=torch.float32)


def settings(algorithm, verifier_path, data_path, save_path, **changes):
    return TrainConfig.from_flat(
        {
            "speculator_type": algorithm,
            "verifier_name_or_path": str(verifier_path),
            "data_path": str(data_path),
            "save_path": str(save_path),
            "total_seq_len": 128,
            "max_steps": 4,
            "epochs": 1,
            "checkpoint_freq": 0.5,
            "lr": 0.01,
            "hidden_states_dtype": "float32",
            "parity_gate": False,
            "contract_check": False,
            **({"target_layer_ids": [1, 3, 5]} if algorithm in READ_AUX_STATES else {}),
            **changes,
        }
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_is_the_same_bit_for_bit(algorithm, verifier_path, verifier, data_path, tmp_path):
    weights, heard = [], []
    for num_prompts in (0, 3):
        config = settings(algorithm, verifier_path, data_path, tmp_path / str(num_prompts), eval_prompts=num_prompts)
        result = train(config, verifier=verifier, on_event=heard.append)
        weights.append(load_file(result.checkpoint / "master_weights.fp32"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    validated = [event.metrics.get("decoded_acceptance_length") for event in heard if isinstance(event, Validated)]
    half = len(validated) // 2
    assert half >= 2 and validated[:half] == [None] * half and all(length >= 1 for length in validated[half:])
    metrics = json.loads((result.checkpoint / "val_metrics.json").read_text())
    assert metrics["decoded_acceptance_length"] in validated


@pytest.fixture(scope="module")
def run(verifier_path, verifier, data_path, tmp_path_factory):
    """(result, events) of a run that decoded three of the four held-out prompts."""
    heard = []
    config = settings(
        "eagle3",
        verifier_path,
        data_path,
        tmp_path_factory.mktemp("run"),
        eval_prompts=3,
        max_steps=None,
        epochs=8,
        checkpoint_freq=8,
    )
    return train(config, verifier=verifier, on_event=heard.append), heard


def trained_model(result) -> SpeculatorModel:
    """The checkpoint with its fp32 weights, as it was validated."""
    model = SpeculatorModel.from_pretrained(result.checkpoint, dtype=torch.float32)
    model.load_state_dict(load_file(result.checkpoint / "master_weights.fp32"), strict=False)
    return model


def test_the_figure_is_tokens_per_round_of_the_held_out_prompts(run, verifier, data_path):
    result, _ = run
    rows = PreparedData.open(data_path).dataset()
    prompts = [row["input_ids"][:3].tolist() for row in rows.select(range(36, 39))]
    proposer = trained_model(result).make_proposer(verifier, max_batch_size=1, max_length=256)
    engine = Engine(verifier, proposer, num_speculative_tokens=3, max_batch_size=1, max_length=256)
    num_tokens, num_rounds = 0, 0
    for prompt in prompts:
        rounds = [len(event.token_ids) for event in engine.stream([prompt], SamplingParams(max_tokens=MAX_TOKENS))]
        num_tokens, num_rounds = num_tokens + sum(rounds[1:]), num_rounds + len(rounds[1:])
    # the token limit cuts the last round of an answer short: at most three tokens of each
    assert num_tokens / num_rounds <= result.metrics["decoded_acceptance_length"] <= (num_tokens + 9) / num_rounds
    assert num_rounds < num_tokens


def test_it_is_in_the_log_and_stays_in_the_bar(run):
    _, heard = run
    last = [event for event in heard if isinstance(event, Validated)][-1]
    said = f", decoded {last.metrics['decoded_acceptance_length']:.2f}"
    assert line(last).endswith(said)
    bar = TrainingProgress()
    bar(next(event for event in heard if isinstance(event, Started)))
    bar(last)
    bar(replace([event for event in heard if isinstance(event, StepDone)][-1], waiting=0.0))
    assert bar.tasks[0].description.endswith(said)


def test_ranks_share_the_prompts_and_add_their_counts(run, verifier, data_path):
    result, _ = run
    model, rows = trained_model(result), PreparedData.open(data_path).dataset()
    decoder = PromptDecoder.of(model, verifier, rows, 3)
    shares = []

    class Recorded(Ranks):
        def add_up(self, values):
            shares.append(values.clone())

    for rank in range(4):  # the last has none
        decoder.measure(model, Recorded(rank, 4))
    accepted, rounds = sum(shares).tolist()
    assert decoder.measure(model, Ranks()) == {"decoded_acceptance_length": 1 + accepted / rounds}


def test_numbers_that_decoding_draws_are_given_back(run, verifier, monkeypatch):
    def draw(*args, **settings):
        torch.rand(3)
        return DecodeStats()

    monkeypatch.setattr(validation, "decode_greedily", draw)
    model, before = trained_model(run[0]), torch.get_rng_state()
    assert PromptDecoder(verifier, [[1]]).measure(model, Ranks()) == {}
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_are_cut_to_the_verifiers_positions(run, verifier):
    ids = [1, 2, 3] * 98
    model, limits = trained_model(run[0]), {"num_drafts": 2, "max_tokens": 4}
    whole, cut = (decode_greedily(model, verifier, [prompt], **limits) for prompt in (ids, ids[-252:]))
    assert whole.rounds == cut.rounds and cut.num_rounds


def test_stored_states_do_not_keep_prompts_from_being_decoded(run, verifier_path, verifier, data_path, tmp_path):
    made = {"cache_hidden_states": True, "hidden_states_path": str(tmp_path / "states")}
    train(settings("medusa", verifier_path, data_path, tmp_path / "a", max_steps=None, **made), verifier=verifier)
    heard = []
    stored = {**made, "cache_hidden_states": False, "on_missing": "raise", "eval_prompts": 1}
    result = train(settings("medusa", verifier_path, data_path, tmp_path / "b", **stored), on_event=heard.append)
    assert "decoded_acceptance_length" in result.metrics
    assert any("loaded to decode --eval-prompts" in event.text for event in heard if isinstance(event, Note))


def test_what_cannot_be_decoded_is_refused(verifier_path, verifier, data_path, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"eval_prompts are held-out rows, but train_data_ratio=1\.0 leaves none"):
        settings("mlp", verifier_path, data_path, tmp_path, eval_prompts=1, train_data_ratio=1.0)
    monkeypatch.setattr(SpeculatorModel.get_class("mlp"), "make_proposer", SpeculatorModel.make_proposer)
    with pytest.raises(ValueError, match="--eval-prompts 1: 'mlp' can only be trained"):
        train(settings("mlp", verifier_path, data_path, tmp_path, eval_prompts=1), verifier=verifier)
