"""A stitched MiMo and GLM-4-MoE in the real vLLM: greedy text as plain decoding's, as many accepted drafts as here.

Runs with `-m vllm` where SPECULATORS_VLLM_PYTHON names the Python of an environment with vLLM.
"""

import os

import pytest
import torch
from mtp_toys import add_mimo_layer, save_native_verifier
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from speculators.decoding import Engine, SamplingParams
from speculators.evaluation.parity_vllm import VllmRun, decode_in_vllm
from speculators.interfaces import CaptureSpec
from speculators.models.mtp import MTPDraftModel
from speculators.verifier import capture_states

VLLM_PYTHON = os.environ.get("SPECULATORS_VLLM_PYTHON")
VOCAB, HIDDEN = 256, 128  # vLLM's CPU attention wants heads of 32 or more
NUM_TOKENS, NUM_DRAFTS = 48, 3


def make_glm(path):
    """A random GLM-4-MoE with its MTP layer."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.11,
    }
    save_native_verifier("glm4_moe", path, **sizes)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make_mimo(path):
    """A random MiMo; its biases and its final norm matter."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.11,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.model.norm.weight.data = 1 + 0.4 * torch.randn(HIDDEN)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path)
    add_mimo_layer(path)
    return model


def train_on_its_own_text(drafter, verifier, num_steps=120):
    """Enough for some drafts to be accepted and some not. Returns the text."""
    torch.manual_seed(1)
    for parameter in drafter.mtp_layers.parameters():
        parameter.data = (
            1 + 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.1 * torch.randn_like(parameter)
        )
    prompts = torch.randint(0, VOCAB, (48, 6))
    with torch.no_grad():
        ids = verifier.generate(prompts, max_new_tokens=90, do_sample=False, pad_token_id=0)
        with capture_states(verifier, CaptureSpec(last_hidden=True)) as states:
            verifier(ids)
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=6e-3)
    for _ in range(num_steps):
        rows = torch.randint(0, len(ids), (8,))
        loss = drafter(ids[rows], states.last_hidden[rows], return_logits=False)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ids


@pytest.mark.vllm
@pytest.mark.skipif(VLLM_PYTHON is None, reason="SPECULATORS_VLLM_PYTHON is not set")
@pytest.mark.parametrize(
    ("make_verifier", "own"), [(make_mimo, ".mtp_layers."), (make_glm, "model.layers.3.")], ids=["mimo", "glm4_moe"]
)
def test_vllm_accepts_what_our_engine_accepts(make_verifier, own, tmp_path):
    verifier = make_verifier(tmp_path / "native")
    drafter = MTPDraftModel.from_training_args(
        AutoConfig.from_pretrained(tmp_path / "native"), verifier_name_or_path=str(tmp_path / "native")
    )
    text = train_on_its_own_text(drafter, verifier)
    drafter.save_pretrained(tmp_path / "trained")
    stitched = MTPDraftModel.stitch(tmp_path / "trained", tmp_path / "native", tmp_path / "stitched").path
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "native", stitched))
    assert all(torch.equal(before[key], after[key]) for key in before if own not in key)

    prompts = [text[row, : 4 + row].tolist() for row in range(6)]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    plain = Engine(verifier, max_batch_size=1).generate(prompts, sampling)
    proposer = drafter.make_proposer(verifier, max_batch_size=1, max_length=256)
    engine = Engine(verifier, proposer, num_speculative_tokens=NUM_DRAFTS, max_batch_size=1)
    ours = engine.generate(prompts, sampling)
    assert engine.stats.acceptance_length > 1.1

    drafting = {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}
    run = VllmRun(str(stitched), prompts, NUM_TOKENS, speculative_config=drafting, engine={"skip_tokenizer_init": True})
    (theirs,) = decode_in_vllm(VLLM_PYTHON, [run])
    assert theirs.error is None, theirs.error
    assert theirs.token_ids == [list(output.token_ids) for output in plain]
    assert sum(theirs.accepted) == pytest.approx(sum(output.stats.num_accepted for output in ours), rel=0.03)
