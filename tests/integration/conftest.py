"""The embedded verifier, text of its own to train on, held-out prompts, and the Python of vLLM's environment.

`make test-vllm` makes that environment; SPECULATORS_VLLM_PYTHON names another one.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from speculators import assets
from speculators.cli.app import run
from speculators.verifier import load_verifier

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 20


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = Path(os.environ.get("SPECULATORS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.is_file():
        pytest.fail(f"{python} does not exist; run `make test-vllm`, which makes vLLM's environment")
    return str(python)


@pytest.fixture(scope="session")
def verifier() -> str:
    return str(assets.tiny_verifier_path())


@pytest.fixture(scope="session")
def verifier_model(verifier):
    return load_verifier(verifier, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def data(verifier, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    responses = str(folder / "responses.jsonl")
    run(
        [
            "regenerate-responses",
            "--model",
            verifier,
            "--data",
            str(assets.prompts_path("train")),
            "--output",
            responses,
            "--limit",
            "150",
            "--max-tokens",
            "96",
            "--batch-size",
            "50",
        ]
    )
    run(["prepare-data", "--model", verifier, "--data", responses, "--output", str(folder / "prepared")])
    return str(folder / "prepared")


@pytest.fixture(scope="session")
def prompts(verifier) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(verifier)
    lines = assets.prompts_path("heldout").read_text().splitlines()[:NUM_PROMPTS]
    questions = [
        [turn for turn in json.loads(line)["conversations"] if turn["role"] != "assistant"][:2] for line in lines
    ]
    rendered = [tokenizer.apply_chat_template(q, add_generation_prompt=True, tokenize=False) for q in questions]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]


@pytest.fixture(scope="session")
def noisy_copy(verifier_model, verifier, tmp_path_factory) -> str:
    """The verifier with noise on its weights: a draft model that is often right."""
    path = tmp_path_factory.mktemp("noisy")
    torch.manual_seed(0)
    model = copy.deepcopy(verifier_model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.15 * parameter.data.std() * torch.randn_like(parameter)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(verifier).save_pretrained(path)
    return str(path)
