"""What training prints of a reduced draft vocabulary is what decoding finds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from datasets import Dataset
from drafter_toys import save_llama
from transformers import LlamaForCausalLM

from speculators.decoding import Engine, SamplingParams
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.train.config import TrainConfig
from speculators.train.data import ArrowDataset
from speculators.train.events import Note, Started, StepDone, Validated
from speculators.train.run import train
from speculators.train.sources import leave_out_untrained

VOCAB, NUM_PROMPT, NUM_ROWS, TRAIN_SHARE = 512, 4, 60, 0.8


@pytest.fixture(scope="module")
def verifier_path(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("wide"), num_layers=6, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def verifier(verifier_path):
    return LlamaForCausalLM.from_pretrained(verifier_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(verifier):
    """Random prompts and the verifier's greedy text: the decoder walks the same path as the teacher."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 3, (NUM_ROWS, NUM_PROMPT), generator=generator).tolist()
    outputs = Engine(verifier).generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    return [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]


@pytest.fixture
def data(rows, tmp_path):
    masks = [[0] * NUM_PROMPT + [1] * (len(ids) - NUM_PROMPT) for ids in rows]
    records = [
        {"input_ids": ids, "loss_mask": mask, "seq_len": len(ids)} for ids, mask in zip(rows, masks, strict=True)
    ]
    Dataset.from_list(records).save_to_disk(tmp_path / "data")
    counts = Counter(token for ids in rows for token in ids[NUM_PROMPT:])
    torch.save(dict(counts), tmp_path / "data" / "token_freq.pt")
    return tmp_path / "data"


def settings(verifier_path, data, save_path, **changes):
    return TrainConfig.from_flat(
        {
            "speculator_type": "eagle3",
            "verifier_name_or_path": str(verifier_path),
            "data_path": str(data),
            "save_path": str(save_path),
            "total_seq_len": 32,
            "target_layer_ids": [1, 3, 5],
            "epochs": 1,
            "lr": 0.01,
            "train_data_ratio": TRAIN_SHARE,
            "ttt_steps": 2,
            "hidden_states_dtype": "float32",
            "parity_gate": False,
            "contract_check": False,
            **changes,
        }
    )


def decoded_first_draft_acceptance(verifier, checkpoint, rows) -> float:
    """Of every supervised place of the rows: the engine's first draft there, by its own count of one round."""
    drafter = Eagle3DraftModel.from_pretrained(checkpoint)
    proposer = drafter.make_proposer(verifier, max_batch_size=8, max_length=64)
    engine = Engine(verifier, proposer, num_speculative_tokens=1, max_length=64)
    prefixes = [ids[:end] for ids in rows for end in range(NUM_PROMPT, len(ids))]
    accepted = 0
    for output in engine.generate(prefixes, SamplingParams(max_tokens=3, ignore_eos=True)):
        # three tokens: one of the prompt, then one round of two, or a rejection and a round without a draft
        accepted += output.stats.rounds[1, 1, 1] == 1 and output.stats.num_rounds == 1
    return accepted / len(prefixes)


@pytest.mark.parametrize("draft_vocab_size", [1, 16, 256, None])
def test_printed_accuracy_is_decoded_acceptance(draft_vocab_size, verifier_path, verifier, rows, data, tmp_path):
    heard = []
    result = train(
        settings(verifier_path, data, tmp_path / "run", draft_vocab_size=draft_vocab_size), on_event=heard.append
    )
    (printed,) = [event.metrics["full_acc_0"] for event in heard if isinstance(event, Validated)]
    texts = [event.text for event in heard if isinstance(event, Note)]
    assert len([text for text in texts if "draft vocabulary of" in text]) == (draft_vocab_size is not None)
    if draft_vocab_size == 1:
        trained = [token for ids in rows[: int(NUM_ROWS * TRAIN_SHARE)] for token in ids[NUM_PROMPT:]]
        (most_often, _), *_ = Counter(token for ids in rows for token in ids[NUM_PROMPT:]).most_common()
        share = trained.count(most_often) / len(trained)
        assert f"the draft vocabulary of 1 tokens holds {share:.1%} of the {len(trained)} trained tokens" in texts[0]
    held_out = rows[int(NUM_ROWS * TRAIN_SHARE) :]
    decoded = decoded_first_draft_acceptance(verifier, result.checkpoint, held_out)
    assert printed == pytest.approx(decoded, abs=0.02)
    assert decoded > 0.05


def test_rows_that_lose_their_answer_are_left_out_and_counted(verifier_path, tmp_path):
    """Six trained tokens a row: within 10 tokens row 1 keeps none, row 2 keeps four."""
    prompts = [4, 12, 6, 4]
    records = [{"input_ids": [3] * (n + 6), "loss_mask": [0] * n + [1] * 6, "seq_len": n + 6} for n in prompts]
    Dataset.from_list(records).save_to_disk(tmp_path / "data")
    heard, changes = [], {"total_seq_len": 10, "train_data_ratio": 1.0}
    train(settings(verifier_path, tmp_path / "data", tmp_path / "run", **changes), on_event=heard.append)
    (said,) = [event.text for event in heard if isinstance(event, Note)]
    assert "1 of 4 rows has no trained token within 10 and is left out; 8 of 24 trained tokens are cut" in said
    (started,) = [event for event in heard if isinstance(event, Started)]
    assert (started.num_documents, started.num_tokens) == (3, 30)
    assert all(event.metrics["loss"] > 0 for event in heard if isinstance(event, StepDone))


def test_rows_keep_their_numbers_when_some_are_left_out(tmp_path):
    records = [{"input_ids": [n] * 4, "loss_mask": [0, 0, int(n != 1), 0], "seq_len": 4} for n in range(5)]
    Dataset.from_list(records).save_to_disk(tmp_path / "data")
    dataset = ArrowDataset(8, tmp_path / "data")
    said = leave_out_untrained(dataset)
    assert said is not None and "1 of 5 rows has no trained token" in said
    dataset.keep_rows({1, 2, 4})  # by their places in the prepared data
    assert [row["input_ids"][0] for row in dataset.rows] == [2, 4] and dataset.trained_tokens().tolist() == [2, 4]
