"""A default is written once and holds by every door: command line, YAML, Python, `from_training_args`,
`get_trainer_kwargs` and `forward`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import speculators
from speculators import SpeculatorModel
from speculators.train.config import TrainConfig
from speculators.train.keys import GROUPS
from speculators.train.records import TrainerConfig
from speculators.training_keys import AnchorKeys, DraftKeys, LossKeys, TrainingArgs, VerifierKeys

MODELS = Path(speculators.__file__).parent / "models"
ALGORITHMS = sorted(file.parent.name for file in MODELS.glob("*/core.py"))
THE_CONTRACTS = {
    "dflash": {"block_size": 8, "per_position_loss_weight": "fixed-exp-decay"},
    "dspark": {"max_anchors": 3072},
    "peagle": {"max_anchors": None},
}
"""Where the contract names another default for calls in Python than for the command line. There are no others."""
NEEDED = {"mask_token_id": 39, "target_layer_ids": [1, 2, 3]}
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 4}


@pytest.fixture(scope="module")
def verifier_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("verifier")
    config = LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=6, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def resolved(name, verifier="some/model"):
    argv = ["--speculator-type", name, "--verifier-name-or-path", str(verifier)]
    return TrainConfig.resolve(argv).flatten()


def build(name, verifier_path, **keys):
    cls = SpeculatorModel.get_class(name)
    layers = AutoConfig.for_model(cls.training_defaults.get("draft_arch", "qwen3"), **SIZES, num_key_value_heads=2)
    layers.num_hidden_layers = len(layers.layer_types or [0]) if name == "mtp" else 1
    if getattr(layers, "layer_types", None):
        layers.layer_types = layers.layer_types[: layers.num_hidden_layers]
    torch.manual_seed(0)
    return cls.from_training_args(layers, **{**keys, **NEEDED, "verifier_name_or_path": str(verifier_path)})


# -- by every door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_flags_yaml_and_python_have_the_defaults_that_the_fields_have(name, tmp_path):
    cls = SpeculatorModel.get_class(name)
    flat = resolved(name)
    for key, field in cls.training_args.model_fields.items():
        if field.default is None and key == "norm_before_fc":
            assert flat[key] is (not flat["fc_norm"])  # shown as it will be
        else:
            assert flat[key] == field.default, key
    for key, value in cls.training_defaults.items():
        assert flat[key] == value, key
    (tmp_path / "run.yaml").write_text(f"speculator_type: {name}\nverifier_name_or_path: some/model\n")
    assert TrainConfig.from_sources(config_path=tmp_path / "run.yaml").flatten() == flat
    assert TrainConfig.from_flat({"speculator_type": name, "verifier_name_or_path": "some/model"}).flatten() == flat
    assert TrainConfig.from_flat(flat).flatten() == flat


@pytest.mark.parametrize("name", ALGORITHMS)
def test_from_training_args_called_by_hand_builds_what_train_builds(name, verifier_path):
    exceptions = THE_CONTRACTS.get(name, {})
    assert dict(SpeculatorModel.get_class(name).called_by_hand) == exceptions
    by_hand = build(name, verifier_path)
    trained = build(name, verifier_path, **{**resolved(name, verifier_path), **exceptions})
    assert by_hand.config == trained.config
    nested = "transformer_layer_config"
    if hasattr(by_hand.config, nested):
        attention = [getattr(model.config, nested)._attn_implementation for model in (by_hand, trained)]
        assert attention[0] == attention[1] == "simple_flex_attention"
    states = [model.state_dict() for model in (by_hand, trained)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_get_trainer_kwargs_and_forward_called_by_hand_say_what_train_says(name, verifier_path):
    cls, exceptions = SpeculatorModel.get_class(name), THE_CONTRACTS.get(name, {})
    flat = resolved(name, verifier_path)
    required = {"mtp": {"num_speculative_steps": 3}, "eagle": {"lr": 1.0}}.get(name, {})  # by the contract
    trained, _ = cls.get_trainer_kwargs(**{**flat, **exceptions})
    assert cls.get_trainer_kwargs(**required)[0] == trained

    model = build(name, verifier_path).train()
    silent, told = model.loss_args({}), model.loss_args(trained)
    if name in ("dflash", "dspark"):  # the contract's 512 of a forward that nobody told, the generic key's default
        assert silent.max_anchors == AnchorKeys.model_fields["max_anchors"].default == 512
    silent, told = (dataclasses.replace(args, max_anchors=None) for args in (silent, told))
    assert silent == told


def test_none_stands_for_not_given():
    flat = resolved("dflash")
    optional = ("max_steps", "run_name", "draft_vocab_size", "epochs", "block_size", "dpace_alpha")
    given = {**dict.fromkeys(optional), "speculator_type": "dflash", "verifier_name_or_path": "some/model"}
    assert TrainConfig.from_flat(given).flatten() == flat
    assert TrainConfig.from_flat({**given, "epochs": 3}).flatten() == {**flat, "epochs": 3}


# -- written once ------------------------------------------------------------------------------------------------------


def key_names(name):
    """Every training key that the algorithm reads, and the names that `forward` has for them."""
    cls = SpeculatorModel.get_class(name)
    generic = {key for keys in (DraftKeys, AnchorKeys, LossKeys) for key in keys.model_fields}
    own = set(cls.training_args.model_fields)
    return own | generic | set((cls.forward_keys or {}).values()) | {"trust_remote_code"}


def second_defaults(source, names):
    """Parameters and class attributes called like a training key that have a default of their own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            parameters = [*node.args.posonlyargs, *node.args.args]
            defaults = [None] * (len(parameters) - len(node.args.defaults)) + node.args.defaults
            pairs = [
                *zip(parameters, defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            found += [(node.lineno, parameter.arg, default) for parameter, default in pairs]
        elif isinstance(node, ast.ClassDef):
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            found += [(line.lineno, line.target.id, line.value) for line in fields]
    return [(line, name, ast.unparse(value)) for line, name, value in found if name in names and is_second(value)]


def is_second(value):
    return value is not None and ast.unparse(value) != "None" and not ast.unparse(value).startswith("default_of(")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_function_of_an_algorithm_has_a_default_for_a_training_key(name):
    files = [file for file in MODELS.glob(f"{name}/*.py") if file.name not in ("config.py", "keys.py")]
    shared = [*MODELS.glob("*.py"), MODELS.parent / "model_training.py"]
    wrong = {}
    for file in files + shared:
        found = second_defaults(file.read_text(), key_names(name))
        if found:
            wrong[file.name] = found
    assert not wrong


def test_a_second_default_is_seen():
    """How defaults drifted: `config_values(norm_output=False)` beside a training key that is on."""
    names = key_names("eagle3") | key_names("dflash")
    assert second_defaults("def config_values(cls, *, norm_output: bool = False, other=1): ...", names)
    assert second_defaults("def forward(self, gamma=GAMMA): ...", names)
    assert second_defaults("class Objective:\n    gamma: float = 4.0", names)
    assert not second_defaults("def forward(self, ttt_steps, generator=None, max_anchors=None): ...", names)


def default_in_source(config_class, key):
    """As its file has it: the expression after `default=`, or of a plain assignment."""
    file = Path(inspect.getsourcefile(config_class))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == config_class.__name__:
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and line.target.id == key:
                    value = line.value
                    if isinstance(value, ast.Call):
                        named = [word.value for word in value.keywords if word.arg == "default"]
                        value = (named or value.args or [None])[0]
                    return None if value is None else ast.unparse(value)
    return None


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_config_field_that_equals_a_training_key_takes_its_default_from_there(name):
    cls = SpeculatorModel.get_class(name)
    for key, field in cls.config_class.model_fields.items():
        for keys in (cls.training_args, DraftKeys, AnchorKeys):
            same = key in keys.model_fields and keys.model_fields[key].default == field.default is not None
            source = default_in_source(cls.config_class, key)
            if same and source is not None:
                assert source.startswith("default_of(") or source in ("AUTO", "None"), key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_repeats_no_default_that_it_would_inherit(name):
    cls = SpeculatorModel.get_class(name)
    for key, value in cls.training_defaults.items():
        assert value != next(keys.model_fields[key].default for keys in generic_keys() if key in keys.model_fields), key
    for parent in cls.training_args.__mro__[1:]:
        if isinstance(parent, type) and issubclass(parent, BaseModel) and parent not in (BaseModel, TrainingArgs):
            for key in cls.training_args.__annotations__.keys() & parent.model_fields.keys():
                own, inherited = cls.training_args.model_fields[key].default, parent.model_fields[key].default
                assert own != inherited or own is PydanticUndefined, key


def generic_keys():
    return [*GROUPS.values(), VerifierKeys, DraftKeys, AnchorKeys, LossKeys]


def test_the_trainers_defaults_are_the_keys_own_but_for_the_contracts():
    values = {field.name: field.default for field in dataclasses.fields(TrainerConfig)}
    keys = {key: field.default for group in GROUPS.values() for key, field in group.model_fields.items()}
    differ = {name for name in values.keys() & keys.keys() if values[name] != keys[name]}
    # required here; True, muon, None (--lr) and a name instead of a dtype on the command line
    assert differ == {"lr", "save_path", "resume_from_checkpoint", "optimizer", "muon_lr", "hidden_states_dtype"}
