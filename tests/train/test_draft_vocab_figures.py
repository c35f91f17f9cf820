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
from speculators.train.events import Validated
from speculators.train.run import train

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
    held_out = rows[int(NUM_ROWS * TRAIN_SHARE) :]
    decoded = decoded_first_draft_acceptance(verifier, result.checkpoint, held_out)
    assert printed == pytest.approx(decoded, abs=0.02)
    assert decoded > 0.05
