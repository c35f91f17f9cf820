"""SpeculativeConfig against its contract: what it infers, refuses (in which words and order) and writes back."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from transformers import LlamaConfig

from speculators.decoding.config import ModelInfo, ParallelInfo, SpeculativeConfig

LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}


def llama(name="org/verifier", **changes) -> ModelInfo:
    vocab_size = changes.pop("vocab_size", 100)
    hf_config = LlamaConfig(**LLAMA, vocab_size=vocab_size, architectures=["LlamaForCausalLM"])
    return ModelInfo(name, hf_config, **{"max_model_len": 512, **changes})


def checkpoint(folder, **values) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, **LLAMA, **values}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(folder)


# ---- errors: the fields, then inference, then the checks of the whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_speculative_tokens": 0}, "greater than 0"),
        ({"num_speculative_tokens": -2, "method": "ngram"}, "greater than 0"),
        ({"num_spec_tokens": 3}, "Extra inputs are not permitted"),
        (
            {"method": "guess", "num_speculative_tokens": 3},
            "'guess' is no method, and no such directory exists. There are: none, ngram",
        ),
        ({"method": "egle3", "num_speculative_tokens": 3}, "Did you mean 'eagle3'?"),
        ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 0}, "greater than or equal to 1"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "draft_tensor_parallel_size": 0},
            "greater than or equal to 1",
        ),
        ({"method": "ngram", "num_speculative_tokens": 3, "max_model_len": 0}, "greater than or equal to 1"),
        ({"method": "ngram", "num_speculative_tokens": 3, "rejection_sample_method": "lucky"}, "'strict'"),
        ({"method": "mtp", "num_speculative_tokens": 3}, "target_model_config must be present for mtp"),
        ({"method": "deepseek_mtp", "num_speculative_tokens": 1}, "target_model_config must be present for mtp"),
        ({"method": "dspark", "num_speculative_tokens": 3}, "target_model_config must be present for dspark"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens was provided but without speculative model."),
        ({"method": "eagle3", "num_speculative_tokens": 3}, "was provided but without speculative model."),
        ({"method": "custom_class", "num_speculative_tokens": 3}, "method='custom_class' requires 'model'"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 4, "prompt_lookup_max": 2},
            "prompt_lookup_min=4 must be <= prompt_lookup_max=2",
        ),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 0}, "suffix_decoding_max_tree_depth=0 must be >= 1"),
        ({"method": "suffix", "suffix_decoding_max_cached_requests": -1}, "max_cached_requests=-1 must be >= 0"),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": -0.5}, "max_spec_factor=-0.5 must be >= 0"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 1.5}, r"min_token_prob=1.5 must be in \[0, 1\]"),
        ({"model": "org/draft"}, "neither `speculative_token_tree` nor `num_speculative_tokens` was provided"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "index_share_for_mtp_iteration": True},
            "index_share_for_mtp_iteration is only supported with method='mtp'",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "tensor_parallel_size": 2},
            "'tensor_parallel_size' is not a valid argument .* Please pass 'draft_tensor_parallel_size' instead.",
        ),
        ({"method": "ngram"}, "num_speculative_tokens must be provided with speculative model unless"),
        ({"method": "eagle3"}, "num_speculative_tokens must be provided with speculative model unless"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "synthetic_acceptance_length": 2.0},
            "are only valid with rejection_sample_method='synthetic'.",
        ),
        (
            {"model": "org/draft", "num_speculative_tokens": 2, "speculative_token_tree": "[(0, 0)]"},
            r"has \(0, 0\) but not its parent",
        ),
        (
            {"model": "o/d", "num_speculative_tokens": 1, "speculative_token_tree": "[(0,), (0, 0)]"},
            "2 tokens deep but num_speculative_tokens=1",
        ),
        (
            {
                "model": "o/d",
                "num_speculative_tokens": 1,
                "speculative_token_tree": "[(0,), (1,)]",
                "rejection_sample_method": "block",
            },
            "verifies chains only",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "use_heterogeneous_vocab": True},
            "use_heterogeneous_vocab only works with method='draft_model'",
        ),
        (
            {
                "model": "org/draft",
                "num_speculative_tokens": 3,
                "use_heterogeneous_vocab": True,
                "draft_sample_method": "probabilistic",
            },
            "currently only supports greedy draft sampling",
        ),
        (
            {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "enable_adaptive_verification": True,
                "use_local_argmax_reduction": True,
            },
            "Adaptive verification estimates",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "dspark_draft_topk": 4},
            "only supported with method='dspark'",
        ),
        (
            {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "verifier_accept_k": 2,
                "accept_tolerance": 0.1,
                "rejection_sample_method": "block",
            },
            "not by rejection_sample_method='block'; drop one",
        ),
    ],
)
def test_errors_say_what_the_contract_says(fields, message):
    with pytest.raises(ValidationError, match=message):
        SpeculativeConfig(**fields)
    assert issubclass(ValidationError, ValueError)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"method": ', "is not JSON: Expecting value"), ("[1]", "must be a JSON object"), ("ngram", "is not JSON")],
)
def test_what_is_no_json_object_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig.from_vllm_json(text)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "must not be empty"),
        ([(2, 4, 3)], "must start at batch size 1, not 2"),
        ([(1, 4, 3), (4, 8, 1)], "overlap"),
        ([(1, 0, 3)], "1 <= start <= end"),
        ([(1, 4, -1)], "K must be >= 0"),
    ],
)
def test_batch_size_schedules_are_checked(ranges, message):
    with pytest.raises(ValidationError, match=message):
        SpeculativeConfig(method="ngram", num_speculative_tokens=3, num_speculative_tokens_per_batch_size=ranges)


@pytest.mark.parametrize(
    ("rates", "length", "message"),
    [
        (None, None, "requires exactly one of"),
        ([1.0, 0.5, 0.1], 2.0, "requires exactly one of"),
        ([0.5, 0.4], None, "must have length 3"),
        ([1.2, 0.5, 0.1], None, r"entries must be in \[0, 1\]"),
        ([0.5, 0.6, 0.1], None, "must be non-increasing"),
        (None, 0.9, r"must be in \[1, 4\]"),
        (None, 4.1, r"must be in \[1, 4\]"),
    ],
)
def test_synthetic_acceptance_is_checked(rates, length, message):
    with pytest.raises(ValidationError, match=message):
        SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=3,
            rejection_sample_method="synthetic",
            synthetic_acceptance_rates=rates,
            synthetic_acceptance_length=length,
        )


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        # a field's range before inference, inference before the checks, the checks in their order
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 0, "prompt_lookup_max": 0}, "prompt_lookup_max"),
        (
            {"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 2, "tensor_parallel_size": 2},
            "prompt_lookup_min=4",
        ),
        ({"method": "ngram", "tensor_parallel_size": 2}, "'tensor_parallel_size'"),
        ({"method": "ngram", "synthetic_acceptance_length": 2.0}, "num_speculative_tokens must be provided"),
        (
            {"method": "suffix", "suffix_decoding_max_tree_depth": 0, "suffix_decoding_min_token_prob": 2},
            "suffix_decoding_max_tree_depth=0",
        ),
    ],
)
def test_the_first_of_two_errors_is_reported(fields, first):
    with pytest.raises(ValidationError) as caught:
        SpeculativeConfig(**fields)
    assert len(caught.value.errors()) == 1
    assert first in str(caught.value)


# ---- inference


@pytest.mark.parametrize(
    ("fields", "method", "model", "num_tokens"),
    [
        ({"model": "ngram", "num_speculative_tokens": 3}, "ngram", "ngram", 3),
        ({"model": "[ngram]", "num_speculative_tokens": 3}, "ngram", "[ngram]", 3),
        ({"method": "ngram", "num_speculative_tokens": 3}, "ngram", "ngram", 3),
        ({"method": "ngram_gpu", "num_speculative_tokens": 3}, "ngram_gpu", "ngram_gpu", 3),
        ({"method": "suffix"}, "suffix", None, 24),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 7}, "suffix", None, 7),
        ({"method": "suffix", "num_speculative_tokens": 5}, "suffix", "suffix", 5),
        (
            {"method": "extract_hidden_states", "num_speculative_tokens": 1},
            "extract_hidden_states",
            "extract_hidden_states",
            1,
        ),
        (
            {"model": "package.module.Proposer", "num_speculative_tokens": 2},
            "custom_class",
            "package.module.Proposer",
            2,
        ),
        ({"model": "org/EAGLE-Llama", "num_speculative_tokens": 2}, "eagle", "org/EAGLE-Llama", 2),
        ({"model": "org/x_eagle3", "num_speculative_tokens": 2}, "eagle3", "org/x_eagle3", 2),
        ({"model": "org/x-DFlash-b16", "num_speculative_tokens": 15}, "dflash", "org/x-DFlash-b16", 15),
        ({"model": "org/dspark_block7", "num_speculative_tokens": 7}, "dspark", "org/dspark_block7", 7),
        ({"model": "org/small", "num_speculative_tokens": 2}, "draft_model", "org/small", 2),
        ({"model": "org/eagle3", "method": "draft_model", "num_speculative_tokens": 2}, "draft_model", "org/eagle3", 2),
        ({"model": "org/x", "method": "eagle3", "num_speculative_tokens": 2}, "eagle3", "org/x", 2),
        ({"method": "early_exit", "num_speculative_tokens": 2}, "early_exit", "early_exit", 2),
        ({"method": "ngram", "num_speculative_tokens": 4, "model": None}, "ngram", "ngram", 4),
    ],
)
def test_method_model_and_number_of_tokens_are_inferred(fields, method, model, num_tokens):
    config = SpeculativeConfig(**fields)
    assert (config.method, config.model, config.num_speculative_tokens) == (method, model, num_tokens)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(None, None, (5, 5)), (2, None, (2, 2)), (None, 4, (4, 4)), (2, 4, (2, 4))]
)
def test_lookup_windows_fill_each_other_in(low, high, expected):
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_min=low, prompt_lookup_max=high)
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == expected


def test_other_methods_have_no_lookup_window():
    config = SpeculativeConfig(model="org/x_eagle3", num_speculative_tokens=3)
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == (0, 0)


def test_defaults_are_the_contracts():
    config = SpeculativeConfig(method="suffix")
    assert (config.suffix_decoding_max_tree_depth, config.suffix_decoding_max_cached_requests) == (24, 10000)
    assert (config.suffix_decoding_max_spec_factor, config.suffix_decoding_min_token_prob) == (1.0, 0.1)
    assert (config.rejection_sample_method, config.draft_sample_method) == ("strict", "greedy")
    assert not config.parallel_drafting
    assert config.acceptance_rule().lossless


@pytest.mark.parametrize(
    ("fields", "lossless", "draws"),
    [
        ({}, True, False),
        ({"rejection_sample_method": "strict", "draft_sample_method": "probabilistic"}, True, False),
        ({"rejection_sample_method": "probabilistic"}, True, True),
        ({"draft_sample_method": "probabilistic"}, True, True),
        ({"rejection_sample_method": "standard"}, True, False),
        ({"rejection_sample_method": "block", "draft_sample_method": "probabilistic"}, True, True),
        ({"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5}, False, False),
        ({"verifier_accept_k": 3, "accept_tolerance": 0.2}, False, False),
        ({"verifier_accept_k": 1, "accept_tolerance": 0.2}, True, False),
    ],
)
def test_rules_and_draft_sampling_follow_from_both_vocabularies(fields, lossless, draws):
    config = SpeculativeConfig(model="org/x_eagle3", num_speculative_tokens=3, **fields)
    assert (config.acceptance_rule().lossless, config.draws_drafts) == (lossless, draws)


@pytest.mark.parametrize(
    ("length", "rates"), [(1, [0, 0, 0]), (2.5, [1, 0.5, 0]), (4, [1, 1, 1]), (1.25, [0.25, 0, 0])]
)
def test_a_synthetic_length_becomes_rates_of_that_mean(length, rates):
    config = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=3,
        rejection_sample_method="synthetic",
        synthetic_acceptance_length=length,
    )
    assert config.synthetic_acceptance_rates == pytest.approx(rates)
    assert config.synthetic_acceptance_length is None
    assert 1 + sum(config.synthetic_acceptance_rates) == pytest.approx(length)


def test_token_trees_default_to_a_chain_and_are_written_breadth_first():
    assert SpeculativeConfig(model="o/d", num_speculative_tokens=2).speculative_token_tree == "[(0,), (0, 0)]"
    long = SpeculativeConfig(model="o/d", num_speculative_tokens=2000)  # as paths: two million numbers
    assert long.speculative_token_tree is None and long.max_depth == 2000
    given = SpeculativeConfig(model="o/d", num_speculative_tokens=2, speculative_token_tree="[(0, 0), (1,), (0,)]")
    assert given.speculative_token_tree == "[(0,), (1,), (0, 0)]"
    assert SpeculativeConfig(method="ngram", num_speculative_tokens=2).speculative_token_tree is None


def test_a_schedule_gives_k_by_batch_size():
    config = SpeculativeConfig(
        method="ngram", num_speculative_tokens=4, num_speculative_tokens_per_batch_size=[(9, 16, 0), (1, 4, 8)]
    )
    assert [config.num_tokens_at(n) for n in (1, 4, 5, 8, 9, 16, 99)] == [4, 4, 4, 4, 0, 0, 0]


def test_the_deprecated_mtp_names_mean_mtp(caplog):
    with caplog.at_level(logging.WARNING):
        config = SpeculativeConfig(method="mimo_mtp", model="org/mimo", num_speculative_tokens=1)
    assert config.method == "mtp"
    assert "deprecated" in caplog.text


# ---- against a verifier and a draft on disk


def test_mtp_without_a_model_drafts_with_the_targets_own_layers():
    target = llama("org/mimo", quantization="fp8")
    target.hf_config.architectures, target.hf_config.num_nextn_predict_layers = ["MiMoForCausalLM"], 2
    config = SpeculativeConfig(method="mtp", num_speculative_tokens=4, target_model_config=target)
    assert (config.model, config.quantization) == ("org/mimo", "fp8")
    assert config.draft_model_config.hf_config.model_type == "mimo_mtp"
    assert target.hf_config.architectures == ["MiMoForCausalLM"]  # the target's own config is left alone
    assert config.use_multi_module_mtp()
    with pytest.raises(ValidationError, match="num_speculative_tokens:3 must be divisible by n_predict=2"):
        SpeculativeConfig(method="mtp", num_speculative_tokens=3, target_model_config=target)
    assert (
        SpeculativeConfig(method="mtp", num_speculative_tokens=1, target_model_config=target).num_speculative_tokens
        == 1
    )
    shared = SpeculativeConfig(
        method="mtp", num_speculative_tokens=2, target_model_config=target, index_share_for_mtp_iteration=True
    )
    assert shared.draft_model_config.hf_config.index_share_for_mtp_iteration is True
    assert shared.compute_hash() != config.compute_hash()


def test_own_layers_are_read_from_where_the_targets_weights_are(tmp_path):
    target = llama("/cache/copy")
    target.hf_config.architectures, target.hf_config.num_nextn_predict_layers = ["MiMoForCausalLM"], 1
    target.model_weights = "s3://bucket/mimo"
    config = SpeculativeConfig(method="mtp", num_speculative_tokens=1, target_model_config=target)
    assert config.model == "s3://bucket/mimo"
    assert config.draft_model_config.hf_config.model_type == "mimo_mtp"


def test_a_draft_that_looks_ahead_is_told_how_far(tmp_path):
    draft = checkpoint(tmp_path / "draft", num_lookahead_tokens=2)
    config = SpeculativeConfig(model=draft, num_speculative_tokens=5)
    assert config.draft_model_config.hf_config.num_lookahead_tokens == 5


def test_mtp_for_deepseek_v32_runs_eagerly():
    target = llama("org/v32")
    target.hf_config = SimpleNamespace(
        model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"], num_nextn_predict_layers=1
    )
    config = SpeculativeConfig(method="mtp", num_speculative_tokens=1, target_model_config=target)
    assert config.enforce_eager is True


def test_number_of_tokens_comes_from_n_predict(tmp_path):
    draft = checkpoint(tmp_path / "draft", model_type="medusa", n_predict=4, architectures=["MedusaModel"])
    config = SpeculativeConfig(model=draft)
    assert (config.method, config.num_speculative_tokens) == ("medusa", 4)


@pytest.mark.parametrize("model_type", ["mimo_mtp", "step3p5_mtp"])
def test_more_tokens_than_mtp_layers_are_warned_of_where_a_layer_would_run_again(tmp_path, model_type, caplog):
    draft = checkpoint(tmp_path / "draft", model_type=model_type, architectures=["X"])
    assert SpeculativeConfig(model=draft, num_speculative_tokens=2).method == "mtp"
    assert ("same MTP layer repeatedly" in caplog.text) == (model_type == "mimo_mtp")


def test_a_target_that_ships_dspark_stages_in_the_place_of_mtp_says_so():
    target = llama("org/v41")
    target.hf_config = SimpleNamespace(
        model_type="deepseek_v41", architectures=["DeepseekV41ForCausalLM"], num_nextn_predict_layers=1
    )
    with pytest.raises(ValidationError, match="use speculative method 'dspark' instead of 'mtp'"):
        SpeculativeConfig(method="mtp", num_speculative_tokens=1, target_model_config=target)


def test_a_draft_under_the_first_name_of_its_architecture_is_recognised(tmp_path):
    draft = checkpoint(tmp_path / "draft", model_type="qwen3", architectures=["DSparkDraftModel"], block_size=7)
    config = SpeculativeConfig(model=draft)
    assert (config.method, config.num_speculative_tokens, config.parallel_drafting) == ("dspark", 7, True)
    with pytest.raises(ValidationError, match=r"between 1 and the draft vocabulary size \(100\)"):
        SpeculativeConfig(model=draft, dspark_draft_topk=101)
    named = checkpoint(tmp_path / "named", architectures=["Qwen3DSparkModel"], dspark_block_size=5)
    assert SpeculativeConfig(model=named).num_speculative_tokens == 5
    assert config.draft_model_config.hf_config.architectures == ["Qwen3DSparkModel"]
    other = checkpoint(tmp_path / "other", model_type="qwen3", architectures=["Qwen3ForCausalLM"], block_size=7)
    assert SpeculativeConfig(model=other, num_speculative_tokens=2).method == "draft_model"


@pytest.mark.parametrize(
    ("method", "given", "served"),
    [
        ("eagle", "LlamaForCausalLM", "EagleLlamaForCausalLM"),
        ("eagle", "EagleMistralForCausalLM", "EagleMistralForCausalLM"),
        ("eagle3", "LlamaForCausalLM", "Eagle3LlamaForCausalLM"),
        ("eagle3", "LlamaForCausalLMEagle3", "LlamaForCausalLMEagle3"),
        ("dflash", "Qwen3ForCausalLM", "DFlashQwen3ForCausalLM"),
    ],
)
def test_a_foreign_draft_becomes_an_eagle_config_named_after_its_method(tmp_path, method, given, served):
    draft = checkpoint(tmp_path / "draft", architectures=[given])
    config = SpeculativeConfig(model=draft, method=method, num_speculative_tokens=2).draft_model_config.hf_config
    assert (config.model_type, config.architectures) == ("eagle", [served])


@pytest.mark.parametrize("method", ["medusa", "mtp", "mlp_speculator"])
def test_an_explicit_method_needs_a_draft_of_its_type(tmp_path, method):
    draft = checkpoint(tmp_path / "draft")
    with pytest.raises(NotImplementedError, match=f"Unsupported speculative method: '{method}'"):
        SpeculativeConfig(model=draft, method=method, num_speculative_tokens=2)


@pytest.mark.parametrize(
    ("kind", "method", "parallel", "k"),
    [
        ("eagle3", "eagle3", False, 3),
        ("peagle", "eagle3", True, 8),
        ("dflash", "dflash", True, 15),
        ("mtp", "mtp", False, 1),
    ],
)
def test_a_speculators_checkpoint_says_its_method_and_k(tmp_path, kind, method, parallel, k, caplog):
    proposal = {"proposal_type": "greedy", "speculative_tokens": k, "verifier_accept_k": 2, "accept_tolerance": 0.5}
    folder = checkpoint(
        tmp_path / "eagle-named-misleadingly",
        model_type=None,
        speculators_model_type=kind,
        speculators_config={"algorithm": kind, "proposal_methods": [proposal]},
    )
    config = SpeculativeConfig(model=folder)
    assert (config.method, config.parallel_drafting, config.num_speculative_tokens) == (method, parallel, k)
    assert "verifying losslessly" in caplog.text
    assert config.acceptance_rule().lossless
    assert SpeculativeConfig(model=folder, num_speculative_tokens=2).num_speculative_tokens == 2
    with pytest.raises(ValidationError, match=f"is a speculator of type '{kind}'"):
        SpeculativeConfig(model=folder, method="medusa")


def test_lengths_parallelism_and_vocabularies_are_checked_against_the_target(tmp_path):
    draft = checkpoint(tmp_path / "draft", max_position_embeddings=256)
    given = {"model": draft, "num_speculative_tokens": 2, "target_model_config": llama()}
    config = SpeculativeConfig(**given)
    assert (config.method, config.draft_model_config.max_model_len) == ("draft_model", 256)
    assert SpeculativeConfig(**given, max_model_len=100).draft_model_config.max_model_len == 100
    with pytest.raises(
        ValidationError, match="speculative_max_model_len=300 cannot be larger than draft_max_model_len=256"
    ):
        SpeculativeConfig(**given, max_model_len=300)
    short = {**given, "target_model_config": llama(max_model_len=128)}
    with pytest.raises(
        ValidationError, match="speculative_max_model_len=200 cannot be larger than target_max_model_len=128"
    ):
        SpeculativeConfig(**short, max_model_len=200)
    four = {"target_parallel_config": ParallelInfo(tensor_parallel_size=4)}
    assert SpeculativeConfig(**given, **four).draft_parallel_config.tensor_parallel_size == 4
    one = SpeculativeConfig(**given, **four, draft_tensor_parallel_size=1)
    assert one.draft_parallel_config.tensor_parallel_size == 1
    with pytest.raises(ValidationError, match="cannot be other value than 1 or target model tensor_parallel_size"):
        SpeculativeConfig(**given, **four, draft_tensor_parallel_size=2)
    with pytest.raises(
        ValidationError, match=r"attention heads \(4\).*must be divisible by tensor parallel size \(8\)"
    ):
        SpeculativeConfig(**given, target_parallel_config=ParallelInfo(tensor_parallel_size=8))
    other = {**given, "target_model_config": llama(vocab_size=90)}
    with pytest.raises(ValidationError, match="Target and draft model should have the same vocabulary size"):
        SpeculativeConfig(**other)
    assert SpeculativeConfig(**other, use_heterogeneous_vocab=True).method == "draft_model"


def test_mlp_speculators_run_on_one_device(tmp_path, caplog):
    draft = checkpoint(tmp_path / "draft", model_type="mlp_speculator", n_predict=3, architectures=["MLPSpeculator"])
    parallel = ParallelInfo(tensor_parallel_size=4)
    config = SpeculativeConfig(model=draft, target_model_config=llama(), target_parallel_config=parallel)
    assert (config.method, config.num_speculative_tokens) == ("mlp_speculator", 3)
    assert config.draft_parallel_config.tensor_parallel_size == 1
    assert "runs on one device" in caplog.text


@dataclass
class ServedModel:
    """A target that does not say that it gives intermediate states, as a serving engine's own record."""

    model: str
    hf_config: object
    max_model_len: int = 512


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_serving_targets_of_other_types_have_no_intermediate_states(tmp_path, method):
    draft = checkpoint(tmp_path / "draft")
    given = {"model": draft, "method": method, "num_speculative_tokens": 2}
    falcon = ServedModel("org/falcon", SimpleNamespace(model_type="falcon"))
    with pytest.raises(ValidationError, match=rf"{method} is only supported for \['llama', .*Got target_type='falcon'"):
        SpeculativeConfig(**given, target_model_config=falcon)
    qwen = ServedModel("org/qwen", SimpleNamespace(model_type="qwen3"))
    assert SpeculativeConfig(**given, target_model_config=qwen).method == method
    ours = ModelInfo("org/falcon", SimpleNamespace(model_type="falcon"), 512)  # our engine hooks any decoder layer
    assert SpeculativeConfig(**given, target_model_config=ours).method == method


def test_extract_hidden_states_overlays_the_targets_config():
    config = SpeculativeConfig(
        method="extract_hidden_states",
        num_speculative_tokens=1,
        target_model_config=llama(),
        draft_model_config={"hf_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}},
    )
    draft = config.draft_model_config.hf_config
    assert (draft.model_type, draft.architectures) == ("extract_hidden_states", ["ExtractHiddenStatesModel"])
    assert (draft.hidden_size, draft.eagle_aux_hidden_state_layer_ids) == (32, [1, 2])
    plain = SpeculativeConfig(method="extract_hidden_states", num_speculative_tokens=1, target_model_config=llama())
    assert plain.compute_hash() != config.compute_hash()


def test_the_same_input_can_be_resolved_later():
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=2)
    target = llama()
    resolved = config.with_target(target)
    assert resolved.draft_model_config is target
    assert resolved.given == {**config.given, "target_model_config": target}


# ---- helpers


@pytest.mark.parametrize(
    ("fields", "slots", "eagle"),
    [
        ({"method": "ngram"}, 0, False),
        ({"model": "org/x_eagle3"}, 0, True),
        ({"model": "org/x_eagle3", "parallel_drafting": True}, 3, True),
        ({"model": "org/dflash"}, 3, True),
        ({"model": "org/small"}, 1, False),
        ({"model": "org/small", "parallel_drafting": True}, 4, False),
    ],
)
def test_slots_and_kinds_of_methods(fields, slots, eagle):
    config = SpeculativeConfig(num_speculative_tokens=4, **fields)
    assert (config.max_num_new_slots_for_drafting, config.use_eagle()) == (slots, eagle)
    assert config.use_eagle_block_drop() == eagle
    assert config.use_ngram() == (config.method == "ngram")


def test_eagle_like_methods_drop_the_last_block_unless_told_not_to():
    config = SpeculativeConfig(model="org/x_eagle3", num_speculative_tokens=2, disable_eagle_block_drop=True)
    assert config.use_eagle() and not config.use_eagle_block_drop()


def test_repr_names_method_model_and_k():
    assert repr(SpeculativeConfig(method="ngram", num_speculative_tokens=3)) == (
        "SpeculativeConfig(method='ngram', model=None, num_spec_tokens=3)"
    )
    assert "model='org/x_eagle3'" in repr(SpeculativeConfig(model="org/x_eagle3", num_speculative_tokens=3))


def test_the_hash_follows_the_states_the_verifier_must_return_and_nothing_else():
    hashes = {k: SpeculativeConfig(model="org/x_eagle3", num_speculative_tokens=k).compute_hash() for k in (1, 5)}
    assert hashes[1] == hashes[5]
    assert hashes[1] != SpeculativeConfig(method="ngram", num_speculative_tokens=1).compute_hash()
    dspark = {
        adaptive: SpeculativeConfig(
            model="org/dspark", num_speculative_tokens=2, enable_adaptive_verification=adaptive
        ).compute_hash()
        for adaptive in (False, True)
    }
    assert dspark[False] != dspark[True]


# ---- vLLM's JSON


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
        {"method": "suffix", "num_speculative_tokens": 8, "suffix_decoding_min_token_prob": 0.2},
        {"method": "eagle3", "model": "org/draft", "num_speculative_tokens": 3, "draft_tensor_parallel_size": 1},
        {"method": "draft_model", "model": "org/draft", "num_speculative_tokens": 3, "max_model_len": 128},
        {"method": "eagle3", "model": "o/d", "num_speculative_tokens": 3, "rejection_sample_method": "standard"},
        {
            "method": "eagle3",
            "model": "org/draft",
            "num_speculative_tokens": 3,
            "rejection_sample_method": "block",
            "draft_sample_method": "probabilistic",
        },
        {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [0.9, 0.5],
        },
        {"method": "custom_class", "model": "package.Proposer", "num_speculative_tokens": 2},
        {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "num_speculative_tokens_per_batch_size": [[1, 8, 3], [9, 64, 1]],
        },
        {"method": "eagle3", "model": "o/d", "num_speculative_tokens": 4, "parallel_drafting": True},
        {"method": "dflash", "model": "o/d", "num_speculative_tokens": 7},
        {"method": "dspark", "model": "o/d", "num_speculative_tokens": 7, "dspark_draft_topk": 4},
        {"method": "ngram", "num_speculative_tokens": 3, "attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
    ],
)
def test_a_json_that_vllm_accepts_comes_back_unchanged(settings):
    written = json.loads(SpeculativeConfig.from_vllm_json(json.dumps(settings)).to_vllm_json())
    assert written == settings


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rejection_sample_method": "strict"}, {}),
        (
            {"rejection_sample_method": "probabilistic"},
            {"rejection_sample_method": "standard", "draft_sample_method": "probabilistic"},
        ),
        (
            {"draft_sample_method": "probabilistic"},
            {"rejection_sample_method": "standard", "draft_sample_method": "probabilistic"},
        ),
        ({"speculative_token_tree": "[(0,), (0, 0)]"}, {}),
        ({"attention_backend": "auto"}, {}),
    ],
)
def test_older_words_are_translated(ours, theirs):
    base = {"method": "eagle3", "model": "org/draft", "num_speculative_tokens": 2}
    assert json.loads(SpeculativeConfig(**base, **ours).to_vllm_json()) == {**base, **theirs}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": "o/d", "speculative_token_tree": "[(0,), (1,)]"}, "speculative_token_tree"),
        ({"model": "o/d", "verifier_accept_k": 2, "accept_tolerance": 0.1}, "verifier_accept_k"),
        ({"method": "early_exit", "early_exit_layer": 2}, "early_exit_layer"),
        ({"method": "early_exit"}, "method"),
    ],
)
def test_what_vllm_would_not_accept_is_named(fields, name):
    config = SpeculativeConfig(num_speculative_tokens=2, **fields)
    assert name in config.vllm_unsupported()
    with pytest.raises(ValueError, match=f"vLLM would not accept .*{name}"):
        config.to_vllm_json()
    assert name not in json.loads(config.to_vllm_json(drop_unsupported=True))


def test_errors_in_python_read_like_those_of_the_command_line():
    with pytest.raises(ValidationError) as caught:
        SpeculativeConfig(method="ngram", num_speculative_tokens=0)
    assert str(caught.value) == "num_speculative_tokens: must be greater than 0, got 0"
    with pytest.raises(ValidationError) as caught:
        SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_min=5, prompt_lookup_max=3)
    assert str(caught.value) == "prompt_lookup_min=5 must be <= prompt_lookup_max=3"


@pytest.mark.parametrize(
    ("retired", "instead"),
    [
        ({"disable_by_batch_size": 8}, "num_speculative_tokens_per_batch_size=[[1, 8, 3], [9, 4096, 0]]"),
        ({"acceptance_method": "rejection_sampler"}, "say rejection_sample_method"),
        ({"posterior_threshold": 0.09}, "leave it out"),
        ({"posterior_alpha": 0.3}, "leave it out"),
        ({"disable_mqa_scorer": True}, "leave it out"),
        ({"disable_logprobs": True}, "leave it out"),
    ],
)
def test_a_retired_key_says_what_replaces_it(retired, instead):
    with pytest.raises(ValidationError) as caught:
        SpeculativeConfig.from_vllm_json(json.dumps({"method": "ngram", "num_speculative_tokens": 3, **retired}))
    assert str(caught.value).startswith(f"{next(iter(retired))} is retired: ")
    assert instead in str(caught.value)


def test_what_replaces_the_batch_size_that_ended_drafting_does_the_same():
    ranges = [[1, 8, 3], [9, 4096, 0]]
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=3, num_speculative_tokens_per_batch_size=ranges)
    assert [config.num_tokens_at(size) for size in (1, 8, 9, 64)] == [3, 3, 0, 0]
