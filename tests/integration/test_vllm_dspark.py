"""DSpark in the real vLLM: model runner V2 alone serves it, on CPU only through Triton's interpreter (very slow).

Needs `scripts/vllm_cpu/install_triton_interpreter.sh` (1 GB), whose directory SPECULATORS_VLLM_TRITON names; without it
the test is skipped. `make test-vllm-v2` does both.
"""

from __future__ import annotations

import os

import pytest
from vllm_cases import DSPARK, train_flags

from speculators.api import vllm_target
from speculators.cli.app import run
from speculators.decoding import Engine, SamplingParams
from speculators.evaluation.parity_vllm import VllmRun, decode_in_vllm, speculative_run

TRITON = os.environ.get("SPECULATORS_VLLM_TRITON")
MAX_TOKENS, NUM_PROMPTS = 24, 6

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(TRITON is None, reason="SPECULATORS_VLLM_TRITON is not set"),
]


def test_vllm_and_our_engine_decode_alike(vllm_python, verifier, verifier_model, data, prompts, tmp_path):
    checkpoint = run(train_flags(DSPARK, verifier, data, tmp_path / "run"))["checkpoint"]
    few = prompts[:NUM_PROMPTS]
    shared = {"prompts": few, "max_tokens": MAX_TOKENS}
    drafting = {"model": checkpoint, "num_speculative_tokens": DSPARK.num_drafts}
    ours = Engine(verifier_model, drafting, max_batch_size=3, max_length=512).generate(
        few, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    )
    served = speculative_run(vllm_target(checkpoint, None, vllm_python, tmp_path), DSPARK.num_drafts, **shared)
    plain, theirs = decode_in_vllm(
        vllm_python, [VllmRun(verifier, **shared), served], env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(TRITON)}
    )
    for result in (plain, theirs):
        assert result.error is None, result.error
    assert theirs.token_ids == plain.token_ids
    assert [output.token_ids for output in ours] == plain.token_ids
    accepted = sum(output.stats.num_accepted for output in ours)
    print(f"dspark: accepted {accepted} in our engine, {sum(theirs.accepted)} in vLLM")
    assert accepted > 10
    assert sum(theirs.accepted) == pytest.approx(accepted, rel=0.03)
