"""Verifiers with recurrent states: greedy output is transformers' own, a rolled back state that of a fresh run."""

from __future__ import annotations

import pytest
import torch
import toys
from transformers import AutoConfig, AutoModelForCausalLM, JambaConfig, RecurrentGemmaConfig

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.verifiers.recurrent_verifier import RecurrentVerifier, make_verifier
from speculators.interfaces import CaptureSpec
from speculators.verifier import capture_states

SHAPE = {
    "vocab_size": toys.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **HYBRID,
}
MAMBA = {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_chunk_size": 16}
CONFIGS = {
    "qwen3_next": {
        **SHAPE,
        **LINEAR,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": {**SHAPE, **LINEAR},
    "mamba2": {
        "vocab_size": toys.VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "lfm2": {**SHAPE, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**SHAPE, **MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "head_dim": 8},
}
NUM_TOKENS = 11
GREEDY = SamplingParams(max_tokens=NUM_TOKENS)


def tiny(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    model, prompts = tiny(request.param), toys.prompts(8, longest=9)
    return model, prompts, [toys.generated(model, prompt, NUM_TOKENS) for prompt in prompts]


def decode(model, prompts, proposer, batch):
    engine = Engine(model, proposer, num_speculative_tokens=None if proposer is None else 4, max_batch_size=batch)
    return [output.token_ids for output in engine.generate(prompts, GREEDY)], engine.stats


@pytest.mark.parametrize(("drafts", "batch"), [("wrong", 1), ("half right", 8), ("right", 1), ("random, ragged", 8)])
def test_greedy_text_is_transformers_own(case, drafts, batch):
    model, prompts, reference = case
    prompts, reference = (prompts, reference) if batch == 8 else (prompts[:2], reference[:2])
    texts = [prompt + output for prompt, output in zip(prompts, reference, strict=True)]
    num_right = {"wrong": 0, "half right": 2, "right": None}
    script = toys.oracle(texts, num_right[drafts]) if drafts in num_right else toys.at_random(0)
    tokens, stats = decode(model, prompts, toys.ScriptedProposer(script), batch)
    assert tokens == reference
    if drafts == "right":  # the first token comes from the prompt, then 5 a round
        assert stats.num_rounds == 2 * len(prompts)
    if drafts == "half right":
        assert stats.accepted_histogram[2] > 2 * len(prompts)


def test_rows_are_reused_and_prompts_begin_alike(case):
    model, prompts, _ = case
    alike = [prompts[0] * 6 + prompt for prompt in prompts[:4]]
    proposer = toys.ScriptedProposer(toys.at_random(0))
    engine = Engine(model, proposer, num_speculative_tokens=3, max_batch_size=2, prefill_chunk=24)
    outputs = engine.generate(alike, SamplingParams(max_tokens=6))
    assert [output.token_ids for output in outputs] == [toys.generated(model, prompt, 6) for prompt in alike]
    assert engine.stats.num_drafted > 0


def test_states_after_rollback_are_those_of_a_fresh_run(case):
    """Three rows keep 4, 2 and 0 of the scored tokens; what they say next is what an untouched model says."""
    model, prompts, _ = case
    verifier = make_verifier(model, 3)
    assert isinstance(verifier, RecurrentVerifier)
    texts = [list(prompt) for prompt in prompts[:3]]
    with verifier:
        for row, text in enumerate(texts):
            verifier.score(torch.tensor([text]), torch.tensor([len(text)]), first_row=row, last_only=True)
            verifier.keep(torch.arange(len(text))[None], torch.tensor([len(text)]))
        for num_kept in ([4, 2, 0], [1, 4, 3], [2, 2, 1]):
            drafts = torch.randint(0, toys.VOCAB, (3, 4), generator=torch.Generator().manual_seed(sum(num_kept)))
            verifier.score(drafts, torch.full((3,), 4))
            verifier.keep(torch.arange(4).expand(3, 4), torch.tensor(num_kept))
            for row, text in enumerate(texts):
                text += drafts[row, : num_kept[row]].tolist()
            assert verifier.length_by_row == [len(text) for text in texts]
        logits_BTV = verifier.score(torch.tensor([[5], [6], [7]]), torch.ones(3, dtype=torch.int64)).logits_BTV
    for row, text in enumerate(texts):
        fresh_V = model(torch.tensor([[*text, 5 + row]])).logits[0, -1]
        torch.testing.assert_close(logits_BTV[row, 0], fresh_V, atol=2e-4, rtol=2e-4)


def test_captured_states_are_the_models(case):
    model, prompts, reference = case
    spec = CaptureSpec(aux_layer_ids=(0, 1), last_hidden=True)
    seen = {}

    class Reader(toys.ScriptedProposer):
        def propose(self, committed, num_tokens, sampling):
            for row, new in enumerate(committed.num_new_B.tolist()):
                seen.setdefault(row, []).append(committed.states_BTD[row, :new].clone())
            return super().propose(committed, num_tokens, sampling)

    texts = [prompt + output for prompt, output in zip(prompts[:3], reference[:3], strict=True)]
    proposer = Reader(toys.oracle(texts, 1), spec)
    Engine(model, proposer, num_speculative_tokens=3, max_batch_size=3).generate(prompts[:3], GREEDY)
    for row, text in enumerate(texts):
        states_TD = torch.cat(seen[row])
        with torch.inference_mode(), capture_states(model, spec) as captured:
            model(torch.tensor([text]))
        expected_TD = captured.drafter_input[0, : len(states_TD) - 1]
        torch.testing.assert_close(states_TD[1:], expected_TD, atol=2e-4, rtol=2e-3)


def test_trees_are_refused(case):
    model, prompts, reference = case
    proposer = toys.TreeProposer([prompts[0] + reference[0]], [-1, -1, 0], [0, 2])
    with pytest.raises(ValueError, match="the nodes of a draft tree would each need their own"):
        decode(model, prompts[:1], proposer, 1)


def test_they_do_not_draft(case, tmp_path):
    model, _, _ = case
    with pytest.raises(ValueError, match=f"method='early_exit': {type(model).__name__} keeps recurrent states"):
        Engine(model, {"method": "early_exit", "num_speculative_tokens": 2})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"draft model '{tmp_path}': {type(model).__name__} keeps recurrent states"):
        Engine(toys.tiny_model("llama"), {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2})


def test_models_that_cannot_be_rolled_back_say_why():
    jamba = JambaConfig(
        **SHAPE, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4
    )
    with pytest.raises(ValueError, match="JambaForCausalLM does not continue its states over several tokens"):
        Engine(AutoModelForCausalLM.from_config(jamba).eval())
    griffin = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**SHAPE, lru_width=32))
    with pytest.raises(ValueError, match="keeps its states outside transformers' cache"):
        Engine(griffin.eval())
