"""Several drafters on one pass over the verifier: equal to runs of their own, bit for bit, however they are cut."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import speculators as sp
from speculators.data_generation import LocalSource, ServerUnavailableError
from speculators.train import run as train_run
from speculators.train.config import ConfigError, TrainConfig
from speculators.train.drafters import resolve_all
from speculators.train.events import PACE, Saved, StepDone, ignore
from speculators.train.graceful_shutdown import TrainingInterrupted
from speculators.train.run import train, train_side_by_side

OWN = {
    "eagle3": {"target-layer-ids": "1 3 5", "lr": "0.01"},
    "dflash": {"target-layer-ids": "2 3", "lr": "0.003", "num-layers": "2", "block-size": "4", "max-anchors": "16"},
}
ALL = {
    "total-seq-len": "128",
    "hidden-states-dtype": "float32",
    "hidden-states-memory-gb": "0",
    "train-data-ratio": "0.8",
    "epochs": "2",
    "checkpoint-freq": "0.5",
    "draft-attn-impl": "eager",
}


def words(keys: dict[str, str], prefix: str = "") -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{prefix}{key}", *value.split())]


def flags(verifier: Path, data: Path) -> list[str]:
    given = ["--verifier", str(verifier), "--data", str(data), "--no-parity-gate", "--no-contract-check"]
    return [*given, *words(ALL)]


@pytest.fixture
def common(verifier_path, data_path) -> list[str]:
    return flags(verifier_path, data_path)


def alone(common, output: Path, more: dict[str, dict[str, str]] | None = None) -> Path:
    for name, keys in OWN.items():
        own = words({**keys, **(more or {}).get(name, {})})
        train(TrainConfig.resolve([*common, "--speculator-type", name, *own, "--output", str(output / name)]))
    return output


def together(common, output: Path, *more: str, listen=lambda name: ignore):
    own = [word for name, keys in OWN.items() for word in words(keys, f"{name}.")]
    argv = [*common, "--speculator-type", "eagle3,dflash", *own, "--output", str(output), *more]
    return train_side_by_side(resolve_all(argv), listen=listen)


def assert_same(ours: Path, theirs: Path) -> None:
    for name in OWN:
        saved = [{path.name for path in (root / name).iterdir() if path.is_dir()} for root in (ours, theirs)]
        assert saved[0] - {"interrupted"} == saved[1]
        for folder in saved[1]:
            mine, other = (load_file(root / name / folder / "master_weights.fp32") for root in (ours, theirs))
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in mine), (name, folder)
            metrics = [(root / name / folder / "val_metrics.json").read_text() for root in (ours, theirs)]
            assert metrics[0] == metrics[1]
        recipes = [json.loads((root / name / "recipe.json").read_text()) for root in (ours, theirs)]
        assert recipes[0] == recipes[1]
        assert curve(ours / name) == curve(theirs / name)


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in PACE} for line in lines]


@pytest.fixture(scope="module")
def separate(tmp_path_factory, verifier_path, data_path) -> Path:
    """Runs of their own."""
    return alone(flags(verifier_path, data_path), tmp_path_factory.mktemp("alone"))


def counted(monkeypatch) -> Counter[tuple[int, ...]]:
    """How often the verifier computes each row."""
    forwards: Counter[tuple[int, ...]] = Counter()

    class Counted(LocalSource):
        def read(self, token_ids):
            forwards.update(tuple(ids.tolist()) for ids in token_ids)
            return super().read(token_ids)

    monkeypatch.setattr(train_run, "LocalSource", Counted)
    return forwards


def test_drafters_side_by_side_equal_runs_of_their_own_and_share_each_forward(common, separate, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        of_two = counted(patch)
        results = together(common, tmp_path)
    assert [result.checkpoint.parent for result in results] == [tmp_path / name for name in OWN]
    assert_same(tmp_path, separate)
    of_one = counted(monkeypatch)
    train(TrainConfig.resolve([*common, "--speculator-type", "eagle3", "--output", str(tmp_path / "one")]))
    assert of_two == of_one


def test_python_trains_a_list_of_drafters_as_the_commands_do_each_with_steps_of_its_own(
    common, tmp_path, verifier_path, data_path
):
    more = {"eagle3": {"max-steps": "3", "gradient-accumulation-steps": "2"}, "dflash": {"epochs": "1"}}
    heard = Counter()
    results = sp.train_drafter(
        list(OWN),
        verifier=verifier_path,
        data=data_path,
        output=tmp_path / "together",
        on_event=lambda event, name: heard.update([name] if isinstance(event, StepDone) else []),
        parity_gate=False,
        contract_check=False,
        **keywords(ALL),
        **{name: keywords(keys | more[name]) for name, keys in OWN.items()},
    )
    assert {name: result.checkpoint.parent for name, result in results.items()} == {
        name: tmp_path / "together" / name for name in OWN
    }
    assert heard == {name: result.num_steps for name, result in results.items()} and heard["eagle3"] == 3
    assert_same(tmp_path / "together", alone(common, tmp_path / "alone", more))


def keywords(keys: dict[str, str]) -> dict[str, Any]:
    """Flags as Python gives them."""
    values = {key.replace("-", "_"): [yaml.safe_load(word) for word in value.split()] for key, value in keys.items()}
    return {key: value if key == "target_layer_ids" else value[0] for key, value in values.items()}


def test_python_names_several_drafters_in_a_list_and_what_they_cannot_read():
    def of(algorithm, **settings):
        return sp.train_drafter(algorithm, verifier="m", data="d", output="o", **settings)

    with pytest.raises(ConfigError, match=r"name several drafters as a list, \['eagle3', 'dflash'\]"):
        of("eagle3,dflash")
    with pytest.raises(ConfigError, match="speculator_type is the first argument here"):
        of("eagle3", speculator_type="dflash")
    with pytest.raises(ConfigError, match=r"unknown flag --epoch\. Did you mean '--epochs'"):
        of(["eagle3", "dflash"], epoch=2)
    with pytest.raises(ConfigError, match=r"dflash: unknown flag --epoch\."):
        of(["eagle3", "dflash"], dflash={"epoch": 2})
    with pytest.raises(ValueError, match=r"estimate=True trains nothing: call speculators\.train\.run\.estimate"):
        of("eagle3", estimate=True)


class Killed(BaseException):
    """Ends a process as `kill -9` does: nothing is caught, nothing saved."""


def cut(common, output: Path, name: str, kind: type, number: int, how) -> None:
    """Runs until the drafter tells its event of this kind and number; then `how` happens, once."""
    left = [number]

    def listen(drafter):
        def on_event(event):
            if drafter == name and isinstance(event, kind):
                left[0] -= 1
                if left[0] == 0:
                    how()

        return on_event

    together(common, output, listen=listen)


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(("name", "kind", "number"), [("eagle3", Saved, 2), ("dflash", StepDone, 4)])
def test_a_killed_run_is_continued_to_the_same_end(common, separate, tmp_path, name, kind, number):
    """The first one is cut where one drafter has saved and the other has not: that one catches up."""
    with pytest.raises(Killed):
        cut(common, tmp_path, name, kind, number, lambda: raise_(Killed()))
    together(common, tmp_path)
    assert_same(tmp_path, separate)


def test_a_signal_lets_every_drafter_save_and_the_run_is_continued_to_the_same_end(common, separate, tmp_path):
    with pytest.raises(TrainingInterrupted):
        cut(common, tmp_path, "dflash", StepDone, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert all((tmp_path / name / "interrupted" / "master_weights.fp32").exists() for name in OWN)
    together(common, tmp_path)
    assert_same(tmp_path, separate)


def test_states_that_stop_coming_cost_no_step_of_any_drafter(common, separate, tmp_path, monkeypatch):
    class Failing(LocalSource):
        num_reads = 0

        def read(self, token_ids):
            Failing.num_reads += 1
            if Failing.num_reads == 2:
                raise ServerUnavailableError("no answer")
            return super().read(token_ids)

    with monkeypatch.context() as patch:
        patch.setattr(train_run, "LocalSource", Failing)
        with pytest.raises(ServerUnavailableError, match=r"no answer\. Saved .*eagle3/interrupted: the same command"):
            together(common, tmp_path)
    steps = [json.loads((tmp_path / name / "interrupted" / "training_state.json").read_text()) for name in OWN]
    assert steps[0] == steps[1]
    assert Failing.num_reads == 2  # the other one asked for nothing
    together(common, tmp_path)
    assert_same(tmp_path, separate)


def test_one_that_fails_lets_the_others_save(common, tmp_path):
    with pytest.raises(ValueError, match="the loss is lost"):
        cut(common, tmp_path, "eagle3", StepDone, 3, lambda: raise_(ValueError("the loss is lost")))
    assert not (tmp_path / "eagle3" / "interrupted").exists()
    assert json.loads((tmp_path / "dflash" / "interrupted" / "training_state.json").read_text())["global_step"] == 3


# -- which drafter a flag is for ---------------------------------------------------------------------------------------


def resolved(*argv: str) -> dict[str, TrainConfig]:
    given = ["--verifier", "m", "--speculator-type", "eagle3,dflash,mlp", *argv]
    return {config.speculator_type: config for config in resolve_all(given)}


def test_a_flag_is_for_all_that_read_it_or_for_the_one_it_names():
    configs = resolved("--lr", "0.1", "--num-layers", "3", "--dflash.lr", "0.2", "--output", "out")
    assert [config.optimizer.lr for config in configs.values()] == [0.1, 0.2, 0.1]
    assert [configs[name].draft.num_layers for name in ("eagle3", "dflash")] == [3, 3]
    assert configs["mlp"].idle == {"num_layers": "'mlp' has no use for it"}
    assert [config.trainer.save_path for config in configs.values()] == ["out/eagle3", "out/dflash", "out/mlp"]


def test_yaml_has_the_keys_of_one_drafter_under_its_name_and_a_flag_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "verifier: m\nspeculator_type: [eagle3, dflash]\nlr: 0.1\nepochs: 3\ndflash: {lr: 0.2, num-layers: 4}\n"
    )
    configs = resolve_all(["--config", str(file), "--epochs", "5"])
    assert [config.speculator_type for config in configs] == ["eagle3", "dflash"]
    assert [config.optimizer.lr for config in configs] == [0.1, 0.2]
    assert [config.trainer.epochs for config in configs] == [5, 5]
    assert configs[1].draft.num_layers == 4
    assert [config.provenance["lr"] for config in configs] == ["yaml", "yaml"]


def test_the_dumped_yaml_resolves_to_the_same_drafters(tmp_path, capsys):
    argv = ["--verifier", "m", "--speculator-type", "eagle3,dflash", "--lr", "0.1", "--dflash.num-layers", "2"]
    with pytest.raises(SystemExit):
        resolve_all([*argv, "--output", "there", "--dump-config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    again, configs = resolve_all(["--config", str(tmp_path / "run.yaml")]), resolve_all([*argv, "--output", "there"])
    assert [config.flatten() for config in again] == [config.flatten() for config in configs]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--n-predict 2 --speculator-type eagle3,dflash", "'eagle3' has no use for it.*leave out --n-predict"),
        ("--eagle3.block-size 2", "eagle3: 'eagle3' has no use for it: leave out --block-size"),
        ("--dflash.seed 1", "--dflash.seed: the drafters of a run share .* give --seed without a prefix"),
        ("--dflash.total-seq-len 99", "give --total-seq-len without a prefix"),
        ("--medusa.lr 1", "this run trains eagle3, dflash, mlp, not 'medusa'"),
        ("--dflash.lrr 1", "dflash: unknown flag --lrr.*--lr"),
        ("--dflash.lr -1", "dflash: --lr"),
        ("--speculator-type eagle3,eagle3", "name each drafter once"),
        ("--speculator-type eagle3,dflsh", "dflsh"),
        ("--lrr 1", "unknown flag --lrr"),
    ],
)
def test_what_fits_no_drafter_is_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        resolved(*argv.split())


def test_help_shows_the_keys_of_all(capsys):
    with pytest.raises(SystemExit):
        resolved("--help")
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--ttt-steps", "--block-size", "--n-predict", "--NAME.FLAG"))
