"""The real vLLM, on CPU, serves what `train` wrote: same text as plain decoding, as many drafts accepted as here.

Every method that vLLM runs on CPU, from our own directory or the one `export` makes of it, all in one process of vLLM.
Greedy and fp32: tokens accepted there and here differ only where two logits are closer than rounding, so their sums
over 20 prompts x 64 tokens are compared within 3 %.
"""

from __future__ import annotations

import pytest
from vllm_cases import NGRAM_SIZES, NUM_DRAFTS, TRAINED, UNTRAINED, VARIANTS, Decoded, train_flags

from speculators.api import vllm_target
from speculators.cli.app import run
from speculators.decoding import Engine, SamplingParams
from speculators.decoding.proposers.suffix import NgramProposer
from speculators.evaluation.parity_vllm import VllmRun, decode_in_vllm, speculative_run

pytestmark = pytest.mark.vllm

MAX_TOKENS = 64
BATCH_SIZE = 4
CASES = [*TRAINED, *UNTRAINED]


def selected(session) -> list[str]:
    """Cases that are to run: others are not trained."""
    found = [getattr(item, "callspec", None) for item in session.items]
    return [case for case in CASES if any(spec and spec.params.get("case") == case for spec in found)]


@pytest.fixture(scope="module")
def checkpoints(request, verifier, tmp_path_factory) -> dict[str, str]:
    cases = [case for case in selected(request.session) if case in TRAINED]
    data = request.getfixturevalue("data") if cases else ""
    return {
        case: run(train_flags(TRAINED[case], verifier, data, tmp_path_factory.mktemp("run")))["checkpoint"]
        for case in cases
    }


@pytest.fixture(scope="module")
def decoded(request, vllm_python, verifier, verifier_model, prompts, checkpoints, noisy_copy, tmp_path_factory):
    """Each case's answers and accepted drafts, in our engine and in vLLM."""
    shared = {"prompts": prompts, "max_tokens": MAX_TOKENS}
    runs, ours = {"plain": VllmRun(verifier, **shared)}, {}
    for case in selected(request.session):
        if case in TRAINED:
            num_drafts, folder = TRAINED[case].num_drafts, tmp_path_factory.mktemp("served")
            here = {"model": checkpoints[case], "num_speculative_tokens": num_drafts}
            target = vllm_target(checkpoints[case], None, vllm_python, folder)
            runs[case] = speculative_run(target, num_drafts, **shared)
        else:
            here = {**UNTRAINED[case], "num_speculative_tokens": NUM_DRAFTS}
            if case == "draft_model":
                here["model"] = noisy_copy
            runs[case] = VllmRun(verifier, speculative_config=here, **shared)
        if case == "ngram":  # by itself ours looks at the latest match, which drafts better than vLLM's earliest
            sizes = NGRAM_SIZES["prompt_lookup_min"], NGRAM_SIZES["prompt_lookup_max"]
            drafting = NgramProposer(*sizes, pick="earliest", max_batch_size=BATCH_SIZE)
        else:
            drafting = here
        engine = Engine(
            verifier_model,
            drafting,
            num_speculative_tokens=here["num_speculative_tokens"],
            max_batch_size=BATCH_SIZE,
            max_length=512,
        )
        ours[case] = engine.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    theirs = dict(zip(runs, decode_in_vllm(vllm_python, list(runs.values())), strict=True))
    assert theirs["plain"].error is None, theirs["plain"].error
    return {
        case: Decoded(
            plain=theirs["plain"].token_ids,
            ours=[output.token_ids for output in outputs],
            theirs=theirs[case].token_ids,
            our_accepted=[output.stats.num_accepted for output in outputs],
            their_accepted=theirs[case].accepted,
            error=theirs[case].error,
        )
        for case, outputs in ours.items()
    }


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in VARIANTS else case for case in CASES]
)
def test_vllm_and_our_engine_decode_alike(case, decoded):
    found: Decoded = decoded[case]
    if case == "suffix" and found.error is not None and "Arctic Inference" in found.error:
        pytest.skip(f"vLLM's environment has no arctic-inference: {found.error}")
    assert found.error is None, found.error
    assert found.theirs == found.plain
    assert found.ours == found.plain
    ours, theirs = sum(found.our_accepted), sum(found.their_accepted)
    num_equal = sum(a == b for a, b in zip(found.our_accepted, found.their_accepted, strict=True))
    print(
        f"{case}: accepted {ours} in our engine, {theirs} in vLLM; equal for {num_equal} of {len(found.ours)} prompts"
    )
    assert ours >= 40, "so few accepted drafts compare nothing"
    assert theirs == pytest.approx(ours, rel=0.03)
