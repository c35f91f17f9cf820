"""build on a toy verifier: it ends with a measured, proven drafter, and goes on wherever it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.cli import build_plan as plan
from speculators.cli import quickstart
from speculators.cli.app import main
from speculators.train.checkpoint_files import METRICS_FILE


@pytest.fixture
def command(verifier, chats, tmp_path) -> list[str]:
    flags = "--target-layer-ids 1 3 5 --train-data-ratio 0.6"
    args = ["build", "--verifier", verifier, "--data", chats, "--output", str(tmp_path / "out"), "-k", "2"]
    return [*args, "--budget", "20s", "--max-tokens", "16", "--train-flags", flags, "--json"]


def result_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_build_ends_with_a_measured_drafter_and_goes_on_after_any_step(command, tmp_path, capsys, monkeypatch):
    output, ran = tmp_path / "out", []
    whole = quickstart.perform

    def stopping(args):
        """Ctrl-C before every step once."""
        if (key := tuple(args[:1] + args[-1:])) not in ran:
            ran.append(key)
            raise KeyboardInterrupt
        return whole(args)

    monkeypatch.setattr(quickstart, "perform", stopping)
    codes = [main(command)]
    while codes[-1] == 130 and len(codes) < 20:
        codes.append(main(command))
    assert codes == [130] * 8 + [0]
    result = result_of(capsys)
    rows = {row["method"]: row for row in result["evaluations"]["2"]["rows"]}
    assert set(rows) == {"none", "ngram", "suffix", "eagle3"}
    assert all(row["num_identical"] == row["num_prompts"] for row in rows.values())
    assert Path(result["checkpoint"], "model.safetensors").is_file()
    assert result["speedup"]["value"] == max(row["speedup"]["value"] for name, row in rows.items() if name != "none")
    page = Path(result["page"]).read_text()
    assert "Where the time goes" in page and all(f">{name}</th>" in page for name in ("ngram", "suffix", "eagle3"))
    report = Path(result["report"]).read_text()
    assert result["serve"] in report and report.count("\nspeculators ") == 9
    pilot = next(line for line in report.splitlines() if "--max-steps" in line)
    assert pilot.endswith("--hidden-states-memory-gb 0")  # a step's time is not that of computing other rows ahead

    monkeypatch.setattr(quickstart, "perform", lambda args: pytest.fail(f"{args} is run again"))
    assert main(command) == 0
    assert result_of(capsys)["checkpoint"] == result["checkpoint"]
    assert main([*command, "--prompt-field", "other"]) == 2
    assert "prompt_field: None -> 'other'" in capsys.readouterr().err
    for name in ("train", "held-out"):
        assert (output / "prompts" / f"{name}.jsonl").is_file()


def test_build_replaces_nothing_of_others(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(command) == 2
    assert "--output" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_prompt_is_either_trained_on_or_held_out(tmp_path):
    rows = [{"question": f"What is {number % 30}?", "source": number} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"question": 3}\n{"que')
    prompts = plan.split_prompts(str(tmp_path / "a.jsonl"), tmp_path / "prompts", None)
    assert (prompts.num_train, prompts.num_held_out, prompts.num_repeated, sum(prompts.unusable.values())) == (
        *(26, 4, 30),
        2,
    )
    asked = {
        path: {json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()}
        for path in (prompts.train, prompts.held_out)
    }
    assert not asked[prompts.train] & asked[prompts.held_out]
    assert asked[prompts.train] | asked[prompts.held_out] == {f"What is {number}?" for number in range(30)}
    reordered = tmp_path / "b.jsonl"
    reordered.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    again = plan.split_prompts(str(reordered), tmp_path / "again", None)
    assert {json.loads(line)["messages"][0]["content"] for line in again.held_out.read_text().splitlines()} == (
        asked[prompts.held_out]
    )


def test_too_few_prompts_are_refused_with_the_reasons(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "one"}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"1 different prompts in 2 rows, at least 8 .*name its column"):
        plan.split_prompts(str(tmp_path / "a.jsonl"), tmp_path / "prompts", None)


def test_the_checkpoint_is_chosen_by_decoding_not_by_loss(tmp_path):
    """An overtrained run: the loss falls on while the drafts are accepted less and less."""
    for epoch, (loss, decoded) in enumerate([(3.0, 1.5), (2.5, 2.1), (2.2, 1.9), (2.0, 1.8)]):
        (tmp_path / str(epoch)).mkdir()
        values = {"loss": loss, "decoded_acceptance_length": decoded}
        (tmp_path / str(epoch) / METRICS_FILE).write_text(json.dumps(values))
    (tmp_path / "checkpoint_best").symlink_to("3")
    assert plan.best_checkpoint(tmp_path) == (tmp_path / "1", 2.1)


def test_a_budget_is_a_time():
    assert [plan.parse_budget(text) for text in ("90s", "20m", "1h30m", "0.5h")] == [90, 1200, 5400, 1800]
    for text in ("20", "h", "1x", "", "0s"):
        with pytest.raises(ValueError, match="--budget"):
            plan.parse_budget(text)


def test_the_plan_follows_from_what_the_pilots_took(tmp_path):
    pilot = {"time_s": 32.0, "num_conversations": 32}
    assert plan.num_answers(pilot, 1000.0, 10_000) == 350  # 35 % of the time at a second each
    assert plan.num_answers(pilot, 1000.0, 100) == 100
    assert plan.num_answers(pilot, 10.0, 100) == 32  # the pilot's are there already
    assert plan.num_measured(pilot, 1000.0, 50, 5) == 10  # 200 s, 5 decodings of 4 s each
    lines = [{"split": "train", "tokens_per_s": speed} for speed in (10.0, 100.0, 100.0)] + [{"split": "val"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plan.num_epochs(tmp_path, 10_000, 1000.0, 1) == 4  # 450 s, 100 s an epoch
    assert plan.num_epochs(tmp_path, 10_000, 100.0, 2) == 1
