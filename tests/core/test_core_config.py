"""Config records: construction, validation, the JSON on disk, and what survives a round trip."""

import copy
import json
import pickle
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import transformers
from pydantic import ValidationError
from toyalgo import ToyAlgoConfig, decoder_config, speculators_config, toy_config
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from speculators import SpeculatorModelConfig, SpeculatorsConfig, TokenProposalConfig, VerifierConfig, reload_schemas
from speculators.proposals import GreedyTokenProposalConfig

GOLDEN = sorted(Path(__file__).parent.glob("golden/*.json"))


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.name.removesuffix(".config.json"))
def test_the_published_configs_come_back_byte_for_byte(file, tmp_path):
    text = file.read_text()
    name = json.loads(text)["speculators_model_type"]
    if SpeculatorModelConfig.find(name) is None:
        pytest.skip(f"there is no {name} yet")
    config = SpeculatorModelConfig.from_dict(json.loads(text))
    assert type(config) is SpeculatorModelConfig.registry[name]
    config.save_pretrained(tmp_path)
    expected = text.replace('"transformers_version": "5.19.0"', f'"transformers_version": "{transformers.__version__}"')
    saved = json.loads((tmp_path / "config.json").read_text())
    # fields this library adds are written too; everything published keeps its key and value
    published = json.loads(expected)
    assert {key: saved.get(key) for key in published} == published
    assert (tmp_path / "config.json").read_text() == json.dumps(saved, indent=2, sort_keys=True) + "\n"


def test_config_json_of_a_toy_config_is_exactly_this(tmp_path):
    toy_config(speculators_config=speculators_config("org/verifier"), speculators_version="1").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    nested = saved.pop("transformer_layer_config")
    assert saved == {
        "depth": 1,
        "draft_vocab_size": 8,
        "speculators_config": {
            "algorithm": "toyalgo",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": [], "name_or_path": "org/verifier"},
        },
        "speculators_model_type": "toyalgo",
        "speculators_version": "1",
        "transformers_version": transformers.__version__,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert nested["model_type"] == "llama" and "transformers_version" not in nested
    # vLLM reads the nested dict without class defaults: it must be complete
    needed = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
        "attention_dropout",
        "tie_word_embeddings",
        "rope_parameters",
    }
    assert needed <= nested.keys()


@pytest.mark.parametrize("how", ["to_dict", "to_diff_dict"])
def test_both_dicts_come_back_as_an_equal_object_of_the_same_class(how):
    config = toy_config(speculators_config=speculators_config(), retired_field={"kept": [1, 2]})
    again = SpeculatorModelConfig.from_dict(getattr(config, how)())
    assert type(again) is ToyAlgoConfig
    assert again == config
    assert isinstance(again.transformer_layer_config, LlamaConfig)
    assert SpeculatorModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unequal_configs_are_unequal():
    assert toy_config(depth=2) != toy_config()
    assert toy_config(retired_field=1) != toy_config(retired_field=2)
    assert toy_config() != decoder_config()


def test_unknown_keys_are_attributes_and_survive_a_save(tmp_path):
    toy_config(retired_field=3).save_pretrained(tmp_path)
    config = SpeculatorModelConfig.from_pretrained(tmp_path)
    assert config.retired_field == 3
    config.retired_field = 4
    assert config.to_dict()["retired_field"] == 4
    assert "retired_field" in list(config)


def test_other_writers_leftovers_are_tolerated_and_not_written_back(tmp_path):
    values = {**toy_config().to_diff_dict(), "auto_map": {"": "config.X"}, "model_type": "speculator_model"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = SpeculatorModelConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"auto_map", "model_type"} & saved.keys()
    assert [file.name for file in (tmp_path / "again").iterdir()] == ["config.json"]


def test_a_config_can_be_read_from_a_directory_a_file_and_a_directory_named_like_the_file(tmp_path):
    folder = tmp_path / "config.json"
    toy_config(depth=2).save_pretrained(folder)
    for path in (folder, str(folder), folder / "config.json"):
        assert SpeculatorModelConfig.from_pretrained(path) == toy_config(depth=2)
    assert ToyAlgoConfig.from_pretrained(folder, convert_to_speculator=True).depth == 2


def test_the_hub_options_reach_the_download_and_the_rest_the_config(monkeypatch):
    seen = {}

    def fake(path, **kwargs):
        seen.update(kwargs, path=path)
        return toy_config().to_dict(), {"depth": 5}

    monkeypatch.setattr(SpeculatorModelConfig, "get_config_dict", fake)
    config = SpeculatorModelConfig.from_pretrained("org/name", token="t", revision="r", local_files_only=True)
    assert config.depth == 5
    assert seen == {
        "path": "org/name",
        "cache_dir": None,
        "force_download": False,
        "local_files_only": True,
        "token": "t",
        "revision": "r",
    }


def test_a_config_of_something_else_is_refused(tmp_path):
    decoder_config().save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="Loading a non-speculator model config is not supported yet"):
        SpeculatorModelConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must contain the 'speculators_model_type' field"):
        SpeculatorModelConfig.from_dict({"depth": 1})
    with pytest.raises(ValidationError, match="no_such_algorithm"):
        SpeculatorModelConfig.from_dict({"speculators_model_type": "no_such_algorithm"})


def test_from_dict_on_any_member_goes_by_the_tag_and_its_keywords_win():
    config = SpeculatorModelConfig.from_dict({"speculators_model_type": "toyalgo", "depth": 1}, depth=3)
    assert type(config) is ToyAlgoConfig and config.depth == 3
    assert type(ToyAlgoConfig.from_dict(config.to_dict())) is ToyAlgoConfig
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SpeculatorModelConfig.from_dict({"speculators_model_type": "toyalgo", "depth": 0})


def test_versions_the_writers_is_kept_and_transformers_is_always_the_installed_one():
    config = toy_config(speculators_version="0.1", transformers_version="4.0")
    assert config.speculators_version == "0.1"
    assert config.transformers_version == transformers.__version__


def test_class_variables_cannot_be_overridden_by_keywords():
    config = toy_config(attribute_map={"depth": "x"}, base_model_tp_plan={"a": "b"}, has_no_defaults_at_init=True)
    assert config.attribute_map == {} and config.depth == 1
    assert not {"attribute_map", "base_model_tp_plan", "has_no_defaults_at_init"} & config.to_dict().keys()


def test_the_root_as_a_constructor_carries_the_members_fields():
    root = SpeculatorModelConfig(speculators_model_type="toyalgo", depth=4)
    assert type(root) is SpeculatorModelConfig
    assert root.depth == 4 and root.draft_vocab_size == 8


def test_configs_copy_and_pickle_and_stay_equal():
    config = toy_config(retired_field=[1], speculators_config=speculators_config())
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(config, PretrainedConfig)


def test_the_nested_config_may_be_a_config_or_a_dict_with_or_without_its_type():
    nested = decoder_config()
    assert toy_config(transformer_layer_config=nested).transformer_layer_config is nested
    assert type(toy_config(transformer_layer_config=nested.to_dict()).transformer_layer_config) is LlamaConfig
    assert type(toy_config(transformer_layer_config={"hidden_size": 32}).transformer_layer_config) is Qwen3Config
    with pytest.raises(ValidationError, match=r"Input should be .* an instance of PreTrainedConfig"):
        toy_config(transformer_layer_config=3)
    with pytest.raises(ValidationError, match="Unrecognized model identifier"):
        toy_config(transformer_layer_config={"model_type": "no_such_type"})


def test_the_attention_implementation_is_never_saved():
    nested = decoder_config()
    nested._attn_implementation = "sdpa"
    assert "sdpa" not in toy_config(transformer_layer_config=nested).to_json_string()


def test_dtypes_are_written_as_names():
    config = toy_config(dtype="bfloat16")
    assert config.to_dict()["dtype"] == "bfloat16"
    assert SpeculatorModelConfig.from_dict(config.to_dict()) == config


def test_the_default_proposal_method_must_be_configured():
    values = speculators_config().model_dump()
    with pytest.raises(
        ValidationError, match="default_proposal_method 'x' must match the proposal_type of one of the "
    ):
        SpeculatorsConfig(**{**values, "default_proposal_method": "x"})
    with pytest.raises(ValidationError, match="must match the proposal_type"):
        SpeculatorsConfig(**{**values, "proposal_methods": []})
    assert SpeculatorsConfig(**values, not_a_field=1) == SpeculatorsConfig(**values)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("speculative_tokens", 0, "greater_than_equal"),
        ("verifier_accept_k", 0, "greater_than_equal"),
        ("accept_tolerance", -0.1, "greater_than_equal"),
        ("proposal_type", "other", "literal_error"),
    ],
)
def test_greedy_proposals_have_bounds(field, value, kind):
    with pytest.raises(ValidationError) as error:
        GreedyTokenProposalConfig(**{field: value})
    assert error.value.errors()[0]["type"] == kind


def test_token_proposals_default_and_resolve_by_type():
    expected = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    assert GreedyTokenProposalConfig().model_dump() == expected
    assert type(TokenProposalConfig.model_validate(expected)) is GreedyTokenProposalConfig
    with pytest.raises(ValidationError, match="proposal_type"):
        TokenProposalConfig()
    with pytest.raises(ValidationError, match="does not match any of the expected tags: 'greedy'"):
        TokenProposalConfig(proposal_type="unheard of")


def test_a_verifier_needs_both_of_its_fields():
    with pytest.raises(ValidationError) as error:
        VerifierConfig()
    assert "name_or_path" in str(error.value) and "architectures" in str(error.value)


def test_the_verifier_record_of_a_config_object():
    config = LlamaConfig(architectures=["LlamaForCausalLM"], name_or_path="org/name")
    assert VerifierConfig.from_config(config) == VerifierConfig(
        name_or_path="org/name", architectures=["LlamaForCausalLM"]
    )
    assert VerifierConfig.from_config(config, name_or_path="other").name_or_path == "other"
    assert VerifierConfig.from_config(config, name_or_path=None).name_or_path is None
    mock = MagicMock(spec=PretrainedConfig)
    mock.name_or_path = None
    mock.to_dict.return_value = {"_name_or_path": "from/dict"}
    assert VerifierConfig.from_config(mock) == VerifierConfig(name_or_path="from/dict", architectures=[])


def test_the_verifier_record_of_a_published_config(verifier):
    folder, _ = verifier
    record = VerifierConfig.from_pretrained(str(folder))
    assert record == VerifierConfig(name_or_path=str(folder), architectures=["LlamaForCausalLM"])


def test_reload_schemas_discovers_and_changes_nothing_else():
    reload_schemas()
    assert "toyalgo" in SpeculatorModelConfig.registry
    assert toy_config() == SpeculatorModelConfig.from_dict(toy_config().to_dict())
