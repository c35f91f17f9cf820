"""Damaged checkpoints: every failure of `check` is a finding, every failure of loading a `ValueError`, in bounds."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from fuzz_toys import ALGORITHMS, ODD_VALUES, mutated, watched, write_json
from hypothesis import given
from hypothesis import strategies as st

from speculators import SpeculatorModel
from speculators.cli.app import main
from speculators.deploy.check import check_checkpoint
from speculators.utils.loading import list_checkpoint_keys, load_checkpoint, load_rows


@pytest.fixture(scope="module")
def scratch(checkpoints, tmp_path_factory):
    """name -> a copy of the checkpoint to write into"""
    root = tmp_path_factory.mktemp("scratch")
    return {name: Path(shutil.copytree(path, root / name)) for name, path in checkpoints.items()}


def assert_checked(path: Path) -> None:
    report = check_checkpoint(path)
    json.dumps(report.as_dict())
    assert str(report)
    assert all(found.code and found.fix for found in report.findings)
    unknown = [found.found for found in report.findings if found.code == "not-checked"]
    assert not unknown, f"a part of the check met a value that it does not know: {unknown}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mutated_configs_are_findings_and_value_errors(algorithm, checkpoints, scratch):
    values = json.loads((checkpoints[algorithm] / "config.json").read_text())

    @given(mutated(values))
    def run(changed):
        write_json(scratch[algorithm] / "config.json", changed)
        with watched():
            assert_checked(scratch[algorithm])
        with watched(ValueError, NotImplementedError):
            SpeculatorModel.from_pretrained(scratch[algorithm])

    run()
    shutil.copy(checkpoints[algorithm] / "config.json", scratch[algorithm])


def test_mutated_records_are_findings(checkpoints, tmp_path):
    path = Path(shutil.copytree(checkpoints["eagle3"], tmp_path / "eagle3"))
    record = json.loads((path / "training_record.json").read_text())

    @given(mutated(record))
    def run(changed):
        write_json(path / "training_record.json", changed)
        with watched():
            assert_checked(path)

    run()


def test_mutated_verifier_configs_are_findings(verifier, checkpoints, tmp_path):
    changed_verifier = Path(shutil.copytree(verifier, tmp_path / "verifier"))
    values = json.loads((changed_verifier / "config.json").read_text())

    @given(mutated(values))
    def run(changed):
        write_json(changed_verifier / "config.json", changed)
        with watched():
            report = check_checkpoint(checkpoints["eagle3"], verifier=str(changed_verifier))
            assert not [found.found for found in report.findings if found.code == "not-checked"]

    run()


def header_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def test_damaged_safetensors_are_findings_and_value_errors(checkpoints, tmp_path):
    path = Path(shutil.copytree(checkpoints["medusa"], tmp_path / "medusa"))
    file = path / "model.safetensors"
    header, data = header_of(file)

    @given(mutated(header), st.none() | st.integers(0, 2**63 - 1), st.integers(0, len(data)), st.binary(max_size=8))
    def run(changed, size, cut, tail):
        text = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data[:cut] + tail)
        with watched():
            assert_checked(path)
        for read in (load_checkpoint, list_checkpoint_keys, SpeculatorModel.from_pretrained):
            with watched(ValueError):
                read(path)
        with watched(ValueError, KeyError):
            load_rows("lm_head.weight", path)

    run()


@pytest.mark.parametrize("kind", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_damaged_indexes_are_findings_and_value_errors(checkpoints, tmp_path, kind):
    path = Path(shutil.copytree(checkpoints["medusa"], tmp_path / "medusa"))
    names = list_checkpoint_keys(path)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}

    @given(mutated(index))
    def run(changed):
        write_json(path / kind, changed)
        with watched():
            assert_checked(path)
        with watched(ValueError, OSError):
            load_checkpoint(path)

    run()


@given(ODD_VALUES)
def test_config_json_of_any_kind_is_a_finding(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("any")
    write_json(path / "config.json", values)
    with watched():
        report = check_checkpoint(path)
    assert report.errors and all(found.fix for found in report.errors)


def test_the_verifier_as_text_is_a_finding_and_the_json_line_is_printed(checkpoints, tmp_path, capsys):
    path = Path(shutil.copytree(checkpoints["eagle3"], tmp_path / "eagle3"))
    values = json.loads((path / "config.json").read_text())
    values["speculators_config"]["verifier"] = "Qwen/Qwen3-8B"
    write_json(path / "config.json", values)
    assert main(["check", str(path)]) == 1
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"config-invalid", "key-missing"} <= {found["code"] for found in printed["findings"]}


def test_checking_takes_no_memory_for_what_is_not_in_the_file(checkpoints, tmp_path):
    path = Path(shutil.copytree(checkpoints["eagle3"], tmp_path / "eagle3"))
    values = json.loads((path / "config.json").read_text())
    values["transformer_layer_config"] |= {"vocab_size": 151_936, "hidden_size": 4096}
    write_json(path / "config.json", values)
    with watched():  # building it for real took 7.5 GB
        assert_checked(path)


def test_a_refused_pickle_says_what_to_do(checkpoints, tmp_path):
    path = Path(shutil.copytree(checkpoints["medusa"], tmp_path / "medusa"))
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo pwned'\ntR.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*convert it to safetensors") as refused:
        load_checkpoint(path)
    assert "weights_only" not in str(refused.value)
