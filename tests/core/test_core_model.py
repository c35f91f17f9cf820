"""The model base: construction, finding classes, loading, saving, and the verifier's weights."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toyalgo import D, H, ToyAlgoConfig, ToyAlgoModel, V, decoder_config, make_verifier, speculators_config, toy_config

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.interfaces import CaptureSpec
from speculators.model import DraftVocabMixin


def loaded_model(mappings, **changes) -> ToyAlgoModel:
    """A model without NaN: every weight is a different random number."""
    torch.manual_seed(1)
    model = ToyAlgoModel(toy_config(**changes))
    model.load_vocab_mappings(*mappings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def with_verifier(folder, **changes) -> ToyAlgoConfig:
    return toy_config(speculators_config=speculators_config(folder), **changes)


# -- construction and lookup ------------------------------------------------------------------------------------------


def test_a_model_needs_a_speculator_config():
    with pytest.raises(ValueError, match="Config must be provided to initialize a SpeculatorModel"):
        SpeculatorModel(None)
    with pytest.raises(TypeError, match="Expected config to be an instance of SpeculatorModelConfig"):
        SpeculatorModel(decoder_config())


def test_the_base_class_can_be_built_and_cannot_run():
    config = toy_config()
    model = SpeculatorModel(config, verifier=None, verifier_attachment_mode=None)
    assert model.config == config and config.tie_word_embeddings is False
    with pytest.raises(NotImplementedError, match="The forward method is only supported on concrete"):
        model(torch.zeros(1))
    with pytest.raises(NotImplementedError):
        SpeculatorModel.from_training_args(decoder_config())
    with pytest.raises(NotImplementedError):
        SpeculatorModel.get_trainer_kwargs()
    with pytest.raises(NotImplementedError, match="can only be trained"):
        model.make_proposer(None, max_batch_size=1, max_length=1)


def test_the_hooks_have_working_defaults():
    model = ToyAlgoModel(toy_config())
    assert model.capture == CaptureSpec(aux_layer_ids=(), last_hidden=True)
    model.target_layer_ids = [1, 2]
    assert model.capture == CaptureSpec(aux_layer_ids=(1, 2), last_hidden=True)
    sample = {"input_ids": torch.arange(3)}
    assert model.align(sample) is sample
    assert model.training_args.model_fields == {} and dict(model.training_defaults) == {}
    assert model.checkpoint_formats == ("speculators",)


def test_get_class_knows_third_parties_and_names_the_available_ones():
    assert SpeculatorModel.get_class("toyalgo") is ToyAlgoModel
    with pytest.raises(ValueError, match=r"Unknown speculator type: 'toyalg'. Available: \[.*'toyalgo'.*Did you mean"):
        SpeculatorModel.get_class("toyalg")


def test_the_model_class_of_a_config_is_the_one_made_for_exactly_its_type():
    assert SpeculatorModel.registered_model_class_from_config(toy_config()) is ToyAlgoModel
    with pytest.raises(TypeError, match="Expected config to be an instance of SpeculatorModelConfig"):
        SpeculatorModel.registered_model_class_from_config(decoder_config())
    with pytest.raises(TypeError, match="Received a SpeculatorModelConfig instance but expected a subclass"):
        SpeculatorModel.registered_model_class_from_config(SpeculatorModelConfig(speculators_model_type="toyalgo"))

    class NobodysConfig(ToyAlgoConfig):
        pass

    with pytest.raises(ValueError, match=r"No registered model class found for config type NobodysConfig.*toyalgo"):
        SpeculatorModel.registered_model_class_from_config(NobodysConfig())


def test_an_empty_registry_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(SpeculatorModel, "registry", {})
    with pytest.raises(ValueError, match="No registered model classes found"):
        SpeculatorModel.registered_model_class_from_config(toy_config())


def test_only_registered_models_with_layers_can_be_trained():
    model = ToyAlgoModel(toy_config())
    assert SpeculatorModel.verify_training_compatible(model) is None
    with pytest.raises(TypeError):
        SpeculatorModel.verify_training_compatible(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="toyalgo"):
        SpeculatorModel.verify_training_compatible(SpeculatorModel(toy_config()))
    del model.layers
    with pytest.raises(AttributeError, match="layers"):
        SpeculatorModel.verify_training_compatible(model)


# -- the draft vocabulary ---------------------------------------------------------------------------------------------


def test_verifier_weights_start_as_nan_and_frozen_and_the_rest_does_not():
    model = ToyAlgoModel(toy_config())
    nan = {name for name, parameter in model.named_parameters() if parameter.isnan().any()}
    assert nan == {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight"}
    assert all(not model.get_parameter(name).requires_grad for name in nan)
    assert all(model.get_parameter(name).isnan().all() for name in nan)
    assert (model.embed_tokens.weight.shape, model.lm_head.weight.shape) == ((V, H), (D, H))
    assert (model.draft_vocab_size, model.verifier_vocab_size, model.hidden_size, model.use_draft_vocab) == (
        D,
        V,
        H,
        True,
    )
    assert model.t2d.dtype == torch.bool and not model.t2d.any() and model.t2d.shape == (V,)
    assert model.d2t.dtype == torch.long and model.d2t.shape == (D,)


def test_a_full_vocabulary_has_no_mapping_and_ignores_one():
    model = ToyAlgoModel(toy_config(draft_vocab_size=V))
    assert model.t2d is None and model.d2t is None and not model.use_draft_vocab
    model.load_vocab_mappings(torch.ones(V, dtype=torch.bool), torch.arange(V))
    assert model.t2d is None and model.d2t is None
    assert not {"t2d", "d2t"} & model.state_dict().keys()


def test_a_draft_vocabulary_larger_than_the_verifiers_is_refused():
    with pytest.raises(ValueError, match="draft_vocab_size=17"):
        ToyAlgoModel(toy_config(draft_vocab_size=V + 1))


@pytest.mark.parametrize(
    ("t2d", "d2t", "message"),
    [
        (torch.ones(V), None, "Both t2d and d2t must be provided together"),
        (None, torch.arange(D), "Both t2d and d2t must be provided together"),
        (torch.ones(V - 1), torch.arange(D), "t2d.shape"),
        (torch.ones(V), torch.arange(D), "non-zero values"),
        (torch.arange(V) < D, torch.arange(D + 1), "d2t.shape"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(t2d, d2t, message):
    with pytest.raises(ValueError, match=message):
        ToyAlgoModel(toy_config()).load_vocab_mappings(t2d, d2t)


def test_no_mapping_changes_nothing_and_offsets_are_not_judged():
    model = ToyAlgoModel(toy_config())
    model.load_vocab_mappings(None, None)
    assert not model.t2d.any()
    model.load_vocab_mappings(torch.arange(V) < D, torch.arange(D))  # ids where offsets belong: callers do this
    assert torch.equal(model.d2t, torch.arange(D))


# -- saving and loading -----------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_whole(mappings, tmp_path):
    model = loaded_model(mappings, depth=2)
    model.save_pretrained(tmp_path)
    again, info = SpeculatorModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is ToyAlgoModel and not again.training
    assert again.config == model.config
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    never_saved = {"verifier_lm_head.weight", "verifier_norm.weight"}
    for key, tensor in model.state_dict().items():
        assert key in never_saved or torch.equal(tensor, again.state_dict()[key]), key
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == {
        "embed_tokens.weight",
        "lm_head.weight",
        "verifier_lm_head.weight",
        "verifier_norm.weight",
    }


def test_the_files_of_a_saved_model(mappings, tmp_path):
    loaded_model(mappings).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(load_file(tmp_path / "model.safetensors")) == [
        "d2t",
        "embed_tokens.weight",
        "layers.0.bias",
        "layers.0.weight",
        "lm_head.weight",
        "norm.weight",
        "t2d",
    ]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["ToyAlgoModel"]
    assert (saved["dtype"], saved["tie_word_embeddings"]) == ("float32", False)
    assert "auto_map" not in saved


def test_what_is_not_saved_may_be_missing():
    for model_class in (ToyAlgoModel, DraftVocabMixin):
        assert set(model_class._keys_to_ignore_on_save) <= set(model_class._keys_to_ignore_on_load_missing)


def test_buffers_and_plain_parameters_keep_the_values_of_the_constructor(mappings, tmp_path):
    @SpeculatorModelConfig.register("buffered")
    class BufferedConfig(ToyAlgoConfig):
        speculators_model_type: str = "buffered"

    @SpeculatorModel.register("buffered")
    class Buffered(ToyAlgoModel):
        config_class = BufferedConfig

        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("frequencies", torch.arange(3.0), persistent=False)
            self.late = nn.Parameter(torch.full((2,), 7.0))

    try:
        ToyAlgoModel(toy_config()).save_pretrained(tmp_path)
        config = BufferedConfig(**{**toy_config().to_dict(), "speculators_model_type": "buffered"})
        model, info = SpeculatorModel.from_pretrained(
            tmp_path, config=config, output_loading_info=True, dtype=torch.bfloat16
        )
    finally:
        del SpeculatorModelConfig.registry["buffered"], SpeculatorModel.registry["buffered"]
    assert type(model) is Buffered
    assert info["missing_keys"] == ["late"]
    assert torch.equal(model.frequencies, torch.arange(3.0)) and model.late.tolist() == [7.0, 7.0]
    assert model.late.dtype == torch.bfloat16


def test_a_model_that_never_calls_post_init_still_loads(mappings, tmp_path):
    class Plain(ToyAlgoModel):
        def post_init(self):
            pass

    model = Plain(toy_config())
    model.save_pretrained(tmp_path)
    assert torch.equal(Plain.from_pretrained(tmp_path).layers[0].weight, model.layers[0].weight)


def test_from_a_config_and_a_state_dict_alone(mappings):
    model = loaded_model(mappings)
    config = toy_config()
    again = SpeculatorModel.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert torch.equal(again.layers[0].weight, model.layers[0].weight)
    assert torch.equal(again.t2d, mappings[0])
    assert again.config == config and again.config is not config


def test_what_from_pretrained_needs():
    with pytest.raises(ValueError, match="Either `config` or `pretrained_model_name_or_path` must be provided"):
        SpeculatorModel.from_pretrained(None)
    with pytest.raises(ValueError, match="Either `pretrained_model_name_or_path` or `state_dict` must be provided"):
        SpeculatorModel.from_pretrained(None, config=toy_config())
    for config in (decoder_config(), "some/path"):
        with pytest.raises(TypeError, match="Expected config to be an instance of SpeculatorModelConfig"):
            SpeculatorModel.from_pretrained(None, config=config)


def test_an_unknown_path_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(OSError, match=f"'{missing}'."):
        SpeculatorModel.from_pretrained(missing, config=toy_config(), local_files_only=True)
    with pytest.raises(OSError, match="nowhere"):
        SpeculatorModel.from_pretrained(missing, local_files_only=True)


def test_another_algorithms_checkpoint_is_refused(tmp_path):
    @SpeculatorModelConfig.register("another")
    class AnotherConfig(SpeculatorModelConfig):
        speculators_model_type: str = "another"

    try:
        AnotherConfig().save_pretrained(tmp_path)
        with pytest.raises(TypeError, match="cannot load a 'another' checkpoint"):
            ToyAlgoModel.from_pretrained(tmp_path)
    finally:
        del SpeculatorModelConfig.registry["another"]


def test_a_damaged_file_and_a_wrong_size_are_named(mappings, tmp_path):
    model = loaded_model(mappings)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit its config.*layers.0.weight"):
        wide = toy_config(transformer_layer_config=decoder_config(hidden_size=2 * H))
        SpeculatorModel.from_pretrained(tmp_path, config=wide)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.safetensors.*damaged"):
        SpeculatorModel.from_pretrained(tmp_path)


def test_sizes_that_do_not_fit_can_be_left_out(mappings, tmp_path):
    loaded_model(mappings).save_pretrained(tmp_path)
    wide = toy_config(transformer_layer_config=decoder_config(hidden_size=2 * H))
    model = SpeculatorModel.from_pretrained(tmp_path, config=wide, ignore_mismatched_sizes=True)
    assert model.layers[0].weight.shape == (2 * H, 2 * H) and torch.equal(model.t2d, mappings[0])


def test_missing_and_unused_tensors_are_said(mappings, caplog):
    state = loaded_model(mappings).state_dict()
    state["stranger"] = state.pop("layers.0.weight")
    with caplog.at_level(logging.WARNING):
        SpeculatorModel.from_pretrained(None, config=toy_config(), state_dict=state)
    assert "layers.0.weight" in caplog.text and "stranger" in caplog.text


def test_the_dtype_is_the_stored_one_unless_asked_otherwise(mappings, tmp_path):
    loaded_model(mappings).to(torch.bfloat16).save_pretrained(tmp_path)
    assert SpeculatorModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    wide = SpeculatorModel.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu")
    assert wide.dtype == torch.float32 and wide.d2t.dtype == torch.long and wide.t2d.dtype == torch.bool
    with pytest.raises(ValueError, match="name one device"):
        SpeculatorModel.from_pretrained(tmp_path, device_map={"layers": "cpu", "norm": "meta"})


def test_sharded_and_bin_checkpoints_load_too(mappings, tmp_path):
    model = loaded_model(mappings)
    model.save_pretrained(tmp_path / "shards", max_shard_size=200)
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for kind in ("shards", "bin"):
        again = SpeculatorModel.from_pretrained(tmp_path / kind)
        assert torch.equal(again.layers[0].weight, model.layers[0].weight), kind


# -- the verifier's weights -------------------------------------------------------------------------------------------


def test_a_new_model_takes_the_verifiers_weights_and_the_kept_rows_of_its_head(verifier, mappings):
    folder, weights = verifier
    model = ToyAlgoModel(with_verifier(folder))
    model.load_vocab_mappings(*mappings)
    model.load_verifier_weights()
    kept = torch.tensor([0, 2, 4, 6, 8, 10, 12, 14])
    assert torch.equal(model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"][kept])
    assert torch.equal(model.verifier_lm_head.weight, weights["lm_head.weight"][kept])
    assert torch.equal(model.verifier_norm.weight, weights["model.norm.weight"])
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.split(".")[0] not in ("layers", "norm"))


def test_a_tied_head_is_the_embedding(tmp_path, mappings, caplog):
    folder, weights = make_verifier(tmp_path / "tied", tied=True)
    model = ToyAlgoModel(with_verifier(folder, draft_vocab_size=V))
    model.load_verifier_weights()
    assert torch.equal(model.verifier_lm_head.weight, weights["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


def test_the_gain_of_a_one_plus_w_norm_is_stored_as_the_gain(tmp_path, mappings):
    folder, weights = make_verifier(tmp_path / "gemma", model_type="gemma2")
    model = ToyAlgoModel(with_verifier(folder, draft_vocab_size=V))
    model.load_verifier_weights()
    assert torch.equal(model.verifier_norm.weight, 1.0 + weights["model.norm.weight"])


def test_without_a_verifier_loading_its_weights_does_nothing(mappings):
    for config in (toy_config(), with_verifier(None)):
        model = ToyAlgoModel(config)
        model.load_verifier_weights()
        assert model.lm_head.weight.isnan().all()


def test_a_draft_vocabulary_must_be_set_first(verifier):
    model = ToyAlgoModel(with_verifier(verifier[0]))
    with pytest.raises(ValueError, match=r"t2d tensor hasn't been set.*load_vocab_mappings"):
        model.load_verifier_weights()


def test_a_verifier_of_another_size_is_refused(tmp_path, mappings):
    folder, _ = make_verifier(tmp_path / "wide", hidden_size=2 * H)
    model = ToyAlgoModel(with_verifier(folder))
    model.load_vocab_mappings(*mappings)
    with pytest.raises(ValueError, match=r"embedding of verifier .* is \(16, 8\); .* \(16, 4\)"):
        model.load_verifier_weights()


def test_the_checkpoints_weights_win_over_the_verifiers_and_those_over_random_ones(verifier, mappings, tmp_path):
    folder, weights = verifier
    model = loaded_model(mappings, speculators_config=speculators_config(folder))
    model.save_pretrained(tmp_path / "full")
    full = SpeculatorModel.from_pretrained(tmp_path / "full")
    assert torch.equal(full.embed_tokens.weight, model.embed_tokens.weight)
    assert torch.equal(full.lm_head.weight, model.lm_head.weight)
    assert torch.equal(full.verifier_lm_head.weight, weights["lm_head.weight"][mappings[0]])
    assert torch.equal(full.verifier_norm.weight, weights["model.norm.weight"])

    state = load_file(tmp_path / "full" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "partial")
    save_file(
        {k: v for k, v in state.items() if k not in ("embed_tokens.weight", "lm_head.weight")},
        tmp_path / "partial" / "model.safetensors",
    )
    partial = SpeculatorModel.from_pretrained(tmp_path / "partial")
    assert torch.equal(partial.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert torch.equal(partial.lm_head.weight, weights["lm_head.weight"][mappings[0]])
    assert torch.equal(partial.layers[0].weight, model.layers[0].weight)


def test_mappings_may_be_given_while_loading_and_are_saved_with_the_model(verifier, mappings, tmp_path):
    folder, weights = verifier
    config = with_verifier(folder)
    layers = {"layers.0.weight": torch.ones(H, H), "layers.0.bias": torch.zeros(H), "norm.weight": torch.ones(H)}
    t2d, d2t = mappings
    model = SpeculatorModel.from_pretrained(None, config=config, state_dict=layers, t2d=t2d, d2t=d2t)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"][t2d])
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert torch.equal(again.t2d, t2d) and torch.equal(again.d2t, d2t)


def test_a_verifier_that_moved_can_be_pointed_at(verifier, mappings, tmp_path):
    loaded_model(mappings, speculators_config=speculators_config(tmp_path / "gone")).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="no verifier at "):
        SpeculatorModel.from_pretrained(tmp_path / "m", local_files_only=True)
    model = SpeculatorModel.from_pretrained(tmp_path / "m", verifier=verifier[0])
    assert torch.equal(model.verifier_norm.weight, verifier[1]["model.norm.weight"])


def test_from_training_args_takes_the_mapping_by_position_or_name(mappings):
    t2d, d2t = mappings
    for model in (
        ToyAlgoModel.from_training_args(decoder_config(), t2d, d2t, draft_vocab_size=D),
        ToyAlgoModel.from_training_args(decoder_config(), t2d=t2d, d2t=d2t, draft_vocab_size=D),
    ):
        assert torch.equal(model.t2d, t2d)
