"""The same settings, read by vLLM's own class: what we write it accepts, what we refuse it refuses in the same words.

Runs in an environment that has vLLM: `pytest -m vllm tests/speculative_config`.
"""

from __future__ import annotations

import copy
import json
import re
from typing import get_args

import pytest
from transformers import PretrainedConfig

from speculators.checkpoint.engine_profile import profile_of_version
from speculators.decoding.config import SpeculativeConfig, hf_config_override

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("vllm.config.speculative").SpeculativeConfig


NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
ACCEPTED = [
    NGRAM,
    {"model": "ngram", "num_speculative_tokens": 2},
    {"model": "[ngram]", "num_speculative_tokens": 2},
    {**NGRAM, "prompt_lookup_max": 4},
    {**NGRAM, "prompt_lookup_min": 2},
    {**NGRAM, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    {**NGRAM, "rejection_sample_method": "standard"},
    {**NGRAM, "rejection_sample_method": "block", "draft_sample_method": "probabilistic"},
    {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5},
    {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.9, 0.5, 0.1]},
    {**NGRAM, "num_speculative_tokens_per_batch_size": [(1, 4, 3), (5, 8, 1)]},
    {"method": "ngram_gpu", "num_speculative_tokens": 3},
    {"method": "custom_class", "model": "package.Proposer", "num_speculative_tokens": 2},
    {"model": "package.Proposer", "num_speculative_tokens": 2},
]
OURS_TOO = [{**NGRAM, "rejection_sample_method": "strict"}, {**NGRAM, "rejection_sample_method": "probabilistic"}]
SHARED = (
    "method",
    "num_speculative_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
    "synthetic_acceptance_rates",
    "synthetic_acceptance_length",
    "max_num_new_slots_for_drafting",
    "parallel_drafting",
)


@pytest.mark.parametrize("settings", ACCEPTED, ids=json.dumps)
def test_both_infer_the_same(theirs, settings):
    ours, reference = SpeculativeConfig(**settings), theirs(**settings)
    assert {name: getattr(ours, name) for name in SHARED} == {name: getattr(reference, name) for name in SHARED}
    assert ours.use_eagle() == reference.use_eagle()
    if ours.method != "ngram_gpu":  # theirs cannot be printed without a draft config
        assert repr(ours) == repr(reference)


@pytest.mark.parametrize("settings", ACCEPTED + OURS_TOO, ids=json.dumps)
def test_vllm_accepts_what_we_write(theirs, settings):
    written = json.loads(SpeculativeConfig(**settings).to_vllm_json())
    theirs(**written)


def test_the_profile_of_this_release_is_what_its_class_says(theirs):
    """Methods, keys and words of the installed release; `import vllm` is that of the marked environment."""
    vllm, source = pytest.importorskip("vllm"), pytest.importorskip("vllm.config.speculative")
    profile = profile_of_version("vllm", vllm.__version__)
    assert profile.describes(vllm.__version__), f"{vllm.__version__} has no profile: write one"
    assert {*profile.methods, *profile.old_method_names} == set(get_args(source.SpeculativeMethod))
    assert {*profile.old_method_names, "mtp"} == set(get_args(source.MTPModelTypes))
    assert get_args(source.RejectionSampleMethod) == profile.choices["rejection_sample_method"]
    assert get_args(source.DraftSampleMethod) == profile.choices["draft_sample_method"]
    engines = {"target_model_config", "target_parallel_config", "draft_parallel_config"}
    assert set(profile.settings) == set(theirs.__dataclass_fields__) - engines
    kinds = pytest.importorskip("vllm.transformers_utils.configs.speculators.algos").SUPPORTED_SPECULATORS_TYPES
    assert set(profile.checkpoint_types) == set(kinds)
    registry = pytest.importorskip("vllm.model_executor.models.registry").ModelRegistry
    classes = {"medusa": "MedusaModel", "mlp_speculator": "MLPSpeculatorPreTrainedModel"}
    for method, name in classes.items():
        assert profile.takes_method(method) is (name in registry.get_supported_archs())


@pytest.mark.parametrize(("method", "rope_type"), [("eagle3", "default"), ("eagle3", "yarn")])
def test_positions_are_raised_as_the_profile_says(theirs, method, rope_type):
    profile = profile_of_version("vllm", pytest.importorskip("vllm").__version__)
    draft = PretrainedConfig()
    draft.max_position_embeddings, draft.rope_parameters = 64, {"rope_type": rope_type}
    theirs._maybe_override_draft_max_position_embeddings(draft, 128)
    kinds = profile.lengthened_rope_types
    assert method in profile.lengthens_drafts_of
    assert (draft.max_position_embeddings == 128) is (kinds is None or rope_type in kinds)


@pytest.mark.parametrize("new", [{"rejection_sample_method": "fly"}, {"disable_lookahead_block_hashes": True}])
def test_settings_of_a_later_release_are_refused_by_this_one(theirs, new):
    version = pytest.importorskip("vllm").__version__
    config = SpeculativeConfig(**NGRAM, **new)
    profile = profile_of_version("vllm", version)
    try:
        theirs(**NGRAM, **new)
    except ValueError:
        assert config.vllm_unsupported(profile.version)
    else:
        assert not config.vllm_unsupported(profile.version)


REFUSED = [
    {"num_speculative_tokens": 3},
    {"method": "eagle3", "num_speculative_tokens": 3},
    {"method": "mtp", "num_speculative_tokens": 3},
    {"method": "dspark", "num_speculative_tokens": 3},
    {"method": "custom_class", "num_speculative_tokens": 3},
    {"method": "ngram"},
    {"method": "eagle3"},
    {**NGRAM, "prompt_lookup_min": 4, "prompt_lookup_max": 2},
    {**NGRAM, "tensor_parallel_size": 2},
    {**NGRAM, "num_speculative_tokens": 0},
    {**NGRAM, "prompt_lookup_max": 0},
    {**NGRAM, "synthetic_acceptance_length": 2.0},
    {**NGRAM, "rejection_sample_method": "synthetic"},
    {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5]},
    {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5, 0.6, 0.1]},
    {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.5, 0.6, 0.1]},
    {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 5},
    {**NGRAM, "index_share_for_mtp_iteration": True},
    {**NGRAM, "use_heterogeneous_vocab": True},
    {**NGRAM, "enable_adaptive_verification": True, "use_local_argmax_reduction": True},
    {**NGRAM, "dspark_draft_topk": 0},
]


def reasons(make, settings) -> list[str]:
    """The sentences of a ValidationError, without the inputs it quotes."""
    with pytest.raises(ValueError) as caught:
        make(**settings)
    return [re.sub(r"^Value error, |[.\s]+$", "", error["msg"]) for error in caught.value.errors()]


@pytest.mark.parametrize("settings", REFUSED, ids=json.dumps)
def test_both_refuse_in_the_same_words(theirs, settings):
    assert reasons(SpeculativeConfig, settings) == reasons(theirs, settings)


FAMILIES = [
    ("deepseek_v3", "X"),
    ("deepseek_v4", "X"),
    ("deepseek_v41", "X"),
    ("pangu_ultra_moe", "X"),
    ("qwen2", "MiMoForCausalLM"),
    ("mimo", "MiMoV2OmniForCausalLM"),
    ("mimo", "MiMoV2FlashForCausalLM"),
    ("mimo", "MiMoV2ForCausalLM"),
    ("glm4_moe", "Glm4MoeForCausalLM"),
    ("glm4", "Glm4MoeLiteForCausalLM"),
    ("glm_ocr", "GlmOcrForConditionalGeneration"),
    ("ernie4_5_moe", "X"),
    ("nemotron_h", "X"),
    ("nemotron_h_puzzle", "X"),
    ("qwen3_next", "X"),
    ("exaone_moe", "X"),
    ("exaone4_5", "X"),
    ("qwen3_5", "X"),
    ("qwen3_5_moe", "X"),
    ("qwen3_5_text", "X"),
    ("longcat_flash", "X"),
    ("step3p5", "X"),
    ("x", "Step3p5ForCausalLM"),
    ("hy_v3", "X"),
    ("hy_v4", "X"),
    ("bailing_hybrid", "X"),
    ("b", "BailingMoeV3ForCausalLM"),
    ("b", "BailingMoeV2_5ForCausalLM"),
    ("gemma4_assistant", "X"),
    ("minimax_m3_mtp", "X"),
    ("dots3_note", "X"),
    ("mistral", "MistralLarge3ForCausalLM"),
    ("llama", "LlamaForCausalLM"),
    ("qwen3_next_mtp", "X"),
    ("mimo_mtp", "X"),
]


@pytest.mark.parametrize(("model_type", "architecture"), FAMILIES)
def test_mtp_drafts_are_the_same(theirs, model_type, architecture):
    extra = {
        "num_nextn_predict_layers": 2,
        "mtp_num_hidden_layers": 3,
        "num_hidden_layers": 8,
        "layer_types": ["full_attention"],
    }
    config = PretrainedConfig(architectures=[architecture])
    for name, value in {**extra, "model_type": model_type}.items():
        setattr(config, name, value)
    drafts = [override(copy.deepcopy(config)) for override in (hf_config_override, theirs.hf_config_override)]
    keys = ("model_type", "architectures", "n_predict", "num_hidden_layers", "num_nextn_predict_layers", "layer_types")
    ours, reference = ({key: getattr(draft, key, None) for key in keys} for draft in drafts)
    assert ours == reference


@pytest.mark.parametrize("method", ["eagle", "eagle3", "dflash"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForCausalLMEagle3", "EagleX", "DFlashDraftModel"])
def test_foreign_drafts_are_named_the_same(tmp_path, method, architecture):
    wrapped = pytest.importorskip("vllm.transformers_utils.configs.eagle").EAGLEConfig
    values = {"model_type": "llama", "architectures": [architecture], "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours = SpeculativeConfig(model=str(tmp_path), method=method, num_speculative_tokens=2)
    theirs = wrapped(PretrainedConfig(architectures=[architecture], vocab_size=9), method=method, model_type="eagle")
    assert ours.draft_model_config.hf_config.architectures == theirs.architectures
    assert ours.draft_model_config.hf_config.model_type == theirs.model_type
