"""Sampled decoding: vLLM's tokens and ours follow one law, with drafts and without.

Many short answers to one prompt, drawn by vLLM and by our engine, plainly and with drafts of a noisy copy of the
verifier. Each pair is compared by a chi-squared test on which tokens stand at each of four positions (cells with few
counts are pooled). With 16 tests at ALPHA the suite fails by chance once in about 6,000 runs.

The CPU build of vLLM 0.32 verifies sampled drafts with uninitialised temperatures (its issue 55005); `vllm_cpu_fixes`
corrects that, and without it this test must fail.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from speculators.decoding import Engine, SamplingParams
from speculators.evaluation.parity_vllm import VllmRun, decode_in_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ALPHA = 1e-5
NUM_SAMPLES, NUM_TOKENS, NUM_DRAFTS = 1200, 4, 3
OUR_NUM_SAMPLES = 500
"""A Hugging Face verifier is slower; the test takes sides of any size."""
TEMPERATURE = 0.8
MIN_COUNT = 10
"""Cells with fewer draws, of both sides together, are pooled: chi-squared is no law for single counts."""


def run_of(verifier, prompt, seed, speculative_config=None) -> VllmRun:
    return VllmRun(
        verifier,
        [prompt] * NUM_SAMPLES,
        NUM_TOKENS,
        speculative_config=speculative_config,
        sampling={"temperature": TEMPERATURE},
        engine={"seed": seed, "max_num_seqs": 64},
    )


def drafting(noisy_copy, **how):
    return {"method": "draft_model", "model": noisy_copy, "num_speculative_tokens": NUM_DRAFTS, **how}


DRAFTS = {
    "greedy drafts": {"rejection_sample_method": "standard", "draft_sample_method": "greedy"},
    "drawn drafts": {"rejection_sample_method": "standard", "draft_sample_method": "probabilistic"},
}


@pytest.fixture(scope="module")
def prompt(prompts) -> list[int]:
    return min(prompts, key=len)[-24:]


@pytest.fixture(scope="module")
def theirs(vllm_python, verifier, noisy_copy, prompt):
    runs = {"plain": run_of(verifier, prompt, 1), "plain again": run_of(verifier, prompt, 2)}
    for seed, (name, how) in enumerate(DRAFTS.items(), start=3):
        runs[name] = run_of(verifier, prompt, seed, drafting(noisy_copy, **how))
    results = dict(zip(runs, decode_in_vllm(vllm_python, list(runs.values())), strict=True))
    for name, result in results.items():
        assert result.error is None, f"{name}: {result.error}"
    return results


@pytest.fixture(scope="module")
def ours(verifier_model, noisy_copy, prompt):
    def draw(config, first_seed):
        engine = Engine(verifier_model, config, max_batch_size=64, max_length=64)
        params = [
            SamplingParams(max_tokens=NUM_TOKENS, temperature=TEMPERATURE, seed=first_seed + i, ignore_eos=True)
            for i in range(OUR_NUM_SAMPLES)
        ]
        return [output.token_ids for output in engine.generate([prompt] * OUR_NUM_SAMPLES, params)]

    found = {"plain": draw(None, 0)}
    for number, (name, how) in enumerate(DRAFTS.items(), start=1):
        found[name] = draw(drafting(noisy_copy, **how), number * OUR_NUM_SAMPLES)
    return found


def p_values(left, right) -> list[float]:
    """Of each position: the chance of frequencies this far apart if both sides draw from one law."""
    found = []
    for position in range(NUM_TOKENS):
        sides = [np.bincount([ids[position] for ids in side], minlength=4096) for side in (left, right)]
        table = np.stack(sides)
        is_rare = table.sum(0) < MIN_COUNT
        pooled = np.concatenate([table[:, ~is_rare], table[:, is_rare].sum(1, keepdims=True)], axis=1)
        pooled = pooled[:, pooled.sum(0) > 0]
        found.append(1.0 if pooled.shape[1] < 2 else chi2_contingency(pooled).pvalue)
    return found


def check(name, left, right):
    found = p_values(left, right)
    print(f"{name}: p = {' '.join(f'{p:.3g}' for p in found)}")
    assert min(found) > ALPHA, name


@pytest.mark.parametrize("how", DRAFTS)
def test_drafts_do_not_change_the_law_of_vllms_tokens(theirs, how):
    check(f"vLLM, {how}", theirs["plain"].token_ids, theirs[how].token_ids)
    assert sum(theirs[how].accepted) > NUM_SAMPLES / 10


@pytest.mark.parametrize("how", DRAFTS)
def test_our_engine_draws_from_vllms_law(theirs, ours, how):
    check("plain, vLLM and ours", theirs["plain again"].token_ids, ours["plain"])
    check(f"{how}, vLLM and ours", theirs[how].token_ids, ours[how])


def test_the_check_finds_the_bug_of_the_unmended_engine(vllm_python, verifier, noisy_copy, prompt, theirs):
    run = run_of(verifier, prompt, 5, drafting(noisy_copy, **DRAFTS["drawn drafts"]))
    (broken,) = decode_in_vllm(vllm_python, [run], env={"VLLM_PLUGINS": "none"})
    assert broken.error is None, broken.error
    found = p_values(theirs["plain"].token_ids, broken.token_ids)
    print("unmended: p =", found)
    assert min(found) < ALPHA
