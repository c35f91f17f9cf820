"""What `serve --dry-run` and `launch-vllm --dry-run` print is read by vLLM's own parser and config classes.

`pytest -m vllm tests/serving`; one process of vLLM reads them all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from speculators import assets
from speculators.cli.app import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("SPECULATORS_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
VERIFIER = str(assets.tiny_verifier_path())
ENGINE = ["--", "--port", "8123", "--max-model-len", "256"]
LAYERS = ["--target-layer-ids", "2", "6"]
TRAINED = {
    # type: (flags of its own, what vLLM should make of it: method, architecture, parallel drafting)
    "eagle3": ([], ("eagle3", "Eagle3LlamaForCausalLM", False)),
    "eagle3-qwen3": (["--draft-arch", "qwen3"], ("eagle3", "Eagle3Qwen3ForCausalLM", False)),
    "peagle": ([], ("eagle3", "PeagleQwen3ForCausalLM", True)),
    "dflash": ([], ("dflash", "DFlashDraftModel", True)),
    "dspark": ([], ("dspark", "Qwen3DSparkModel", True)),
    "eagle": ([], ("eagle", "EagleLlamaForCausalLM", False)),
    "medusa": ([], ("medusa", "MedusaModel", False)),
}
EXPORTED = ("eagle", "medusa")
"""vLLM has a directory layout of its own for these."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "prepared"
    run(
        [
            "prepare-data",
            "--model",
            VERIFIER,
            "--data",
            str(assets.prompts_path("train")),
            "--output",
            str(path),
            "--seq-length",
            "128",
            "--max-samples",
            "10",
        ]
    )
    return str(path)


def untrained(case: str, flags: list[str], data: str, folder: Path) -> str:
    """A checkpoint as `train` writes it, without training."""
    result = run(
        [
            "train",
            "--speculator-type",
            case.split("-")[0],
            "--verifier-name-or-path",
            VERIFIER,
            "--data-path",
            data,
            "--total-seq-len",
            "128",
            "--save-path",
            str(folder / case),
            "--dry-run",
            *flags,
        ]
    )
    return str(result["checkpoint"])


@pytest.fixture(scope="module")
def stitched(tmp_path_factory) -> str:
    """What `serve --method mtp` is given: config.json says it all, weights are not read here."""
    path = tmp_path_factory.mktemp("stitched")
    for file in Path(VERIFIER).glob("*token*"):
        shutil.copy(file, path)
    config = {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def read_by_vllm(data, stitched, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("commands")
    results = {
        "ngram": run(["serve", VERIFIER, "--method", "ngram", "-k", "3", "--dry-run", *ENGINE]),
        "suffix": run(["serve", VERIFIER, "--method", "suffix", "--dry-run", *ENGINE]),
        "draft_model": run(["serve", VERIFIER, "--draft", VERIFIER, "-k", "2", "--dry-run", *ENGINE]),
        "mtp": run(["serve", stitched, "--method", "mtp", "-k", "2", "--dry-run", *ENGINE]),
        "extract": run(["launch-vllm", VERIFIER, "--hidden-states-path", str(folder), *LAYERS, "--dry-run", *ENGINE]),
    }
    for case, (flags, _) in TRAINED.items():
        checkpoint = untrained(case, flags, data, folder)
        if case in EXPORTED:
            native = str(folder / f"{case}-native")
            checkpoint = run(["export", checkpoint, "--output", native, "--engine", "vllm-0.32"])["path"]
        results[case] = run(["serve", checkpoint, "-k", "4", "--engine", "vllm-0.32", "--dry-run", *ENGINE])
    commands, answers = folder / "commands.json", folder / "answers.json"
    commands.write_text(json.dumps({name: result["command"] for name, result in results.items()}))
    job = [VLLM_PYTHON, str(Path(__file__).with_name("vllm_parse_job.py")), str(commands), str(answers)]
    finished = subprocess.run(
        job, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert answers.exists(), finished.stderr[-3000:]
    return json.loads(answers.read_text())


def test_what_is_not_trained_is_read_as_meant(read_by_vllm, stitched):
    for name, k in (("ngram", 3), ("draft_model", 2), ("mtp", 2)):
        answer = read_by_vllm[name]
        assert (answer.get("method"), answer.get("num_speculative_tokens")) == (name, k), answer
        assert (answer["port"], answer["max_model_len"]) == (8123, 256)
        assert answer["model"] == (stitched if name == "mtp" else VERIFIER)
    suffix = read_by_vllm["suffix"]
    assert suffix.get("method") == "suffix" or "Arctic Inference" in suffix["error"]  # the environment may lack it


@pytest.mark.parametrize("case", TRAINED)
def test_a_checkpoint_is_read_as_what_it_is(read_by_vllm, case):
    answer, (method, architecture, is_parallel) = read_by_vllm[case], TRAINED[case][1]
    assert "error" not in answer, answer
    assert (answer["method"], answer["num_speculative_tokens"]) == (method, 4)
    assert answer["draft_architectures"] == [architecture]
    assert answer["parallel_drafting"] == is_parallel
    assert answer["model"] == VERIFIER
    assert answer["needs_runner_v2"] == (case == "dspark")


def test_extraction_is_read_with_its_layers_and_connector(read_by_vllm):
    answer = read_by_vllm["extract"]
    assert "error" not in answer, answer
    assert answer["method"] == "extract_hidden_states"
    assert answer["layer_ids"] == [2, 6, 12]
    assert answer["connector"] == "ExampleHiddenStatesConnector"


def test_what_vllm_cannot_serve_never_reaches_it(data, tmp_path):
    checkpoint = untrained("mlp", [], data, tmp_path)
    with pytest.raises(ValueError, match="no drafter of type 'mlp'"):
        run(["serve", checkpoint, "--dry-run"])
