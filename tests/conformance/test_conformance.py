"""What every algorithm must do, found by name and asked through public seams only. A new folder of `models/` is held to
it by existing; so is an algorithm of a third party (tests/fixtures/myalgo).

Shapes: B rows, T tokens, K drafts, V vocabulary.
"""

from __future__ import annotations

import json
import re
import shutil
import types
from typing import get_args

import pytest
import torch
from counting import BUILT_IN, HIDDEN, RING, SUCCESSOR, VOCAB, count_from, train_config, untrained
from golden import golden_path, what_is_written
from safetensors.torch import load_file, save_file

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.data_generation.sources import LocalSource
from speculators.decoding import Engine, SamplingParams
from speculators.deploy.check import check_checkpoint
from speculators.interfaces import CaptureSpec, Committed, DraftSampling
from speculators.train.data import CollateFn

PROMPTS = [count_from(RING[start], length) for start, length in ((0, 3), (7, 6), (20, 2), (11, 4))]
REDUCED = 20
"""Draft tokens of 32, where a drafter can do with fewer."""

ORACLE_DRAFTS = 4
"""Deeper drafts are learnt too, but not in so few steps."""


def generate(verifier, drafting, max_tokens=32, prompts=PROMPTS, sampling=None, **options):
    engine = Engine(verifier, drafting, max_batch_size=2, **options)
    sampling = SamplingParams(max_tokens=max_tokens, **(sampling or {}))
    outputs = engine.generate([list(prompt) for prompt in prompts], sampling)
    return [output.token_ids for output in outputs], engine.stats


def num_drafts_of(model):
    return max(method.speculative_tokens for method in model.config.speculators_config.proposal_methods)


def own_fields(config_class):
    """Those that a config class or its bases of this library declare; transformers' are not the contract's."""
    classes = [base for base in config_class.__mro__ if issubclass(base, SpeculatorModelConfig)]
    declared = {key for base in classes for key in base.__annotations__}
    return {key: field for key, field in config_class.model_fields.items() if key in declared}


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_config_json_says_everything_that_the_class_knows(name, trained):
    """Readers have other defaults than our classes: nothing but what may be null is left to be filled in.

    (The first test that asks for a trained drafter: what it takes is the training and its parity gate.)"""
    path = trained(name).checkpoint
    written = json.loads((path / "config.json").read_text())
    fields = own_fields(type(SpeculatorModel.from_pretrained(path).config))
    missing = fields.keys() - written.keys()
    assert not [key for key in missing if type(None) not in get_args(fields[key].annotation)]
    assert written["speculators_model_type"] == written["speculators_config"]["algorithm"] == name
    for key, field in fields.items():
        if field.annotation is bool:
            assert isinstance(written[key], bool), key
    nested = written.get("transformer_layer_config")
    if nested is not None:
        assert {"model_type", "hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps"} <= nested.keys()
        assert (nested["hidden_size"], nested["vocab_size"]) == (HIDDEN, VOCAB)


def test_a_checkpoint_is_loaded_and_saved_to_the_same_bits(name, trained, tmp_path):
    path = trained(name).checkpoint
    model = SpeculatorModel.from_pretrained(path)
    model.save_pretrained(tmp_path)
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert (path / "config.json").read_text() == (tmp_path / "config.json").read_text()
    state = SpeculatorModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", BUILT_IN, ids=BUILT_IN)
def test_files_hold_what_the_golden_ones_hold(name, counting_path, data_path, tmp_path):
    """Every option and every tensor. After a change on purpose: `python tests/conformance/golden.py`."""
    untrained(name, counting_path, data_path, tmp_path / "run").save_pretrained(tmp_path / "saved")
    path = golden_path(name)
    assert path.exists(), "a new folder: write its golden file with `python tests/conformance/golden.py`, and read it"
    assert what_is_written(tmp_path / "saved", counting_path) == json.loads(path.read_text())


def test_a_state_dict_without_a_tensor_is_not_saved_where_engines_would_serve_it(name, trained, tmp_path):
    """They would read uninitialised memory in its place."""
    path = trained(name).checkpoint
    model = SpeculatorModel.from_pretrained(path)
    on_disk = load_file(path / "model.safetensors").keys()
    assert SpeculatorModel.expected_tensors(model.config).keys() == on_disk
    if model.contract.served_format is None:
        return
    for missing in on_disk:
        state = {key: tensor for key, tensor in model.state_dict().items() if key != missing}
        with pytest.raises(ValueError, match=f"would lack .*{re.escape(missing)}"):
            model.save_pretrained(tmp_path, state_dict=state)
    assert not any(tmp_path.iterdir())


def test_the_check_before_serving_passes_it_and_misses_what_is_taken_away(name, trained, tmp_path):
    """vLLM's readers do not say that a tensor is missing; the contract of the algorithm must."""
    path = trained(name).checkpoint
    report = check_checkpoint(path)
    assert report.ok, report.errors
    tensors = load_file(path / "model.safetensors")
    missing = next((key for key in sorted(tensors) if "layers." in key), min(tensors))
    shutil.copytree(path, tmp_path / "damaged")
    kept = {key: tensor for key, tensor in tensors.items() if key != missing}
    save_file(kept, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    assert any(missing in str(found) for found in check_checkpoint(tmp_path / "damaged").errors)


# -- training ----------------------------------------------------------------------------------------------------------


def test_thirty_small_steps_lower_the_loss(name, trained):
    losses = trained(name).losses
    assert sum(losses[25:30]) / 5 < 0.7 * sum(losses[:2]) / 2


def packed_row(model, documents, verifier, length=48, supervised=None):
    """Documents as the trainer packs them; of those not in `supervised`, no token is."""
    states = LocalSource(verifier, CaptureSpec(model.capture.aux_layer_ids, last_hidden=True)).read(
        [torch.tensor(ids) for ids in documents]
    )
    samples = []
    for number, of_document in enumerate(states):
        num_tokens, last_TH = len(of_document.token_ids_T), of_document.last_hidden_TH
        counts = supervised is None or number in supervised
        samples.append(
            {
                "hidden_states": last_TH[:, :0] if of_document.aux_TD is None else of_document.aux_TD,
                "verifier_last_hidden_states": last_TH,
                "input_ids": of_document.token_ids_T,
                "loss_mask": torch.full((num_tokens,), int(counts)),
                "position_ids": torch.arange(num_tokens),
                "lengths": torch.tensor([num_tokens]),
            }
        )
    collate = CollateFn(length, HIDDEN, len(model.capture.aux_layer_ids), torch.float32, model.align)
    return collate(samples)


@pytest.mark.parametrize("own", [0, 1])
def test_what_is_packed_beside_a_document_does_not_matter(name, wandering, wandering_path, data_path, tmp_path, own):
    model = untrained(name, wandering_path, data_path, tmp_path)
    _, kwargs = type(model).get_trainer_kwargs(**train_config(name, wandering_path, data_path, tmp_path).flatten())
    generator = torch.Generator().manual_seed(3)
    first, second, other = (torch.randint(1, 31, (n,), generator=generator).tolist() for n in (15, 11, 15))
    pair, beside_another = [first, second], [first, second]
    beside_another[1 - own] = other[: len(pair[1 - own])]

    def loss(documents, supervised):
        row = packed_row(model, documents, wandering, supervised=supervised)
        torch.manual_seed(0)
        return model(**row, **kwargs)[1].item()

    assert loss(pair, [own]) == pytest.approx(loss(beside_another, [own]), rel=1e-6)
    assert loss(pair, [own]) == pytest.approx(loss([pair[own]], [0]), rel=1e-4)


# -- drafting ----------------------------------------------------------------------------------------------------------


def committed(token_ids, states_TD, num_seen=0):
    """What the engine hands over after `num_seen` tokens: a token and the state that predicted it in each row."""
    shifted_TD = torch.cat((torch.zeros_like(states_TD[:1]), states_TD[: len(token_ids) - 1]))
    new = torch.tensor([len(token_ids) - num_seen])
    return Committed(
        torch.tensor([token_ids[num_seen:]]), shifted_TD[None, num_seen:], new, torch.tensor([len(token_ids)])
    )


def test_training_and_proposer_give_the_same_logits(name, wandering, wandering_path, data_path, tmp_path):
    """Round by round: what is drawn from is the softmax of what training answers in the same places, and a drafter's
    own probabilities are that without a temperature."""
    model = untrained(name, wandering_path, data_path, tmp_path)
    proposer = model.make_proposer(wandering, max_batch_size=1, max_length=64)
    num_drafts = num_drafts_of(model)
    source = LocalSource(wandering, CaptureSpec(model.capture.aux_layer_ids, last_hidden=True))
    own_source = LocalSource(wandering, proposer.capture)
    own_probs: list[torch.Tensor] = []
    sampling = DraftSampling(torch.tensor([0.7]), torch.Generator().manual_seed(0), True, own_probs=own_probs)
    text, num_seen = [3, 9, 4, 1, 12], 0
    for _ in range(4):
        [mine] = own_source.read([torch.tensor(text)])
        states_TD = mine.aux_TD if proposer.capture.aux_layer_ids else mine.last_hidden_TH
        own_probs.clear()
        proposal = proposer.propose(committed(text, states_TD, num_seen), num_drafts, sampling)
        drafts = [token for token in proposal.token_ids_BK[0].tolist() if token >= 0]
        assert drafts
        [known] = source.read([torch.tensor([*text, *drafts])])
        known = types.SimpleNamespace(**vars(known))
        for field in ("aux_TD", "last_hidden_TH"):
            if getattr(known, field) is not None:
                getattr(known, field)[len(text) - 1 :] = 0.0  # what nobody knows when drafting
        logits_KV = model.draft_logits(known, len(drafts))
        if proposal.probs_BKV is None:
            assert drafts == logits_KV.argmax(-1).tolist()
        else:
            torch.testing.assert_close(proposal.probs_BKV[0], (logits_KV / 0.7).softmax(-1), atol=1e-5, rtol=1e-3)
            assert all(proposal.probs_BKV[0, k, token] > 0 for k, token in enumerate(drafts))
        if own_probs or name in BUILT_IN:  # one that was written from the guide alone need not know of them
            own_K = torch.cat([probs.view(1, -1) for probs in own_probs], 1)[0, : len(drafts)]
            expected_K = logits_KV.softmax(-1).gather(1, torch.tensor(drafts)[:, None])[:, 0]
            torch.testing.assert_close(own_K, expected_K, atol=1e-5, rtol=1e-3)
        num_seen, text = len(text), [*text, drafts[0], 7]


def test_greedy_text_is_the_verifiers_whatever_is_drafted(name, wandering, wandering_path, data_path, tmp_path):
    """Untrained drafts are mostly wrong: rejections, at every place."""
    untrained(name, wandering_path, data_path, tmp_path / "run").save_pretrained(tmp_path / "drafter")
    plain, _ = generate(wandering, None)
    drafted, stats = generate(wandering, {"model": str(tmp_path / "drafter")})
    assert drafted == plain
    assert stats.num_drafted > 0 and stats.acceptance_rate < 0.9
    adjusted = {"min_tokens": 9, "stop_token_ids": [plain[0][5]], "logit_bias": {plain[1][2]: -50.0, plain[2][3]: 0.5}}
    expected, _ = generate(wandering, None, sampling=adjusted)
    assert expected[0] != plain[0] and len(expected[0]) > 9
    assert generate(wandering, {"model": str(tmp_path / "drafter")}, sampling=adjusted)[0] == expected


def test_a_drafter_that_learnt_the_verifier_is_an_oracle(name, trained, counting):
    """All K drafts of a round are accepted, from the first round of a request on."""
    checkpoint = trained(name).checkpoint
    num_drafts = min(ORACLE_DRAFTS, num_drafts_of(SpeculatorModel.from_pretrained(checkpoint)))
    plain, _ = generate(counting, None)
    assert plain == [count_from(SUCCESSOR[prompt[-1]], 32) for prompt in PROMPTS]
    drafted, stats = generate(counting, {"model": str(checkpoint), "num_speculative_tokens": num_drafts})
    assert drafted == plain
    full_rounds = sum(count for (_, _, accepted), count in stats.rounds.items() if accepted == num_drafts)
    assert full_rounds >= 0.8 * stats.num_rounds, stats.conditional_rates


def test_a_reduced_draft_vocabulary_stays_lossless_or_is_refused(name, wandering, wandering_path, data_path, tmp_path):
    try:
        model = untrained(name, wandering_path, data_path, tmp_path / "run", draft_vocab_size=REDUCED)
    except ValueError as refusal:
        assert f"draft_vocab_size={REDUCED}" in str(refusal)
        return
    kept = load_file_after_saving(model, tmp_path / "drafter")["t2d"]
    assert int(kept.sum()) == REDUCED
    plain, _ = generate(wandering, None)
    drafted, _ = generate(wandering, {"model": str(tmp_path / "drafter")})
    assert drafted == plain

    proposer = model.make_proposer(wandering, max_batch_size=1, max_length=64)
    generator = torch.Generator().manual_seed(0)
    sampling = DraftSampling(torch.full((1,), 5.0), generator, probabilistic=True)  # hot: all kept tokens are drawn
    width, seen = HIDDEN * max(1, len(proposer.capture.aux_layer_ids)), set()
    for _ in range(30):
        text = torch.randint(1, VOCAB, (6,), generator=generator).tolist()
        proposal = proposer.propose(committed(text, torch.randn(6, width, generator=generator)), 3, sampling)
        seen.update(proposal.token_ids_BK[0].tolist())
    assert len(seen) > REDUCED // 2 and all(kept[token] for token in seen)


def load_file_after_saving(model, path):
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")
