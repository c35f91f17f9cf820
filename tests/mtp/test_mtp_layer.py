"""Decoder layers of the hybrid Qwen families against transformers' own."""

import pytest
import torch
from mtp_toys import HIDDEN, VOCAB, Request, commit, packed_batch, sampled
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.mtp import MTPDraftModel, MTPSpeculatorConfig
from speculators.models.mtp.checkpoint import expected_keys
from speculators.models.mtp.families import family_of
from speculators.models.mtp.layer import MTPLayer
from speculators.models.mtp.proposer import MTPProposer
from speculators.nn.masks import PackedRow
from speculators.nn.rope import Rope
from speculators.nn.unrolled import unrolled_attends
from speculators.proposals import GreedyTokenProposalConfig

SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10,
}  # fmt: skip
CASES = {
    "qwen3_next": (
        Qwen3NextConfig(**SIZES, **EXPERTS, intermediate_size=20),
        modeling_qwen3_next.Qwen3NextDecoderLayer, modeling_qwen3_next.Qwen3NextRotaryEmbedding,
    ),
    "qwen3_5_text": (
        Qwen3_5TextConfig(**SIZES, intermediate_size=20),
        modeling_qwen3_5.Qwen3_5DecoderLayer, modeling_qwen3_5.Qwen3_5TextRotaryEmbedding,
    ),
    "qwen3_5_moe_text": (
        Qwen3_5MoeTextConfig(**SIZES, **EXPERTS),
        modeling_qwen3_5_moe.Qwen3_5MoeDecoderLayer, modeling_qwen3_5_moe.Qwen3_5MoeTextRotaryEmbedding,
    ),
}  # fmt: skip


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_decoder_layer_equals_transformers(name):
    """A full-attention layer; ours with an input projection that passes the normed hidden state through."""
    config, theirs_class, rotary_class = CASES[name]
    assert config.model_type == name and config.layer_types[3] == "full_attention"
    config._attn_implementation = "eager"
    theirs = theirs_class(config, layer_idx=3).eval()
    randomise(theirs)
    ours = MTPLayer(config, family_of(config))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and sorted(missing) == [
        "final_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight", "token_layernorm.weight"
    ]  # fmt: skip
    ours.input_proj.weight.data = torch.cat((torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)), dim=1)

    hidden = torch.randn(1, 9, HIDDEN)
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    positions = torch.arange(9)[None]
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    expected = theirs(
        normed, position_embeddings=rotary_class(config)(normed, positions), attention_mask=mask,
        position_ids=positions,
    )  # fmt: skip
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = expected * torch.rsqrt(expected.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    for route in ("eager", "simple_flex_attention"):
        (attend,) = unrolled_attends(route, PackedRow(torch.zeros(9, dtype=torch.int64)), [None])
        actual, _ = ours(torch.randn(1, 9, HIDDEN), hidden, Rope(config).at(positions[0], torch.float32), attend)
        torch.testing.assert_close(actual, expected.view(1, 9, HIDDEN), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_drafts_and_is_saved(name, tmp_path):
    nested = CASES[name][0]
    proposal = GreedyTokenProposalConfig(speculative_tokens=3)
    config = MTPSpeculatorConfig(
        transformer_layer_config=nested,
        speculators_config=SpeculatorsConfig(
            algorithm="mtp", proposal_methods=[proposal], default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )  # fmt: skip
    model = MTPDraftModel(config)
    norms = {key: w for key, w in model.mtp_layers[0].state_dict().items() if "norm" in key}
    assert len(norms) == 7 and all(bool((w == 0).all()) for w in norms.values())  # gain 1
    randomise(model.mtp_layers)
    for module in (model.embed_tokens, model.lm_head):
        torch.nn.init.normal_(module.weight)
    batch = packed_batch([9, 5], supervised=2.0, padding=3)
    logits, loss, _ = model(**batch)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)

    proposer = MTPProposer(model.network.fused(), VOCAB, max_batch_size=1, max_length=32)
    request = Request(0, 6)
    request.tokens, request.states = batch["input_ids"][0, :6].tolist(), batch["hidden_states"][0]
    probs_BKV = proposer.propose(commit([request]), 3, sampled(1)).probs_BKV
    torch.testing.assert_close(probs_BKV[0, 0], logits[0][0, 4].softmax(0), atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path)
    again = MTPDraftModel.from_pretrained(tmp_path)
    saved = {key: w for key, w in again.state_dict().items() if key.startswith("mtp_layers.")}
    assert saved.keys() == expected_keys(config)
    assert all(torch.equal(w, model.state_dict()[key]) for key, w in saved.items())
