"""Drafters that come from another project's layout: trained, written in that layout, converted back from it alone, and
then decoded by our engine and the real vLLM.

vLLM reads the foreign directory itself too, so that three readings of the same weights must accept alike: ours of the
converted directory, vLLM's of it, and vLLM's of the foreign one. The drafters are trained until they are accepted:
random ones would agree at nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_cases import Trained, train_flags

from speculators import assets
from speculators.api import vllm_target
from speculators.checkpoint.record import RECORD_FILE
from speculators.cli.app import run
from speculators.convert import convert_checkpoint
from speculators.decoding import Engine, SamplingParams
from speculators.deploy.export import export_checkpoint
from speculators.evaluation.parity_vllm import VllmRun, decode_in_vllm, speculative_run
from speculators.verifier import load_verifier

pytestmark = pytest.mark.vllm

MAX_TOKENS, NUM_PROMPTS = 64, 12
LEAST_ACCEPTANCE_LENGTH = 1.3
LONGER = ("--epochs", "8", "--max-steps", "160")
BLOCK = ("--block-size", "4", "--num-layers", "2", "--full-attention-indices", "0", "1", *LONGER)
CASES = {
    "eagle3": Trained("eagle3", ("--draft-arch", "llama", "--draft-vocab-size", "2048", *LONGER), 3),
    "dflash": Trained("dflash", BLOCK, 3),
    "peagle": Trained("peagle", ("--draft-arch", "llama", "--draft-vocab-size", "2048", *LONGER), 3),
    "mtp": Trained("mtp", LONGER, 3),
}
LAYOUTS = {"eagle3": "eagle3", "dflash": "z-lab", "peagle": "peagle", "mtp": "stitched"}
"""Of the EAGLE repository, of z-lab, of SpecForge, and inside the verifier."""


def write_mimo(path: Path) -> str:
    """The embedded verifier as a MiMo (Qwen2 whose biases are zero computes the same) that ships an MTP layer: its last
    layer, behind a projection that passes the state through."""
    source = assets.tiny_verifier_path()
    shutil.copytree(source, path)
    values = json.loads((path / "config.json").read_text())
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(key)
    values |= {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    values |= {"tie_word_embeddings": False, "layer_types": ["full_attention"] * values["num_hidden_layers"]}
    (path / "config.json").write_text(json.dumps(values))
    tensors = load_file(source / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[f"{name.removesuffix('weight')}bias"] = weight.new_zeros(len(weight))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    last, native = f"model.layers.{values['num_hidden_layers'] - 1}.", "model.mtp_layers.0."
    tensors |= {name.replace(last, native): t.clone() for name, t in tensors.items() if name.startswith(last)}
    ones = torch.ones_like(tensors["model.norm.weight"])
    tensors |= {f"{native}{name}_layernorm.weight": ones.clone() for name in ("token", "hidden", "final")}
    through = torch.eye(len(ones), dtype=ones.dtype)
    tensors[f"{native}input_proj.weight"] = torch.cat((through, through), dim=1)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.fixture(scope="module")
def verifiers(verifier, tmp_path_factory) -> dict[str, str]:
    mimo = write_mimo(tmp_path_factory.mktemp("mimo") / "verifier")
    return {case: mimo if case == "mtp" else verifier for case in CASES}


@pytest.mark.parametrize(
    "case", [case if case == "eagle3" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_converted_drafter_is_accepted_alike_here_and_in_vllm(case, vllm_python, verifiers, data, prompts, tmp_path):
    verifier, trained = verifiers[case], CASES[case]
    checkpoint = run(train_flags(trained, verifier, data, tmp_path / "run"))["checkpoint"]
    foreign = export_checkpoint(checkpoint, tmp_path / "foreign", profile=LAYOUTS[case], verifier=verifier)
    (foreign.path / RECORD_FILE).unlink()  # what another project writes has none
    written = convert_checkpoint(foreign.path, tmp_path / "converted", verifier=verifier)
    assert (written.source_format, written.speculators_model_type) == (LAYOUTS[case], trained.speculator_type)
    shared = {"prompts": prompts[:NUM_PROMPTS], "max_tokens": MAX_TOKENS}
    assert foreign.serving is not None
    there = {**(foreign.serving.speculative_config or {}), "num_speculative_tokens": trained.num_drafts}
    runs = [
        VllmRun(verifier, **shared),
        speculative_run(
            vllm_target(str(written.path), None, vllm_python, tmp_path / "out"), trained.num_drafts, **shared
        ),
        VllmRun(foreign.serving.model, speculative_config=there, **shared),
    ]
    plain, converted, original = decode_in_vllm(vllm_python, runs)
    for result in (plain, converted, original):
        assert result.error is None, result.error
    drafting = {"model": str(written.path), "num_speculative_tokens": trained.num_drafts}
    model = load_verifier(verifier, dtype=torch.float32, device="cpu")
    ours = Engine(model, drafting, max_batch_size=4, max_length=512).generate(
        shared["prompts"], SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    )
    accepted = [output.stats.num_accepted for output in ours]
    lengths = {
        "ours": 1 + sum(accepted) / sum(output.stats.num_rounds for output in ours),
        **{
            name: 1 + sum(r.accepted) / sum(r.rounds)
            for name, r in (("vLLM, converted", converted), ("vLLM, foreign", original))
        },
    }
    print(f"{case}: accepted {sum(accepted)}, {sum(converted.accepted)}, {sum(original.accepted)}; lengths {lengths}")
    assert converted.token_ids == plain.token_ids == original.token_ids
    assert [output.token_ids for output in ours] == plain.token_ids
    assert converted.accepted == original.accepted == accepted
    assert min(lengths.values()) > LEAST_ACCEPTANCE_LENGTH
