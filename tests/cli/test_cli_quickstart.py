"""quickstart on a toy verifier: it is `build` with fixed work, and nobody's files are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators import assets
from speculators.cli.app import main


def test_quickstart_ends_with_a_measured_lossless_drafter(toy_assets, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["quickstart", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    rows = {row["method"]: row for row in result["evaluation"]["rows"]}
    assert set(rows) == {"none", "ngram", "suffix", "eagle3"}
    assert rows["eagle3"]["num_identical"] == rows["eagle3"]["num_prompts"] == 3
    assert Path(result["checkpoint"], "model.safetensors").is_file()
    assert result["parity"]["passed"] is True
    assert result["parity"]["checks"]["drafts: training = engine"].startswith("pass: ")
    assert result["served_by"].startswith("vllm serve ") and result["checkpoint"] in result["served_by"]
    assert '"num_speculative_tokens": 4' in result["served_by"] and rows["eagle3"]["num_speculative_tokens"] == 4
    assert list(result["step_s"]) == ["answers", "rows", "training", "evaluation", "check", "verify"]
    assert printed.count("$ speculators ") == len(result["step_s"])
    asked = {path: (output / "prompts" / f"{path}.jsonl").read_text() for path in ("train", "held-out")}
    assert len(asked["held-out"].splitlines()) == 4 and "held 2" in asked["held-out"]
    assert len(asked["train"].splitlines()) == 11 and "say 0" not in asked["train"]  # no prompt of both

    # what is finished is replaced, but not with files of others beside it
    (output / "thesis.tex").write_text("years of work")
    assert main(["quickstart", "--output", str(output)]) == 2
    assert "holds ['thesis.tex'] and is not an earlier quickstart's" in capsys.readouterr().err.replace("\n", " ")
    assert (output / "thesis.tex").read_text() == "years of work" and Path(result["checkpoint"]).is_dir()
    (output / "thesis.tex").unlink()

    def stop(*args, **settings):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speculators.api.regenerate", stop)
        assert main(["quickstart", "--output", str(output)]) == 130
    assert "stopped in step 1" in capsys.readouterr().err
    assert not Path(result["checkpoint"]).exists()


def test_quickstart_replaces_nothing_of_others(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
    state = {"settings": {"verifier": "my-model", "speculator_type": ["eagle3"]}, "done": {"end": True}}
    (tmp_path / "build.json").write_text(json.dumps(state))
    (tmp_path / "eagle3").mkdir()
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    (tmp_path / "thesis.tex").unlink()
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "is of a build with {'verifier': 'my-model'" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "eagle3").is_dir()


def test_quickstart_replaces_no_build_that_somebody_else_began(tmp_path, capsys):
    """Of the embedded verifier, but with other prompts; and a build.json of another program."""
    settings = {"verifier": str(assets.tiny_verifier_path()), "data": "mine.jsonl", "speculator_type": ["eagle3"]}
    (tmp_path / "eagle3").mkdir()
    (tmp_path / "build.json").write_text(json.dumps({"settings": settings, "done": {"end": True}}))
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "mine.jsonl" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "build.json").write_text('{"target": "es6"}')
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "it is of something else" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "eagle3").is_dir()
