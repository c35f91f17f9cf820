"""The real vLLM, on CPU, serves a directory that `train` wrote: same text as plain decoding, drafts accepted as here.

Run by `make test-vllm`, which makes vLLM's environment; SPECULATORS_VLLM_PYTHON names another one. Everything is greedy
and fp32. Tokens accepted in vLLM and in our engine may differ where two logits are closer than fp32 rounding, so their
sums over 20 prompts are compared within 3 %.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from speculators import assets
from speculators.cli.app import run
from speculators.decoding import Engine, SamplingParams
from speculators.verifier import load_verifier

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = Path(os.environ.get("SPECULATORS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
NUM_PROMPTS, MAX_TOKENS, NUM_DRAFTS = 20, 64, 4
SMALL = ["--lr", "3e-3", "--total-seq-len", "512", "--epochs", "2"]
TRAINING = {
    "eagle3": ["--draft-vocab-size", "2048", *SMALL],
    "eagle3-qwen3-full-vocabulary": ["--draft-arch", "qwen3", *SMALL],
}


def speculator_type(case: str) -> str:
    return case.split("-")[0]


@pytest.fixture(scope="module")
def verifier() -> str:
    return str(assets.tiny_verifier_path())


@pytest.fixture(scope="module")
def data(verifier, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    responses = str(folder / "responses.jsonl")
    run(["regenerate-responses", "--model", verifier, "--data", str(assets.prompts_path("train")),
         "--output", responses, "--limit", "150", "--max-tokens", "96", "--batch-size", "50"])  # fmt: skip
    run(["prepare-data", "--model", verifier, "--data", responses, "--output", str(folder / "prepared")])
    return str(folder / "prepared")


@pytest.fixture(scope="module")
def prompts(verifier) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(verifier)
    lines = assets.prompts_path("heldout").read_text().splitlines()[:NUM_PROMPTS]
    questions = [json.loads(line)["conversations"][:1] for line in lines]
    rendered = [tokenizer.apply_chat_template(q, add_generation_prompt=True, tokenize=False) for q in questions]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]


@pytest.fixture(scope="module")
def in_vllm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")

    def decode(model: str, prompts: list[list[int]], speculative_config: dict | None = None) -> dict:
        if not VLLM_PYTHON.is_file():
            pytest.fail(f"{VLLM_PYTHON} does not exist; run `make test-vllm`, which makes vLLM's environment")
        job, result = folder / "job.json", folder / "result.json"
        job.write_text(
            json.dumps(
                {
                    "model": model,
                    "prompts": prompts,
                    "max_tokens": MAX_TOKENS,
                    "speculative_config": speculative_config,
                }
            )
        )
        result.unlink(missing_ok=True)
        command = [str(VLLM_PYTHON), str(Path(__file__).with_name("vllm_job.py")), str(job), str(result)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert result.is_file(), f"vLLM failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
        return json.loads(result.read_text())

    return decode


@pytest.fixture(scope="module")
def plain_in_vllm(in_vllm, verifier, prompts) -> dict:
    return in_vllm(verifier, prompts)


@pytest.mark.parametrize("case", TRAINING)
def test_vllm_and_our_engine_decode_alike(case, verifier, data, prompts, plain_in_vllm, in_vllm, tmp_path):
    trained = run(["train", "--speculator-type", speculator_type(case), "--verifier-name-or-path", verifier,
                   "--data-path", data, "--save-path", str(tmp_path / "run"), *TRAINING[case]])  # fmt: skip
    checkpoint = trained["checkpoint"]

    model = load_verifier(verifier, dtype=torch.float32, device="cpu")
    engine = Engine(model, {"model": checkpoint, "num_speculative_tokens": NUM_DRAFTS}, max_batch_size=1)
    ours = engine.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    theirs = in_vllm(checkpoint, prompts, {"num_speculative_tokens": NUM_DRAFTS})

    assert theirs["token_ids"] == plain_in_vllm["token_ids"]
    assert [output.token_ids for output in ours] == plain_in_vllm["token_ids"]
    accepted = sum(output.stats.num_accepted for output in ours)
    print(f"{case}: accepted {accepted} in our engine, {sum(theirs['accepted'])} in vLLM")
    assert accepted > 0
    assert sum(theirs["accepted"]) == pytest.approx(accepted, rel=0.03)
