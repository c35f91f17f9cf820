"""The last screen is the result: a table, a sentence and the next command on a terminal, JSON for programs."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from speculators.cli import app
from speculators.cli.app import main
from speculators.decoding.request import StreamEvent
from speculators.decoding.stats import DecodeStats
from speculators.evaluation.measurement import Measurement, summarise
from speculators.evaluation.report import EvaluationReport
from speculators.train.events import Started, StepDone
from speculators.train.logger import TrainingProgress
from speculators.train.records import TrainResult
from speculators.utils.progress import WorkProgress, token_counter
from speculators.utils.report import ReportConsole


def test_on_a_terminal_the_result_is_a_table_a_sentence_and_the_next_command(verifier, chats, tmp_path, terminal):
    output = tmp_path / "data"
    code, shown = terminal.run("prepare-data", "--model", verifier, "--data", chats, "--output", str(output))
    assert code == 0
    assert "Prepared" in shown and "row length" in shown
    sentence, following = "12 rows of 400 tokens, 24% trained on", "next: speculators train --verifier"
    assert sentence in shown and following in shown and shown.index(sentence) < shown.index(following)
    assert '"verb"' not in shown


def test_an_evaluation_ends_with_one_sentence_within_80_columns(verifier, chats, terminal):
    args = ["evaluate", "--verifier", verifier, "--data", chats, "--method", "ngram", "--num-prompts", "3"]
    code, shown = terminal.run(*args, "--max-tokens", "12")
    assert code == 0
    bar = shown[: shown.index("prompts of")]
    assert (
        re.search(r"3/3 \d+ tokens [\d,]+/s 0:00:", bar) and max(map(len, bar.splitlines()[-1].split("decode "))) <= 80
    )
    row = next(line.rstrip() for line in shown.splitlines() if line.startswith(" ngram"))
    assert row.endswith("3/3") and len(row) <= 80
    assert "same text, 3 of 3" in " ".join(shown.split()[-20:])
    assert '"verb"' not in shown


def measured(*times_s: float, token: int = 5) -> list[Measurement]:
    """Each of one round that accepts two drafts: τ is 3."""
    return [Measurement(((token, 6),), time_s, DecodeStats(Counter({(4, 4, 2): 1}))) for time_s in times_s]


@pytest.mark.parametrize(
    ("times_s", "token", "sentence"),
    [
        ((0.5, 0.5, 0.4), 5, "2.14x faster, same text, 3 of 3"),
        ((2.0, 2.0, 2.2), 5, "0.48x, slower than plain decoding: better without this drafter, same text, 3 of 3"),
        ((0.5, 1.0, 1.9), 5, "0.88x, no evidence of a difference from plain decoding, same text, 3 of 3"),
        ((0.5, 0.5, 0.4), 7, "2.14x faster, ANOTHER text, 0 of 3"),
        ((0.5,), 5, "2.00x, no evidence of a difference from plain decoding, same text, 1 of 1"),
        ((0.2, 0.2, 0.3), 5, "4.29x cannot be true, it is above the acceptance length 3.00, same text, 3 of 3"),
    ],
)
def test_the_sentence_of_an_evaluation_says_whether_drafting_pays(times_s, token, sentence):
    plain = measured(*[1.0] * len(times_s))
    rows = [
        summarise(name, plain, timed, num_speculative_tokens=4, temperature=0.0)
        for name, timed in (("none", plain), ("eagle3", measured(*times_s, token=token)))
    ]
    assert EvaluationReport("verifier", "data", tuple(rows)).sentence() == sentence


@pytest.mark.parametrize(
    ("trained", "validated", "length", "told"),
    [
        (0.87, 0.27, 1.4, "1.40; overfitted: accuracy 0.87 in training, 0.27 in validation: too few data"),
        (0.30, 0.27, 1.2, "1.20; a weak drafter, which may well be slower than plain decoding: train on more data"),
        (0.70, 0.66, 2.4, "2.40"),
    ],
)
def test_the_sentence_of_a_training_calls_a_weak_drafter_weak(trained, validated, length, told, tmp_path):
    result = TrainResult(tmp_path, {"full_acc_0": validated}, length, 5, train_metrics={"full_acc_0": trained})
    assert result.sentence() == f"expected acceptance length {told}"


def test_without_a_terminal_tables_come_first_and_json_last(verifier, chats, capsys):
    assert main(["inspect-mask", chats, "--model", verifier, "--num-rows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tokens trained on" in lines[0]
    assert json.loads(lines[-1])["verb"] == "inspect-mask"


@pytest.mark.parametrize("place", ["before", "after"])
def test_json_prints_the_result_and_nothing_else(place, verifier, chats, terminal):
    command = ["inspect-mask", chats, "--model", verifier, "--num-rows", "1"]
    code, shown = terminal.run(*(["--json", *command] if place == "before" else [*command, "--json"]))
    record = json.loads(shown)
    assert code == 0 and record["verb"] == "inspect-mask" and len(record["rows"]) == 1


def test_the_words_of_another_program_are_not_ours():
    args, flags = app.split_common(["serve", "M", "--json", "--", "--debug", "--json"])
    assert args == ["serve", "M", "--", "--debug", "--json"]
    assert flags == app.CommonFlags(debug=False, only_json=True)


CLOSED = """
import os, sys
from speculators.cli import app
from speculators.cli.shared import Result
closed = os.dup(1)
def work(args):
    return Result({"verb": "x"}, ["a table"] * 3, "a sentence") if args == ["work"] else perform(args)
perform, app.perform = app.perform, work
commands = [["--help"], ["work"], ["work", "--json"], *([verb, "--help"] for verb in app.VERBS)]
codes = set()
for command in commands:
    os.dup2(closed, 1)
    codes.add(app.main(command))
os.dup2(closed, 1)
sys.exit(7 if codes <= {0, 1} else f"{codes}")  # argparse, of `launch-vllm`, ends with 0
"""


def test_a_reader_that_has_read_enough_ends_every_verb_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", CLOSED], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, "")


def test_progress_that_nobody_reads_does_not_end_the_work():
    reader, writer = os.pipe()
    os.close(reader)
    code = "from speculators.cli.shared import say; say('one'); say('two'); print('done')"
    done = subprocess.run([sys.executable, "-c", code], stderr=writer, stdout=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_bar_moves_with_tokens_between_finished_answers():
    progress, event = WorkProgress(), StreamEvent(0, [7] * 16, "")
    progress("decode", 0, 4)
    for _ in range(3):
        progress.count_tokens(event)
    (bar,) = progress.bars.tasks
    assert bar.completed == 0  # nobody knows yet how long an answer is
    progress("decode", 1, 4)  # 48 tokens each
    progress.count_tokens(event)
    assert bar.completed == pytest.approx(1 + 16 / 48)
    progress("decode", 2, 4)
    assert bar.completed == 2 and progress.num_tokens == 64
    assert token_counter(lambda what, done, total: None) is None


def test_the_bar_of_a_training_fits_80_columns_and_shows_its_speed():
    progress = TrainingProgress()
    console = ReportConsole(file=io.StringIO(), width=80)
    progress(Started(num_steps=1200, first_step=0, num_trainable_params=1, num_documents=1, num_tokens=1))
    metrics = {
        "loss": 3.123,
        "full_acc_0": 0.61,
        "full_acc_1": 0.55,
        "full_acc_2": 0.49,
        "decoded_acceptance_length": 2.0,
    }
    progress(StepDone(400, 1200, 1, 1e-3, metrics, 2.12, 12345.6))
    with console.capture() as shown:
        for item in progress.get_renderables():
            console.print(item)
    lines = shown.get().rstrip().splitlines()
    assert max(map(len, lines)) <= 80 and "step 400/1200" in lines[0] and "12,346 tokens/s" in lines[0]
    assert "loss 3.123, accuracy 0.61 0.55 0.49, expected acceptance length 2.12" in " ".join(map(str.strip, lines[1:]))
