"""The benchmark for a GPU runs to its end on a CPU, so that on a GPU nothing but its numbers is unknown."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu


def test_every_part_of_the_benchmark_has_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--shape", "tiny", "--device", "cpu"])
    gpu.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["train"]) == {"eagle3", "peagle", "dflash", "dspark", "mtp", "eagle", "medusa", "mlp"}
    for row in found["train"].values():
        assert {"step_s", "floor_s", "ratio", "tokens_per_s", "peak_gib", "compilations"} <= set(row), row
        assert row["ratio"] > 1
    assert found["extract"]["training"] > 0
    for batch in ("1", "2"):
        row = found["decode"][batch]
        assert min(row[name] for name in ("generate", "plain", "ngram", "oracle")) > 0 and row["same"] == 1.0, row
