"""Where values come from: the precedence table, unknown keys, conflicts, round trips."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from speculators.model import SpeculatorModel
from speculators.train.config import ConfigError, TrainConfig

REQUIRED = ["--speculator-type", "toy_algo", "--verifier-name-or-path", "some/model"]


class ToyArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    toy_depth: int = 3
    toy_gate: bool = True


class OtherArgs(BaseModel):
    other_size: int = 5


class ToyAlgo(SpeculatorModel):
    training_args = ToyArgs
    training_defaults: ClassVar[dict[str, Any]] = {"num_layers": 4, "draft_arch": "llama"}


class OtherAlgo(SpeculatorModel):
    training_args = OtherArgs


class PlainAlgo(SpeculatorModel):
    """Declares nothing: written to receive every flag."""


@pytest.fixture(autouse=True)
def toy_algorithms(monkeypatch):
    toys = {"toy_algo": ToyAlgo, "other_algo": OtherAlgo, "plain_algo": PlainAlgo}
    SpeculatorModel.registered_classes()  # built-ins imported under the patch would register into it and vanish with it
    monkeypatch.setattr(SpeculatorModel, "registry", {**(SpeculatorModel.registry or {}), **toys})


def resolve(*argv: str) -> TrainConfig:
    return TrainConfig.resolve([*REQUIRED, *argv])


@pytest.mark.parametrize(
    ("flag", "yaml", "expected", "source"),
    [
        (None, None, 4, "algorithm"),
        (None, "num_layers: 2", 2, "yaml"),
        (["--num-layers", "7"], None, 7, "flag"),
        (["--num-layers", "7"], "num_layers: 2", 7, "flag"),
        (["--num-layers", "7"], "train:\n  draft:\n    num-layers: 2", 7, "flag"),
        (None, "train:\n  draft:\n    num_layers: 2", 2, "yaml"),
    ],
)
def test_flag_beats_yaml_beats_algorithm_beats_default(tmp_path, flag, yaml, expected, source):
    argv = list(flag or [])
    if yaml:
        (tmp_path / "run.yaml").write_text(yaml)
        argv += ["--config", str(tmp_path / "run.yaml")]
    config = resolve(*argv)
    assert config.draft.num_layers == config.flatten()["num_layers"] == expected
    assert config.provenance["num_layers"] == source
    assert (config.optimizer.lr, config.provenance["lr"]) == (1e-3, "default")


def test_contract_defaults():
    flat = resolve().flatten()
    assert flat["data_path"] == "./output" and flat["save_path"] == "./output/checkpoints"
    assert (flat["total_seq_len"], flat["train_data_ratio"], flat["epochs"], flat["seed"]) == (8192, 0.9, 20, 42)
    assert (flat["optimizer"], flat["weight_decay"], flat["muon_lr"]) == ("muon", 0.01, flat["lr"])
    assert (flat["sliding_window"], flat["full_attention_indices"]) == (2048, None)
    assert flat["draft_attn_impl"] == "simple_flex_attention"
    assert flat["resume_from_checkpoint"] and not flat["save_best"]


def test_keys_of_the_algorithm_are_flags_and_yaml_keys_too(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "toy_algo: {toy_depth: 5}\nloss: {loss_fn: {ce: 0.1, tv: 0.9}}\noptimizer: adamw"
    )
    config = resolve(
        "--config", str(tmp_path / "run.yaml"), "--no-toy-gate", "--lr", "0.5", "--target-layer-ids", "1", "2"
    )
    flat = config.flatten()
    assert (flat["toy_depth"], flat["toy_gate"], flat["lr"], flat["muon_lr"]) == (5, False, 0.5, 0.5)
    assert flat["loss_fn"] == {"ce": 0.1, "tv": 0.9} and flat["optimizer"] == "adamw"
    assert flat["target_layer_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], r"unknown flag --epoch\. Did you mean '--epochs'\?"),
        (["--on-generate", "cache"], "--on-generate is no flag any more: .*--cache-hidden-states keeps them"),
        (["--max-consecutive-generation-failures=3"], "no flag any more: no row is skipped"),
        (["--no-draft-mrope-full-head-hack"], "no flag any more"),
        (["--lr", "fast"], r"--lr: must be a valid number, not 'fast'"),
        (["--lr", "-1"], r"--lr: .*greater than 0"),
        (["--hidden-states-dtype", "float16"], r"--hidden-states-dtype: .*'bfloat16' or 'float32'"),
        (["--train-data-ratio", "1.5"], r"--train-data-ratio: .*less than or equal to 1"),
        (["--max-steps", "0"], "--max-steps"),
        (["--checkpoint-freq", "1.5"], r"checkpoint_freq=1\.5.*integer"),
        (["--toy-depth", "deep"], "--toy-depth"),
        (["--d2t-path", "x.npy"], "give both, or neither"),
        (["--from-pretrained", "a", "--draft-config", "b"], "leave out --draft-config"),
        (["--from-pretrained", "a", "--num-layers", "4"], "leave out --num-layers"),
        (["--draft-config", "a", "--sliding-window", "2048"], "leave out --sliding-window"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "/nowhere.yaml"], "cannot read --config /nowhere.yaml"),
        (["--speculator-type", "toy_algos"], "toy_algos"),
        (["--plugins", "no_such_module"], "cannot import 'no_such_module'"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(argv, message):
    with pytest.raises(ConfigError, match=message) as raised:
        resolve(*argv)
    assert raised.value.exit_code == 2
    assert isinstance(raised.value, ValueError)


def test_the_verifier_is_required():
    with pytest.raises(ConfigError, match=r"^--verifier is required \(in earlier releases --verifier-name-or-path\)"):
        TrainConfig.resolve(["--speculator-type", "toy_algo"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"unknown key 'epoch'\. Did you mean 'epochs'\?"),
        ("optimizer: {learning_rate: 3}", "unknown key 'learning_rate'"),
        ("optimiser: {lr: 3}", r"unknown heading 'optimiser'\. Did you mean 'optimizer'\?"),
        ("lr: 1\noptimizer: {lr: 2}", "gives lr twice"),
        ("- a", "must hold `key: value` lines"),
        ("a: [", "is not YAML"),
        ("from_pretrained: x", "leave out --num-layers"),
    ],
)
def test_a_wrong_yaml_file_is_an_error(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    extra = ["--num-layers", "1"] if "from_pretrained" in text else []
    with pytest.raises(ConfigError, match=message):
        resolve("--config", str(tmp_path / "run.yaml"), *extra)


def test_a_key_of_another_algorithm_warns_and_is_passed_on():
    with pytest.warns(UserWarning, match="other_size"):
        config = resolve("--other-size", "9")
    assert config.flatten()["other_size"] == 9


def test_an_algorithm_that_declares_no_keys_receives_all_of_them():
    config = TrainConfig.resolve(
        ["--speculator-type", "plain_algo", "--verifier-name-or-path", "m", "--other-size", "9"]
    )
    flat = config.flatten()
    assert (flat["other_size"], flat["toy_depth"]) == (9, 3)
    assert "toy_depth" not in config.dump_yaml()


def test_a_dump_resolves_to_the_same_configuration(tmp_path):
    config = resolve("--lr", "0.5", "--toy-depth", "8", "--target-layer-ids", "3", "--loss-fn", '{"ce": 1.0}')
    config.save(tmp_path / "run.yaml")
    again = TrainConfig.from_sources(config_path=tmp_path / "run.yaml")
    assert again.flatten() == config.flatten()
    fine_tuned = resolve("--from-pretrained", "x")
    fine_tuned.save(tmp_path / "run.yaml")
    assert TrainConfig.from_sources(config_path=tmp_path / "run.yaml").flatten() == fine_tuned.flatten()
    assert TrainConfig.from_flat(config.flatten()).flatten() == config.flatten()


def test_dump_config_prints_yaml_and_ends(capsys):
    with pytest.raises(SystemExit) as ended:
        resolve("--dump-config", "--epochs", "3")
    assert ended.value.code == 0
    assert "epochs: 3" in capsys.readouterr().out


def test_help_names_the_keys_of_the_algorithm(capsys):
    with pytest.raises(SystemExit):
        resolve("--help")
    text = capsys.readouterr().out
    assert "--toy-depth" in text and "--total-seq-len" in text and "--other-size" not in text


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from speculators.train.config import TrainConfig\n"
        "try: TrainConfig.resolve(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False False"


@pytest.fixture
def broken_algorithm(tmp_path, monkeypatch):
    """An installed distribution whose algorithm cannot be imported."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[speculators.models]\nbroken = no_module_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken" in SpeculatorModel.available_names()


def test_an_algorithm_that_cannot_be_imported_does_not_stop_another(broken_algorithm):
    assert resolve("--toy-depth", "5").flatten()["toy_depth"] == 5
    with pytest.warns(UserWarning, match="other_size"):
        assert resolve("--other-size", "9").flatten()["other_size"] == 9


def test_whose_keys_are_unknown_is_said_where_it_matters(broken_algorithm):
    reason = r"those of 'broken' \(ModuleNotFoundError: .*no_module_of_this_name"
    with pytest.raises(ConfigError, match=f"unknown flag --toy-dept.*'--toy-depth'.*{reason}"):
        resolve("--toy-dept", "5")
    with pytest.raises(ConfigError, match=f"unknown key 'toy_dept'.*{reason}"):
        TrainConfig.from_flat({"speculator_type": "toy_algo", "verifier_name_or_path": "m", "toy_dept": 5})
    with pytest.warns(UserWarning, match=reason):
        TrainConfig.resolve(["--speculator-type", "plain_algo", "--verifier-name-or-path", "m"])
    with pytest.raises(ModuleNotFoundError, match="no_module_of_this_name"):
        TrainConfig.resolve(["--speculator-type", "broken", "--verifier-name-or-path", "m"])


@pytest.mark.parametrize(
    ("algorithm", "flag", "value"),
    [("medusa", "--draft-arch", "qwen3"), ("mlp", "--num-layers", "2"), ("mtp", "--sliding-window", "64")],
)
def test_keys_that_shape_layers_are_refused_where_there_are_none(algorithm, flag, value):
    with pytest.raises(ValueError, match=rf"^{flag} {value}: .*; leave this key out$"):
        TrainConfig.resolve(["--speculator-type", algorithm, "--verifier-name-or-path", "some/model", flag, value])
