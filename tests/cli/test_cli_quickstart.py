"""quickstart on a toy verifier: every step runs, the commands shown are complete, and nobody's files are replaced."""

from __future__ import annotations

import json
from pathlib import Path

from speculators.assets import tiny_verifier_path
from speculators.cli.app import main
from speculators.cli.quickstart import DEMO_PROMPT
from speculators.decoding import Engine


def test_quickstart_ends_with_a_measured_lossless_drafter(toy_assets, tmp_path, capsys):
    output = tmp_path / "out"
    for _ in range(2):  # the second run replaces the first
        assert main(["quickstart", "--output", str(output)]) == 0
        printed = capsys.readouterr().out
        result = json.loads(printed.splitlines()[-1])
        rows = {row["method"]: row for row in result["evaluation"]["rows"]}
        assert set(rows) == {"none", "eagle3"}
        assert rows["eagle3"]["num_identical"] == rows["eagle3"]["num_prompts"] == 3
        assert Path(result["checkpoint"], "model.safetensors").is_file()
        assert result["parity"]["passed"] is True
        assert result["parity"]["checks"]["drafts: training = engine"].startswith("pass: ")
        assert result["serve"].startswith("vllm serve ") and result["checkpoint"] in result["serve"]
        assert printed.count("$ speculators ") == 5


def test_quickstart_replaces_nothing_of_others(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    for written in ("made-by-quickstart", "report.json"):
        (tmp_path / written).touch()
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_answer_that_is_shown_ends():
    engine = Engine.from_pretrained(str(tiny_verifier_path()), drafter="none")
    reply = engine.chat(DEMO_PROMPT, max_tokens=64)
    assert reply.finish_reason == "stop"
    assert reply.text.endswith("Return the path of the path.")
