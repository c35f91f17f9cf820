"""A drafter that trains too long on too little: the checkpoint chosen by its accepted drafts beats the last one."""

from __future__ import annotations

import os

import pytest

import speculators as sp
from speculators import assets
from speculators.building.plan import best_checkpoint
from speculators.data_generation import prepare_data

NUM_EPOCHS = 14


@pytest.mark.slow
@pytest.mark.skipif("SPECULATORS_OVERTRAIN" not in os.environ, reason="a minute: SPECULATORS_OVERTRAIN=1 runs it")
def test_the_checkpoint_chosen_by_decoding_beats_the_last_one_on_other_prompts(tmp_path):
    """The choice is made on answers beside those of training; both checkpoints are then measured on prompts that none
    has seen. Trained at a rate that stays high, on a dozen answers: decoded lengths rise for some epochs, then fall.
    `make soak` runs it."""
    verifier, run = assets.tiny_verifier_path(), tmp_path / "run"
    answers, rows = tmp_path / "answers.jsonl", tmp_path / "rows"
    sp.regenerate(verifier, assets.prompts_path(), output=answers, limit=32, max_tokens=64)
    prepare_data(verifier, answers, output=rows)
    sp.train_drafter(
        "eagle3",
        verifier=verifier,
        data=rows,
        output=run,
        epochs=NUM_EPOCHS,
        lr=1.5e-2,
        scheduler_type="none",
        total_seq_len=256,
        train_data_ratio=0.5,
        eval_prompts=16,
        parity_gate=False,
        contract_check=False,
    )
    chosen, last = best_checkpoint(run)[0], run / str(NUM_EPOCHS - 1)
    assert chosen != last
    report = sp.evaluate(
        verifier,
        assets.prompts_path("heldout"),
        methods=["none", str(chosen), str(last)],
        num_speculative_tokens=3,
        num_prompts=24,
        max_tokens=48,
    )
    _, at_its_best, at_the_end = report.rows
    assert at_its_best.acceptance_length.value > at_the_end.acceptance_length.value + 0.03
