"""Which vLLM is found, and which command is built: read back from the command itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import speculative_config

from speculators.checkpoint.engine_profile import Serving, newest_profile
from speculators.cli.app import main, run
from speculators.cli.launch_vllm import split
from speculators.deploy.process import ServerFailedError, find_vllm, version_in
from speculators.deploy.report import CheckError
from speculators.deploy.serve import base_url_of, command_to_extract, command_to_serve, value_of
from speculators.verifier.capture import ExtractionNote

ROOT = Path(__file__).parents[2]


def test_vllm_is_found_in_a_named_environment_or_interpreter_or_by_the_variable(fake_environment, monkeypatch):
    found = find_vllm(str(fake_environment))
    assert (found.version, found.is_tested_version) == ("0.32.0+cpu", True)
    assert found.command == [str(found.python), "-m", "vllm.entrypoints.cli.main"]
    assert find_vllm(str(fake_environment / "bin" / "python")) == found
    monkeypatch.setenv("SPECULATORS_VLLM_PYTHON", str(fake_environment))
    assert find_vllm() == found
    script = fake_environment / "bin" / "vllm"
    script.write_text("")
    assert found.command == [str(script)]


def test_vllm_is_found_behind_the_command_on_path(fake_environment, monkeypatch):
    if version_in(Path(sys.executable)) is not None:
        pytest.skip("this environment has vLLM itself, which comes first")
    script = fake_environment / "bin" / "vllm"
    script.write_text(f"#!{fake_environment / 'bin' / 'python'}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    assert find_vllm().command == [str(script)]


def test_a_python_without_vllm_and_a_path_without_python_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECULATORS_VLLM_PYTHON", "")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    bare.chmod(0o755)
    with pytest.raises(ValueError, match="that Python has no vllm"):
        find_vllm(str(bare))
    with pytest.raises(ValueError, match="/no/where is not a Python"):
        find_vllm("/no/where")


def test_looking_for_vllm_imports_no_torch():
    code = (
        "import sys; from speculators.deploy.process import find_vllm\n"
        "try: find_vllm()\nexcept ValueError: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_serving_a_speculator_takes_verifier_method_and_k_from_its_checkpoint(speculator, verifier, fake_environment):
    result = run(["serve", speculator, "--python", str(fake_environment), "--dry-run", "--", "--port", "8123"])
    python = str(fake_environment / "bin" / "python")
    assert result["command"][:5] == [python, "-m", "vllm.entrypoints.cli.main", "serve", verifier]
    assert speculative_config(result) == {"method": "eagle3", "num_speculative_tokens": 5, "model": speculator}
    assert result["command"][-2:] == ["--port", "8123"]
    assert result["endpoint"] == "http://127.0.0.1:8123/v1"
    assert result["vllm"] == "0.32.0+cpu"


def test_what_is_given_wins_over_the_checkpoint(speculator, tmp_path):
    result = run(["serve", speculator, "-k", "2", "--verifier", "org/other", "--dry-run"])
    assert result["command"][1:3] == ["serve", "org/other"]
    assert speculative_config(result)["num_speculative_tokens"] == 2


def test_drafting_without_a_speculator(verifier):
    more = ["--speculative-config", '{"prompt_lookup_max": 3}']
    result = run(["serve", verifier, "--method", "ngram", "-k", "4", *more, "--dry-run"])
    assert list(speculative_config(result).items()) == [
        ("method", "ngram"),
        ("num_speculative_tokens", 4),
        ("prompt_lookup_max", 3),
    ]
    plain = run(["serve", verifier, "--dry-run"])
    assert "--speculative-config" not in plain["command"]


def test_what_vllm_cannot_serve_is_refused_before_it_starts(verifier, speculator, tmp_path):
    with pytest.raises(ValueError, match="early_exit"):
        run(["serve", verifier, "--method", "early_exit", "-k", "2", "--dry-run"])
    with pytest.raises(ValueError, match="drafts by method 'eagle3'; leave --method out, or serve its verifier"):
        run(["serve", speculator, "--method", "ngram", "--dry-run"])
    with pytest.raises(ValueError, match="--speculative-config after --"):
        run(["serve", speculator, "--dry-run", "--", "--speculative-config={}"])
    config = json.loads((Path(speculator) / "config.json").read_text())
    (Path(speculator) / "config.json").write_text(json.dumps({**config, "speculators_model_type": "mlp"}))
    with pytest.raises(ValueError, match="no drafter of type 'mlp'"):
        run(["serve", speculator, "--dry-run"])


def test_an_export_is_what_vllm_serves_for_algorithms_with_a_layout_of_their_own(speculator):
    config = json.loads((Path(speculator) / "config.json").read_text())
    (Path(speculator) / "config.json").write_text(json.dumps({**config, "speculators_model_type": "medusa"}))
    with pytest.raises(ValueError, match="speculators export"):
        run(["serve", speculator, "--dry-run"])


def test_a_wrong_checkpoint_is_refused_before_vllm_starts(speculator, fake_environment):
    """The fixture has no weights. The environment has no vLLM behind its name: to start it is to see it end."""
    command = ["serve", speculator, "--python", str(fake_environment)]
    with pytest.raises(CheckError, match=r"--no-check serves it all the same:\n  model.safetensors: .*Fix: copy the"):
        run(command)
    with pytest.raises(ServerFailedError, match="No module named"):
        run([*command, "--no-check"])


def test_an_export_says_itself_how_it_is_served(verifier, fake_environment, tmp_path, capsys):
    from transformers import AutoConfig

    from speculators import SpeculatorModel
    from speculators.train.checkpointer import save_speculator

    layer = AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = SpeculatorModel.get_class("eagle").from_training_args(layer, verifier_name_or_path=verifier)
    model.config.speculators_config.proposal_methods[0].speculative_tokens = 7
    (tmp_path / "trained").mkdir()
    save_speculator(model, tmp_path / "trained")
    exported = run(["export", str(tmp_path / "trained"), "--output", str(tmp_path / "exported")])["path"]
    expected = {"method": "eagle", "num_speculative_tokens": 7, "model": exported}
    result = run(["serve", exported, "--dry-run"])
    assert result["command"][1:3] == ["serve", verifier] and speculative_config(result) == expected
    other = shutil.copytree(verifier, tmp_path / "other")
    fewer = run(["serve", exported, "--verifier", str(other), "-k", "2", "--dry-run"])
    assert fewer["verifier"] == str(other) and speculative_config(fewer) == {**expected, "num_speculative_tokens": 2}
    with pytest.raises(ServerFailedError):  # it passes the check and is started
        run(["serve", exported, "--python", str(fake_environment)])
    assert "contract check: ready to serve" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "launch-vllm"])
def test_a_flag_of_vllm_before_the_dashes_is_answered_with_where_it_goes(verb, verifier, capsys):
    assert main([verb, verifier, "--tensor-parallel-size", "4", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "--tensor-parallel-size" in said and f"follow `--`: speculators {verb} MODEL -- --port" in said


def test_extraction_follows_the_layers_that_are_asked_for(verifier, tmp_path):
    result = run(
        [
            "launch-vllm",
            verifier,
            "--hidden-states-path",
            str(tmp_path),
            "--target-layer-ids",
            "4",
            "2",
            "--dry-run",
            "--",
            "--port",
            "8124",
        ]
    )
    command = result["command"]
    assert result["layer_ids"] == [2, 4, 12]
    assert json.loads(command[command.index("--speculative_config") + 1]) == {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 12]}},
    }
    assert json.loads(command[command.index("--kv_transfer_config") + 1]) == {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    assert command[-2:] == ["--port", "8124"]
    assert not any(tmp_path.iterdir())  # a dry run writes nothing


def test_default_layers_and_leaving_the_last_one_out(verifier):
    assert run(["launch-vllm", verifier, "--dry-run"])["layer_ids"] == [2, 6, 9, 12]
    assert run(["launch-vllm", verifier, "--no-include-last-layer", "--dry-run"])["layer_ids"] == [2, 6, 9]


def test_the_script_of_the_guides_is_the_verb(verifier):
    script = [sys.executable, str(ROOT / "scripts" / "launch_vllm.py"), verifier, "--dry-run", "--", "--port", "9"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed.splitlines()[-1])["command"][-2:] == ["--port", "9"]


def test_the_note_beside_the_states_comes_back_as_written(tmp_path):
    note = ExtractionNote("org/model", (2, 4, 8), 8)
    assert ExtractionNote.read(tmp_path) is None
    note.write(tmp_path)
    assert ExtractionNote.read(tmp_path) == note
    (tmp_path / "extraction.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ExtractionNote.read(tmp_path)
    for values in ({}, {"layer_ids": 3, "num_layers": 8}, {"layer_ids": [9], "num_layers": 8}, {"layer_ids": ["2"]}):
        (tmp_path / "extraction.json").write_text(json.dumps({"format": 1, "model": "m", **values}))
        with pytest.raises(ValueError, match="not layers of a model"):
            ExtractionNote.read(tmp_path)


def test_addresses_are_read_from_vllms_flags():
    assert base_url_of([]) == "http://127.0.0.1:8000"
    assert base_url_of(["--port=1", "--port", "2", "--host", "::"]) == "http://127.0.0.1:2"
    assert base_url_of(["--host", "fd00::1", "--ssl-certfile", "x.pem"]) == "https://[fd00::1]:8000"
    assert base_url_of(["--headless"]) is None
    assert value_of(["--port"], "--port") is None
    assert split(["m", "--", "--a", "--", "b"]) == (["m"], ["--a", "--", "b"])


def test_commands_are_built_of_what_they_are_given():
    assert command_to_serve(["vllm"], "v", None, ["--x"]).command == ("vllm", "serve", "v", "--x")
    note = ExtractionNote("v", (1, 2), 2)
    with pytest.raises(ValueError, match="--kv-transfer-config after --"):
        command_to_extract(["vllm"], note, Path("/x"), ["--kv-transfer-config", "{}"])


@pytest.mark.parametrize("name", ["--api-key=x", "-sc", "a\nb", "org/\x1b[2Jmodel"])
def test_a_recorded_name_becomes_no_option_of_a_command(speculator, name, capsys):
    note = ExtractionNote(name, (1, 2), 2)
    for make in (
        lambda: command_to_serve(["vllm"], name, None),
        lambda: command_to_extract(["vllm"], note, Path("/x")),
        lambda: newest_profile().command(Serving(name, {"method": "eagle", "num_speculative_tokens": 1})),
    ):
        with pytest.raises(ValueError, match="is not passed to a command"):
            make()
    config = Path(speculator) / "config.json"
    values = json.loads(config.read_text())
    values["speculators_config"]["verifier"]["name_or_path"] = name
    config.write_text(json.dumps(values))
    assert main(["serve", speculator, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert "is not passed to a command" in " ".join(printed.err.split())
    assert "vllm serve" not in printed.out and "\x1b" not in printed.out + printed.err


def test_a_whole_language_model_is_no_head_and_a_guess_by_its_name_is_the_reason(verifier, tmp_path):
    plain = shutil.copytree(verifier, tmp_path / "my-eagle3-notes")
    flags = ["-k", "2", "--dry-run"]
    with pytest.raises(ValueError, match=r"--method eagle: .* whole language model .*--method draft_model"):
        run(["serve", verifier, "--draft", str(plain), "--method", "eagle", *flags])
    with pytest.raises(
        ValueError, match=r"--method eagle3 \(guessed from 'eagle3' in its name\): .*my-eagle3-notes is"
    ):
        run(["serve", verifier, "--draft", str(plain), *flags])
    right = run(["serve", verifier, "--draft", str(plain), "--method", "draft_model", *flags])
    assert speculative_config(right)["method"] == "draft_model"


def test_serve_refuses_a_draft_model_of_another_vocabulary_and_knows_a_padded_table(verifier, tmp_path):
    padded = shutil.copytree(verifier, tmp_path / "padded")
    values = json.loads((padded / "config.json").read_text())
    own_size = values["vocab_size"]
    values["vocab_size"] += 64
    (padded / "config.json").write_text(json.dumps(values))
    command = ["serve", verifier, "--draft", str(padded), "--method", "draft_model", "-k", "2", "--dry-run"]
    sizes = rf"Target model vocab_size={own_size}\. Draft model vocab_size={own_size + 64}"
    with pytest.raises(ValueError, match=rf"{sizes}\. The tokenizer is the same, the tables are padded"):
        run(command)
    accepted = run([*command, "--speculative-config", '{"use_heterogeneous_vocab": true}'])
    assert speculative_config(accepted)["use_heterogeneous_vocab"] is True
    for path in padded.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"{sizes}\. Using models with different tokenizers"):
        run(command)


def test_a_retired_setting_is_not_taken_for_a_missing_number_of_tokens(verifier):
    with pytest.raises(ValueError, match="disable_by_batch_size is retired: num_speculative_tokens_per_batch_size="):
        run(["serve", verifier, "--method", "ngram", "--speculative-config", '{"disable_by_batch_size": 8}'])
