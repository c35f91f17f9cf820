"""Decoder layers of the families that ship MTP layers against transformers' own."""

import pytest
import torch
from drafter_toys import HIDDEN, VOCAB, Request, commit, sampled
from mtp_toys import packed_batch
from transformers import DeepseekV3Config, Glm4MoeConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.interfaces import CaptureSpec
from speculators.models.feedback_proposer import FeedbackProposer
from speculators.models.mtp import MTPDraftModel, MTPSpeculatorConfig
from speculators.models.mtp.families import family_of
from speculators.models.mtp.network import MTPLayer
from speculators.nn.packed_row import PackedRow
from speculators.nn.rope import Rope
from speculators.nn.routes import DENSE, FLASH
from speculators.nn.unrolled import unrolled_attention
from speculators.proposals import GreedyTokenProposalConfig

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 10,
}
ROUTED = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 20,
    "moe_intermediate_size": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "n_group": 4,
    "topk_group": 2,
}
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 10, "num_key_value_heads": 4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
QWEN3_NEXT = (modeling_qwen3_next.Qwen3NextDecoderLayer, modeling_qwen3_next.Qwen3NextRotaryEmbedding)
QWEN3_5 = (modeling_qwen3_5.Qwen3_5DecoderLayer, modeling_qwen3_5.Qwen3_5TextRotaryEmbedding)
QWEN3_5_MOE = (modeling_qwen3_5_moe.Qwen3_5MoeDecoderLayer, modeling_qwen3_5_moe.Qwen3_5MoeTextRotaryEmbedding)
GLM4_MOE = (modeling_glm4_moe.Glm4MoeDecoderLayer, modeling_glm4_moe.Glm4MoeRotaryEmbedding)
DEEPSEEK_V3 = (modeling_deepseek_v3.DeepseekV3DecoderLayer, modeling_deepseek_v3.DeepseekV3RotaryEmbedding)
GLM = {**ROUTED, "num_key_value_heads": 2, "head_dim": 8}
CASES = {
    "qwen3_next": (Qwen3NextConfig(**SIZES, **EXPERTS, intermediate_size=20), *QWEN3_NEXT),
    "qwen3_5_text": (Qwen3_5TextConfig(**SIZES, intermediate_size=20), *QWEN3_5),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig(**SIZES, **EXPERTS), *QWEN3_5_MOE),
    "glm4_moe": (Glm4MoeConfig(**GLM, use_qk_norm=True, attention_bias=True), *GLM4_MOE),
    "glm4_moe without norms": (Glm4MoeConfig(**{**GLM, "n_group": 1, "topk_group": 1}), *GLM4_MOE),
    "deepseek_v3": (DeepseekV3Config(**ROUTED, **LATENT, q_lora_rank=9), *DEEPSEEK_V3),
    "deepseek_v3 plain": (
        DeepseekV3Config(
            **ROUTED, **LATENT, q_lora_rank=None, rope_interleave=False, norm_topk_prob=False, attention_bias=True
        ),
        *DEEPSEEK_V3,
    ),
    "deepseek_v3 yarn": (DeepseekV3Config(**ROUTED, **LATENT, q_lora_rank=9, rope_parameters=YARN), *DEEPSEEK_V3),
}


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_decoder_layer_equals_transformers(name):
    """A full-attention layer; ours with an input projection that passes the normed hidden state through."""
    config, theirs_class, rotary_class = CASES[name]
    assert config.model_type == name.split()[0]
    assert getattr(config, "layer_types", None) is None or config.layer_types[3] == "full_attention"
    config._attn_implementation = "eager"
    theirs = theirs_class(config, layer_idx=3).eval()
    randomise(theirs)
    ours = MTPLayer(config, family_of(config))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and sorted(missing) == [
        "final_layernorm.weight",
        "hidden_layernorm.weight",
        "input_proj.weight",
        "token_layernorm.weight",
    ]
    ours.input_proj.weight.data = torch.cat((torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)), dim=1)

    hidden = torch.randn(1, 9, HIDDEN)
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    positions = torch.arange(9)[None]
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    expected = theirs(
        normed, position_embeddings=rotary_class(config)(normed, positions), attention_mask=mask, position_ids=positions
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = expected * torch.rsqrt(expected.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    for route in (DENSE, FLASH):
        (attention,) = unrolled_attention(route, PackedRow(torch.zeros(9, dtype=torch.int64)), [None])
        actual, _ = ours(torch.randn(1, 9, HIDDEN), hidden, Rope(config).at(positions[0], torch.float32), attention)
        torch.testing.assert_close(actual, expected.view(1, 9, HIDDEN), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_drafts_and_is_saved(name, tmp_path):
    nested = CASES[name][0]
    proposal = GreedyTokenProposalConfig(speculative_tokens=3)
    config = MTPSpeculatorConfig(
        transformer_layer_config=nested,
        speculators_config=SpeculatorsConfig(
            algorithm="mtp",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    model = MTPDraftModel(config)
    norms = {key: w for key, w in model.mtp_layers[0].state_dict().items() if "norm" in key}
    start = 0 if name.startswith("qwen3_") else 1  # gain 1 + w, or w
    assert len(norms) >= 5 and all(bool((w == start).all()) for w in norms.values())
    randomise(model.mtp_layers)
    for module in (model.embed_tokens, model.lm_head):
        torch.nn.init.normal_(module.weight)
    batch = packed_batch([9, 5], supervised=2.0, padding=3)
    logits, loss, _ = model(**batch)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)

    network = model.network.fused()
    reads_last_state = CaptureSpec(last_hidden=True)
    proposer = FeedbackProposer(
        network, reads_last_state, None, VOCAB, max_batch_size=1, max_length=32, input_tokens=network.tokens_at
    )
    request = Request(0, 6)
    request.tokens, request.states = batch["input_ids"][0, :6].tolist(), batch["hidden_states"][0]
    probs_BKV = proposer.propose(commit([request]), 3, sampled(1)).probs_BKV
    torch.testing.assert_close(probs_BKV[0, 0], logits[0][0, 4].softmax(0), atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path)
    again = MTPDraftModel.from_pretrained(tmp_path)
    saved = {key: w for key, w in again.state_dict().items() if key.startswith("mtp_layers.")}
    assert saved.keys() == MTPDraftModel.expected_tensors(config).keys()
    assert all(torch.equal(w, model.state_dict()[key]) for key, w in saved.items())
