"""`evaluate` over several data sets, draft tokens, temperatures and batch sizes in one call, and its file: it is
continued after a kill, and read again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from speculators import assets, evaluation
from speculators.cli.app import main, run
from speculators.evaluation import load_result, suite

SHORT = ["--limit", "3", "--max-tokens", "8", "--num-warmup", "0"]


@pytest.fixture
def measuring(verifier, chats, tmp_path):
    """The words of a call, without its axes, and its output."""
    output = tmp_path / "result.json"
    return ["evaluate", "--verifier", verifier, "--data", chats, *SHORT, "--output", str(output)], output


@pytest.fixture
def spec_bench(tmp_path) -> Path:
    """Two questions of each of three categories, in Spec-Bench's layout; two of them are parts of MT-bench."""
    path = tmp_path / "spec.jsonl"
    rows = [
        {"question_id": number, "category": category, "turns": [f"{category} {number}", "and then?"]}
        for category in ("writing", "coding", "qa")
        for number in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_call_measures_every_combination_beside_plain_decoding(measuring, capsys):
    words, output = measuring
    axes = ["--method", "ngram", "-k", "2,3", "--temperature", "0,0.7", "--batch-size", "1,2"]
    assert main([*words, *axes]) == 0
    report = load_result(output)
    places = Counter((row.method, row.temperature, row.batch_size) for row in report.rows)
    assert set(places) == {(m, t, b) for m in ("none", "ngram") for t in (0.0, 0.7) for b in (1, 2)}
    assert set(places.values()) == {2}  # one per K; plain decoding beside each
    assert [row.num_speculative_tokens for row in report.rows if row.method == "ngram"] == [2, 3] * 4
    assert len(report.cells) == 8 and report.interrupted is None
    assert report.settings["batch_size"] == [1, 2] and report.settings["max_tokens"] == 8
    printed = capsys.readouterr().out
    assert "2 together, temperature 0.7" in " ".join(printed.split())
    assert json.loads(printed.splitlines()[-1])["schema_version"] == 2
    for row in report.rows:
        assert sum(group.num_tokens for group in row.groups) == row.num_tokens
        assert sum(len(group.prompts) for group in row.groups) == row.num_prompts == 3


def test_a_method_that_says_its_own_number_is_measured_once(measuring):
    words, output = measuring
    fixed = json.dumps({"method": "ngram", "num_speculative_tokens": 5})
    run([*words, "--method", fixed, "--method", "suffix", "-k", "2,3"])
    drafting = [(row.method, row.num_speculative_tokens) for row in load_result(output).rows if not row.is_plain]
    assert drafting == [("ngram", 5), ("suffix", 2), ("suffix", 3)]


def test_a_killed_call_goes_on_with_the_cell_that_is_missing(measuring, monkeypatch, capsys):
    words, output = measuring
    words += ["--method", "ngram", "-k", "2,3,4"]
    whole, calls = suite.measure_cell, []

    def killed(config, *rest):
        if len(calls) == 2:
            raise MemoryError("killed")
        calls.append(config.num_speculative_tokens)
        return whole(config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(suite, "measure_cell", killed)
        assert main(words) == 1
    kept = load_result(output)
    assert kept.interrupted == "2 of 3 cells are measured" and calls == [2, 3]
    calls.clear()
    monkeypatch.setattr(suite, "measure_cell", killed)
    assert main(words) == 0
    report = load_result(output)
    assert calls == [4] and report.interrupted is None
    assert report.rows[: len(kept.rows)] == kept.rows
    assert [row.num_speculative_tokens for row in report.rows if not row.is_plain] == [2, 3, 4]
    before = output.read_text()
    assert main(words) == 0 and calls == [4]  # nothing is left
    assert output.read_text() == before
    assert main([*words, "--overwrite"]) == 1 and calls == [4, 2]


def test_rows_of_a_cell_that_was_interrupted_are_measured_again(measuring, monkeypatch):
    words, output = measuring
    words += ["--method", "ngram", "-k", "2,3"]
    decode, num_calls = suite.measure_cell, []

    def interrupted(*args):
        num_calls.append(1)
        if len(num_calls) == 2:
            whole = evaluation.measurement.measure_group

            def stop(methods, group, index, *rest):
                if index == 1:
                    raise KeyboardInterrupt
                return whole(methods, group, index, *rest)

            with monkeypatch.context() as patch:
                patch.setattr("speculators.evaluation.measurement.measure_group", stop)
                return decode(*args)
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(suite, "measure_cell", interrupted)
        assert main(words) == 130
    kept = load_result(output)
    assert kept.interrupted == "stopped after 1 of 3 prompts of cell 2 of 2"
    assert [row.num_prompts for row in kept.rows] == [3, 3, 1, 1]
    assert main(words) == 0
    assert [row.num_prompts for row in load_result(output).rows] == [3, 3, 3, 3]


def test_another_recipe_is_refused_in_two_columns(measuring, capsys):
    words, output = measuring
    run([*words, "--method", "ngram", "-k", "2"])
    before = output.read_text()
    capsys.readouterr()
    assert main([*words, "--method", "ngram", "-k", "2,3", "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert "was made with other settings" in said and "--overwrite" in said
    assert "settings.seed:" in said and "0 -> 1" in said
    assert "settings.num_speculative_tokens:" in said and "2 -> [2, 3]" in said
    assert output.read_text() == before


def test_spec_bench_is_reported_by_task_and_overall(verifier, spec_bench, tmp_path, capsys):
    output = tmp_path / "result.json"
    words = ["evaluate", "--verifier", verifier, "--data", f"spec-bench={spec_bench}", "--method", "ngram", "-k", "2"]
    assert main([*words, "--limit", "3", "--max-tokens", "8", "--num-warmup", "0", "--output", str(output)]) == 0
    rows = [row for row in load_result(output).rows if row.method == "ngram"]
    assert [(row.dataset, row.task, row.num_prompts) for row in rows] == [
        ("spec-bench", None, 3),
        ("spec-bench", "mt_bench", 2),  # writing and coding are one task; of three prompts two are of the first
        ("spec-bench", "qa", 1),
    ]
    assert rows[0].num_tokens == rows[1].num_tokens + rows[2].num_tokens
    assert [group.task for group in rows[0].groups] == ["mt_bench", "mt_bench", "qa"]
    assert "tasks of spec-bench" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("specbench=x.jsonl", "no set of prompts is named 'specbench'. Did you mean 'spec-bench'?"),
        ("humaneval=", "says no file: humaneval=PATH"),
        ("gsm8k=missing.jsonl", "data 'missing.jsonl' does not exist"),
        (
            "gsm8k={spec}",
            "its rows have ['category', 'question_id', 'turns'], those of gsm8k have ['question', 'answer']",
        ),
    ],
)
def test_a_set_of_prompts_that_is_not_what_it_is_called_is_refused(data, said, verifier, spec_bench, capsys):
    words = ["evaluate", "--verifier", verifier, "--method", "none", "--data", data.format(spec=spec_bench)]
    assert main(words) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_two_files_of_one_name_are_refused(verifier, spec_bench, tmp_path, capsys):
    """Their rows and cells would be taken for each other's."""
    other = tmp_path / "other.jsonl"
    other.write_text(spec_bench.read_text())
    words = ["evaluate", "--verifier", verifier, "--method", "none", *SHORT]
    assert main([*words, "--data", f"spec-bench={spec_bench}", "--data", f"spec-bench={other}"]) == 2
    assert "two data sets are named 'spec-bench'" in " ".join(capsys.readouterr().err.split())


def test_ours_are_the_embedded_prompts(verifier, toy_assets):
    held_out = str(assets.prompts_path("heldout"))
    [plain] = run(["evaluate", "--verifier", verifier, "--data", "ours", "--method", "none", *SHORT])["rows"]
    [same] = run(["evaluate", "--verifier", verifier, "--data", held_out, "--method", "none", *SHORT])["rows"]
    assert plain["dataset"] == "ours" and same["dataset"] == held_out
    prompts = [[group["prompts"] for group in row["groups"]] for row in (plain, same)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 3


def test_kept_tokens_say_who_wrote_each(measuring, verifier):
    words, output = measuring
    run([*words, "--max-tokens", "24", "--method", "suffix", "-k", "3", "--keep-tokens", "2"])
    plain, suffix = load_result(output).rows
    tokenizer = AutoTokenizer.from_pretrained(verifier)
    for answer, other in zip(suffix.answers, plain.answers, strict=True):
        ids = [token.token_id for token in answer.tokens]
        assert ids == [token.token_id for token in other.tokens]  # greedy: whoever wrote them
        assert "".join(token.text for token in answer.tokens) == tokenizer.decode(ids)
        assert {token.origin for token in other.tokens} == {"verifier"}
        assert answer.tokens[0].origin == "verifier"
        for before, token in zip(answer.tokens, answer.tokens[1:], strict=False):
            if token.origin == "draft":  # positions count from 1 in each round
                assert token.position == (before.position + 1 if before.origin == "draft" else 1)
            assert token.alternatives[0][1] == max(p for _, p in token.alternatives) >= token.probability - 1e-6
    group = suffix.groups[0]
    num_drafts = sum(token.origin == "draft" for token in suffix.answers[0].tokens)
    assert num_drafts in (group.num_accepted, group.num_accepted - 1)  # the last run may be cut off by the limit


def test_numbers_that_are_none_are_refused(measuring, capsys):
    words, _ = measuring
    for flags in (["-k", "2,x"], ["--temperature", "warm"], ["--batch-size", "1,"]):
        assert main([*words, "--method", "ngram", *flags]) == 2
        assert "with commas, such as 1,4,8" in " ".join(capsys.readouterr().err.split())
