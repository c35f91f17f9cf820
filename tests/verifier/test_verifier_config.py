"""Facts of a verifier's config: a key that is not on disk has the default of the verifier's class."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    SiglipVisionConfig,
)

from speculators.checkpoint.record import verifier_facts
from speculators.deploy.verifier_check import fit_findings, verifier_config
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from speculators.nn.norms import LayerNorm, RMSNorm, RMSNormPlusOne
from speculators.verifier import get_verifier_config, resolve_target_layer_ids, text_config, verifier_parts
from speculators.verifier.config import is_head_tied, logit_transform, norm_kind, open_config, plain_config
from speculators.verifier.loading import read_verifier_weights, resolve_verifier_norm_class

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def on_disk(folder, config, *, without=()):
    """The directory of a config whose file lacks some keys."""
    config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    for key in without:
        values.pop(key, None)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_the_language_models_part_of_objects_dicts_and_records():
    text = Gemma3TextConfig(**SHAPE)
    vision = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    whole = Gemma3Config(text_config=text, vision_config=vision)
    assert text_config(whole).num_hidden_layers == 2 and text_config(whole) is whole.text_config
    assert text_config(text) is text  # it may be asked twice
    assert text_config({"text_config": {"vocab_size": 3}}) == {"vocab_size": 3}
    assert text_config({"vocab_size": 3, "text_config": None}) == {"vocab_size": 3, "text_config": None}
    assert text_config({"thinker_config": {"text_config": {"vocab_size": 4}}}) == {"vocab_size": 4}
    plain = SimpleNamespace(vocab_size=5)
    assert text_config(SimpleNamespace(text_config=plain)) is plain and text_config(plain) is plain
    record = plain_config({"model_type": "unheard_of", "text_config": {"model_type": "inner", "vocab_size": 6}})
    assert record.model_type == "unheard_of"
    assert (text_config(record).model_type, text_config(record).vocab_size) == ("inner", 6)


# -- logits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "missing_key", "expected"),
    [
        (CohereConfig(**SHAPE), "logit_scale", (0.0625, None)),
        (CohereConfig(**SHAPE, logit_scale=0.5), None, (0.5, None)),
        (GraniteConfig(**SHAPE, logits_scaling=8.0), None, (0.125, None)),
        (GraniteConfig(**SHAPE), "logits_scaling", (1.0, None)),
        (Gemma2Config(**SHAPE), "final_logit_softcapping", (1.0, 30.0)),
        (Gemma2Config(**SHAPE, final_logit_softcapping=5.0), None, (1.0, 5.0)),
        (Gemma2Config(**SHAPE, final_logit_softcapping=None), None, (1.0, None)),
        (AutoConfig.for_model("recurrent_gemma", vocab_size=24), "logits_soft_cap", (1.0, 30.0)),
        (AutoConfig.for_model("falcon_h1", vocab_size=24, lm_head_multiplier=0.25), None, (0.25, None)),
        (LlamaConfig(**SHAPE), None, (1.0, None)),
    ],
)
def test_scale_and_soft_cap_have_one_rule_class_defaults_included(config, missing_key, expected, tmp_path):
    path = on_disk(tmp_path, config, without=[missing_key])
    assert missing_key not in json.loads((tmp_path / "config.json").read_text())
    assert logit_transform(open_config(path)) == logit_transform(get_verifier_config(path)) == expected


def test_a_family_may_multiply_by_what_others_divide_by():
    assert logit_transform(plain_config({"model_type": "hyperclovax", "logits_scaling": 0.5})).scale == 0.5
    assert logit_transform(plain_config({"model_type": "unheard_of", "logits_scaling": 0.5})).scale == 2.0


def test_the_transform_is_applied_in_the_order_of_its_formula():
    logits = torch.tensor([-50.0, 1.0, 80.0])
    transform = logit_transform(plain_config({"logit_scale": 0.5, "final_logit_softcapping": 4.0}))
    torch.testing.assert_close(transform.apply(logits), 4.0 * torch.tanh(0.5 * logits / 4.0))


# -- final norm --------------------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 4},
    "qwen3_next": {"head_dim": 4, "num_experts": 2, "layer_types": ["full_attention"] * 2},
    "gemma": {"head_dim": 4},
    "gemma2": {"head_dim": 4},
    "gemma3_text": {"head_dim": 4},
    "vaultgemma": {"head_dim": 4},
    "granite": {},
    "lfm2": {"layer_types": ["full_attention"] * 2},
    "mamba": {"state_size": 2},
    "cohere": {},
    "cohere2": {"head_dim": 4},
    "olmo": {},
    "olmo2": {},
    "opt": {"ffn_dim": 12, "word_embed_proj_dim": 8},
    "phi": {},
    "phimoe": {"num_local_experts": 2},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {"head_dim": 4},
    "gpt2": {"n_embd": 8, "n_head": 2, "n_layer": 2},
    "gpt_neox": {"max_position_embeddings": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_what_transformers_computes(family):
    """The rule goes by names; here the module itself is measured: at zero weights, and on states with a large mean."""
    shape = {"vocab_size": 24} if family == "gpt2" else SHAPE
    config = AutoConfig.for_model(family, **{**shape, "pad_token_id": None, **FAMILIES[family]})
    theirs = verifier_parts(AutoModelForCausalLM.from_config(config)).final_norm.eval().requires_grad_(False)
    kind = norm_kind(config)
    states = 3.0 + torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    states = states * torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0])[:, None]  # small ones show the epsilon
    ours = LayerNorm(8, kind.eps) if kind.is_centered else RMSNorm(8, kind.eps)
    weight = getattr(theirs, "weight", None)
    if weight is not None:
        weight.copy_(torch.rand(8, generator=torch.Generator().manual_seed(1)))
        ours.weight.data.copy_(weight + 1.0 if kind.has_unit_offset else weight)
    torch.testing.assert_close(ours(states), theirs(states), atol=1e-5, rtol=1e-4)


def test_layer_norm_is_torchs_and_keeps_the_dtype_of_the_states():
    norm, reference = LayerNorm(8, 1e-3, has_bias=True), torch.nn.LayerNorm(8, 1e-3)
    for mine, theirs in ((norm.weight, reference.weight), (norm.bias, reference.bias)):
        theirs.data.normal_()
        mine.data.copy_(theirs)
    states = 2.0 + torch.randn(3, 8)
    torch.testing.assert_close(norm(states), reference(states))
    assert norm(states.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm.frozen()(states), norm(states))


def test_the_class_of_the_norm_by_family(tmp_path):
    by_type = {"llama": RMSNorm, "gemma3_text": RMSNormPlusOne, "cohere": LayerNorm}
    for model_type, expected in by_type.items():
        path = on_disk(tmp_path / model_type, AutoConfig.for_model(model_type, **SHAPE))
        assert resolve_verifier_norm_class(path) is expected


# -- the head ----------------------------------------------------------------------------------------------------------


def saved_weights(folder, config, *, with_head, without=()):
    """A verifier's directory as far as its frozen weights are read."""
    V, H = config.vocab_size, config.hidden_size
    weights = {"model.embed_tokens.weight": torch.randn(V, H), "model.norm.weight": torch.rand(H)}
    if with_head:
        weights["lm_head.weight"] = torch.randn(V, H)
    path = on_disk(folder, config, without=without)
    save_file(weights, folder / "model.safetensors")
    return path, weights


def test_a_head_tied_by_class_default_is_the_embedding(tmp_path):
    path, weights = saved_weights(tmp_path, Gemma2Config(**SHAPE), with_head=False, without=["tie_word_embeddings"])
    assert is_head_tied(open_config(path)) is True
    read = read_verifier_weights(path, vocab_size=24, hidden_size=8)
    assert torch.equal(read.head_VH, weights["model.embed_tokens.weight"])
    assert read.logit_transform.softcap == 30.0 and read.norm_kind.has_unit_offset


def test_a_head_that_is_neither_stored_nor_tied_is_an_error(tmp_path):
    path, _ = saved_weights(tmp_path, LlamaConfig(**SHAPE), with_head=False, without=["tie_word_embeddings"])
    with pytest.raises(ValueError, match=r"no tensor lm_head.weight .*tie_word_embeddings is false"):
        read_verifier_weights(path, vocab_size=24, hidden_size=8)


def test_epsilon_and_kind_of_the_norm_are_the_verifiers_whatever_the_drafter_has(tmp_path):
    path, weights = saved_weights(tmp_path / "llama", LlamaConfig(**SHAPE, rms_norm_eps=0.5), with_head=True)
    read, norm = read_verifier_weights(path, vocab_size=24, hidden_size=8), RMSNorm(8, 1e-6)
    assert read.fill_norm(norm) is norm and norm.variance_epsilon == 0.5
    assert torch.equal(norm.weight, weights["model.norm.weight"])
    config = CohereConfig(**SHAPE)
    path, _ = saved_weights(tmp_path / "cohere", config, with_head=False, without=["layer_norm_eps", "logit_scale"])
    filled = read_verifier_weights(path, vocab_size=24, hidden_size=8).fill_norm(RMSNorm(8, 1e-6))
    assert isinstance(filled, LayerNorm) and filled.variance_epsilon == config.layer_norm_eps
    assert not filled.weight.requires_grad


# -- what is checked and recorded --------------------------------------------------------------------------------------


def test_layers_by_class_default(tmp_path):
    path = on_disk(tmp_path, LlamaConfig(), without=["num_hidden_layers"])
    assert resolve_target_layer_ids([32, 1], path) == [1, 32]
    with pytest.raises(ValueError, match="the verifier has 32 layers"):
        resolve_target_layer_ids([33], path)


def test_the_record_and_the_check_know_sizes_that_the_file_leaves_out_or_calls_otherwise(tmp_path):
    default = LlamaConfig()
    path = on_disk(tmp_path / "llama", default, without=["vocab_size", "hidden_size", "num_hidden_layers"])
    facts = verifier_facts(path)
    assert (facts["vocab_size"], facts["hidden_size"], facts["num_hidden_layers"]) == (32000, 4096, 32)
    gpt2 = on_disk(tmp_path / "gpt2", GPT2Config(n_embd=8, n_head=2, n_layer=3, vocab_size=24))
    assert (verifier_facts(gpt2)["hidden_size"], verifier_facts(gpt2)["num_hidden_layers"]) == (8, 3)

    drafter = Eagle3SpeculatorConfig(transformer_layer_config=LlamaConfig(**SHAPE), draft_vocab_size=24)
    config, found = verifier_config(path)
    assert not found
    codes = {finding.code for finding in fit_findings(config, drafter, [2, 40], same_tokenizer=False)}
    assert {"verifier-vocab-size", "verifier-hidden-size", "aux-ids-range"} <= codes
