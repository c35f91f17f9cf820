"""`build` for a random verifier in a directory: it ends with its report, and the real vLLM serves what it made."""

from __future__ import annotations

import torch
from pytest import mark
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import speculators as sp
from speculators import assets

pytestmark = [mark.vllm, mark.slow]


def save_random_qwen3(path) -> str:
    """Two layers of 64, with the embedded verifier's tokenizer and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(assets.tiny_verifier_path())
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def test_a_build_for_a_random_verifier_ends_with_a_directory_that_vllm_serves(vllm_python, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECULATORS_VLLM_PYTHON", vllm_python)
    verifier = save_random_qwen3(tmp_path / "verifier")
    built = sp.build(
        verifier,
        assets.prompts_path("train"),
        output=tmp_path / "out",
        held_out=assets.prompts_path("heldout"),
        budget="answers=100,epochs=3,prompts=4",
        num_speculative_tokens=3,
        max_tokens=48,
        train_flags="--lr 3e-3 --total-seq-len 512",
    )
    print(built, built.parity)
    checks = built.parity["checks"]
    for check in ("drafts: training = engine", "vLLM text = vLLM plain text", "accepted: vLLM = engine"):
        assert checks[check].startswith("pass: "), checks
    assert built.parity["passed"] and built.evaluation.lossless
    assert built.report.is_file() and built.page.is_file()
    assert built.served_by is not None and str(built.checkpoint) in built.served_by
