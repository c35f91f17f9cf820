"""build on a toy verifier: it ends with a measured, proven drafter, and goes on wherever it was stopped or killed."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import speculators as sp
from speculators import api
from speculators.building import plan
from speculators.building import run as building_run
from speculators.building.report import BuildResult, Settings, StepBegun, training_of
from speculators.cli import app, train
from speculators.cli.app import main
from speculators.decoding.stats import DecodeStats
from speculators.evaluation.measurement import Measurement, summarise
from speculators.evaluation.report import EvaluationReport
from speculators.train.checkpoint_files import METRICS_FILE, STATE_FILE
from speculators.train.events import PACE


@pytest.fixture
def command(verifier, chats, tmp_path) -> list[str]:
    flags = "--target-layer-ids 1 3 5 --train-data-ratio 0.6 --max-steps 4"
    args = ["build", "--verifier", verifier, "--data", chats, "--output", str(tmp_path / "out"), "-k", "2"]
    return [*args, "--budget", "20s", "--max-tokens", "16", "--train-flags", flags, "--json"]


def result_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


class Calls:
    """What the functions behind the commands were called with: by `build`, and by the commands that it shows."""

    places = (
        *((api, name) for name in ("regenerate", "evaluate", "verify")),
        *((building_run, name) for name in ("prepare_data", "check_checkpoint", "train_side_by_side")),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple, dict[str, Any]]] = []
        self.is_dry = False
        for module, name in self.places:
            monkeypatch.setattr(module, name, self.recording(name, getattr(module, name)))
        for module, name in (("data_generation", "prepare_data"), ("deploy.check", "check_checkpoint")):
            monkeypatch.setattr(f"speculators.{module}.{name}", getattr(building_run, name))
        monkeypatch.setattr("speculators.train.run.train_side_by_side", building_run.train_side_by_side)

    def recording(self, name: str, function: Any) -> Any:
        def called(*args: Any, **settings: Any) -> Any:
            self.calls.append((name, args, settings))
            if self.is_dry:
                raise InterruptedError
            return function(*args, **settings)

        return called

    def of_command(self, words: list[str]) -> tuple[str, tuple, dict[str, Any]]:
        self.is_dry = True
        with pytest.raises(InterruptedError):
            app.perform(words)
        self.is_dry = False
        return self.calls.pop()


def said(call: tuple[str, tuple, dict[str, Any]]) -> dict[str, Any]:
    """The settings of a call, by name, as they can be compared."""
    name, args, settings = call
    if name == "train_side_by_side":
        return {config.speculator_type: config.flatten() for config in args[0]}
    first = dict(zip({"prepare_data": ("model", "data")}.get(name, ("checkpoint",)), args, strict=False))
    if name in ("regenerate", "evaluate"):
        first = dict(zip(("verifier", "data"), args, strict=False))
    values = {key: value for key, value in {**first, **settings}.items() if key != "progress"}
    values = {key: [value] if key == "data" and not isinstance(value, list) else value for key, value in values.items()}
    return {
        key: list(map(str, value)) if isinstance(value, list | tuple) else str(value) for key, value in values.items()
    }


def test_build_ends_with_a_measured_drafter_and_goes_on_after_any_step(command, tmp_path, capsys, monkeypatch):
    output, begun, show = tmp_path / "out", [], train.show_step
    calls = Calls(monkeypatch)

    def stopping(event):
        """Ctrl-C before every step once."""
        show(event)
        if isinstance(event, StepBegun) and event.title not in begun:
            begun.append(event.title)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "show_step", stopping)
    codes = [main(command)]
    while codes[-1] == 130 and len(codes) < 20:
        codes.append(main(command))
    assert codes == [130] * 8 + [0]
    result = result_of(capsys)
    rows = {row["method"]: row for row in result["evaluation"]["rows"]}
    assert set(rows) == {"none", "ngram", "suffix", "eagle3"}
    assert all(row["num_identical"] == row["num_prompts"] for row in rows.values())
    assert Path(result["checkpoint"], "model.safetensors").is_file()
    assert result["speedup"]["value"] == max(row["speedup"]["value"] for name, row in rows.items() if name != "none")
    page = Path(result["page"]).read_text()
    assert "Where the time goes" in page and all(f">{name}</th>" in page for name in ("ngram", "suffix", "eagle3"))
    report = Path(result["report"]).read_text()
    assert result["serve"] in report and re.fullmatch(r"answers=8,epochs=\d+,prompts=4", result["budget"])
    commands = [line for line in report.splitlines() if line.startswith("speculators ")]
    assert len(commands) == len(result["step_s"]) + 1 == 9
    pilot = next(line for line in commands if "--max-steps 3" in line)
    assert pilot.endswith("--hidden-states-memory-gb 0")  # a step's time is not that of computing other rows ahead

    # each command that is shown does what the step did
    done, calls.calls = calls.calls, []
    assert len(done) == 8
    for step, line in zip(done, commands, strict=False):
        alone = said(calls.of_command(shlex.split(line)[1:]))
        assert {key: alone.get(key) for key in said(step)} == said(step), line

    monkeypatch.setattr(
        train, "show_step", lambda event: pytest.fail(f"{event} again") if "Step" in str(event) else None
    )
    assert main(command) == 0
    assert result_of(capsys)["checkpoint"] == result["checkpoint"]
    assert main([*command, "--prompt-field", "other"]) == 2
    assert "prompt_field: none -> other" in capsys.readouterr().err
    for name in ("train", "held-out"):
        assert (output / "prompts" / f"{name}.jsonl").is_file()


def test_build_replaces_nothing_of_others(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(command) == 2
    assert "--output" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_wrong_flag_of_train_is_refused_before_an_hour_of_answers(verifier, chats, tmp_path):
    with pytest.raises(ValueError, match="epochz"):
        sp.build(verifier, chats, output=tmp_path / "out", train_flags="--epochz 3")
    for flags, instead in (
        ("--lr 1e-3 --epochs=3", "--budget answers="),
        ("--eagle3.epochs 9", "--budget answers="),
        ("--output mine", "build's own --output"),
        ("--data_path other", "build's own --data"),
        ("--estimate", "--estimate to `speculators train`"),
    ):
        with pytest.raises(ValueError, match=f"which a build sets itself: leave it out, and give {instead}"):
            sp.build(verifier, chats, output=tmp_path / "out", train_flags=flags)
    with pytest.raises(ValueError, match="does not exist"):
        sp.build(verifier, chats, output=tmp_path / "out", held_out="held_out.jsonl")
    assert not (tmp_path / "out").exists()  # the corrected call begins anew


def test_what_train_flags_say_is_not_said_twice(verifier):
    flags = ["--total_seq_len=96", "--eval-prompts", "3", "--lr", "3e-3"]
    settings = Settings(verifier, "chats", "1m", ["eagle3"], [2], None, None, 12, False, flags)
    first = ["--total-seq-len", "512", "--eval-prompts", "12", "--seed", "3"]
    words = training_of(settings, Path("out"), "", first, ["--epochs", "2"])
    assert words[words.index("out/data") + 1 :] == ["--seed", "3", *flags, "--output", "out/eagle3", "--epochs", "2"]


# -- kills: a process that has everything imported forks one that builds, and kills it

BUILDER = """
import json, os, signal, sys, time
import torch
import speculators as sp
from speculators.building.report import StepBegun
import transformers.models.llama.modeling_llama, speculators.models.eagle3.core, speculators.models.medusa.core
torch.set_num_threads(1)
for line in sys.stdin:
    settings, after_s = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        sp.build(**settings)
        os._exit(0)
    began_s, code = time.monotonic(), None
    while code is None:
        time.sleep(0.002)
        if after_s is not None and time.monotonic() - began_s > after_s:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else None
    print(json.dumps([code, time.monotonic() - began_s]), flush=True)
"""


def contents(output: Path) -> dict[str, Any]:
    """What a build leaves, without what was timed."""
    return {str(file.relative_to(output)): content(file) for file in output.rglob("*") if not file.is_dir()}


def content(file: Path) -> Any:
    if file.is_symlink():
        return os.readlink(file)
    if file.name == "metrics.jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in PACE} for line in lines]
    if file.name == "build.json":
        done = json.loads(file.read_text())["done"]
        return untimed({name: step for name, step in done.items() if name not in ("check", "verify")})  # of the fastest
    if file.suffix == ".json":
        return untimed(json.loads(file.read_text()))
    return None if file.name in ("report.md", "report.html") else file.read_bytes()


def untimed(value: Any) -> Any:
    """Leaves out everything that a clock decides."""
    if isinstance(value, dict):
        timed = ("_s", "speedup", "cost", "share", "shares", "per_token", "warnings", "_fingerprint")
        return {key: untimed(item) for key, item in value.items() if not key.endswith(timed)}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def test_a_build_that_is_killed_at_random_moments_ends_the_same(verifier, chats, tmp_path):
    output = tmp_path / "out"
    settings = {"verifier": verifier, "data": chats, "output": str(output), "speculator_type": "eagle3,medusa"}
    settings |= {"budget": "answers=7,epochs=2,prompts=2", "num_speculative_tokens": 2, "max_tokens": 12}
    settings["train_flags"] = "--eagle3.target-layer-ids 1 3 5 --train-data-ratio 0.6 --total-seq-len 96 "
    settings["train_flags"] += "--no-parity-gate --no-contract-check"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sp.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", BUILDER], env=environment, **pipes) as builder:

        def run(kill_after_s: float | None = None) -> tuple[int, float]:
            print(json.dumps([settings, kill_after_s]), file=builder.stdin, flush=True)
            code, time_s = json.loads(builder.stdout.readline())
            return code, time_s

        code, whole_s = run()
        assert code == 0
        whole = contents(output)
        state = json.loads((output / "build.json").read_text())["done"]
        assert {Path(path).parent.name for path in state["training"]["checkpoints"]} == {"eagle3", "medusa"}
        assert "speculators train" in state["training"]["command"] and "eagle3,medusa" in state["training"]["command"]
        output.rename(tmp_path / "whole")
        moments, codes = random.Random(time.time_ns()), []
        for _ in range(3):
            codes.append(run(moments.uniform(0.1, 0.7) * whole_s)[0])
        codes.append(run()[0])
        builder.stdin.close()
    assert codes[-1] == 0 and -9 in codes
    killed = contents(output)
    assert killed.keys() == whole.keys()
    assert [name for name in whole if killed[name] != whole[name]] == []


# -- what the last screen says


def measured(*times_s: float) -> list[Measurement]:
    stats = DecodeStats(Counter({(4, 4, 2): 5}))  # an acceptance length of 3: no speedup below it is impossible
    return [Measurement(((5, 6),), time_s, stats) for time_s in times_s]


@pytest.mark.parametrize(
    ("ngram_s", "eagle3_s", "trained", "sentence", "following"),
    [
        (
            (0.7, 0.8, 0.7),
            (1.1, 1.2, 1.12),
            0.87,
            "use ngram with 4 draft tokens: 1.36x faster, same text, 3 of 3; the drafter eagle3, trained on 60 "
            "conversations: 0.88x, slower than plain decoding: better without this drafter; overfitted: accuracy 0.87 "
            "in training, 0.27 in validation: too few data",
            ["--method", "ngram"],
        ),
        (
            (1.1, 1.2, 1.1),
            (0.9, 1.1, 1.0),
            0.3,
            "nothing measured is surely faster than plain decoding; the best, eagle3 with 4 draft tokens: 1.00x, no "
            "evidence of a difference from plain decoding, same text, 3 of 3; the drafter eagle3, trained on 60 "
            "conversations; a weak drafter, which may well be slower than plain decoding: train on more data; more "
            "prompts and a longer --budget make a better drafter",
            ["eagle3/1"],
        ),
        (
            (0.9, 0.9, 0.8),
            (0.5, 0.5, 0.4),
            None,
            "eagle3 with 4 draft tokens: 2.14x faster, same text, 3 of 3",
            ["eagle3/1"],
        ),
    ],
)
def test_the_last_screen_calls_a_weak_drafter_weak(ngram_s, eagle3_s, trained, sentence, following, tmp_path):
    checkpoint = tmp_path / "eagle3" / "1"
    checkpoint.mkdir(parents=True)
    validated = {"full_acc_0": 0.27 if trained else 0.8, "decoded_acceptance_length": 1.2 if trained else 2.9}
    (checkpoint / METRICS_FILE).write_text(json.dumps(validated))
    lines = [(1, trained or 0.8), (2, 0.99)]  # an epoch after the checkpoint's
    curve = [{"step": 9 * epoch, "epoch": epoch, "split": "train", "full_acc_0": seen} for epoch, seen in lines]
    (checkpoint.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    plain = measured(1.0, 1.0, 1.0)
    methods = {"none": (plain, None), "ngram": (measured(*ngram_s), None)}
    methods["eagle3"] = (measured(*eagle3_s), {"model": str(checkpoint)})
    rows = [
        replace(summarise(name, plain, timed, num_speculative_tokens=4, temperature=0.0), speculative_config=config)
        for name, (timed, config) in methods.items()
    ]
    result = BuildResult(
        checkpoint=checkpoint,
        evaluation=EvaluationReport("verifier", "data", tuple(rows)),
        drafters={"eagle3": checkpoint},
        parity={"passed": True, "checks": {}},
        report=tmp_path / "report.md",
        page=tmp_path / "report.html",
        verifier="verifier",
        served_by=None,
        num_answers=60,
        weakness=plan.weakness_of(checkpoint),
    )
    assert result.sentence() == sentence
    assert all(word in " ".join(result.serve) for word in following)
    assert "serves no such drafter" in str(result)


# -- decisions


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
    """An overtrained run: the loss falls on while the drafts are accepted less and less. Training set one aside."""
    losses_and_lengths = [(3.0, 1.5), (2.5, 2.1), (2.2, 1.9), (2.0, 1.8), (2.1, 2.5)]
    for name, (loss, decoded) in zip(("0", "1", "2", "3", "3.damaged"), losses_and_lengths, strict=True):
        (tmp_path / name).mkdir()
        values = {"loss": loss, "decoded_acceptance_length": decoded}
        (tmp_path / name / METRICS_FILE).write_text(json.dumps(values))
        (tmp_path / name / STATE_FILE).write_text("{}")
    (tmp_path / "checkpoint_best").symlink_to("3")
    assert plan.best_checkpoint(tmp_path) == (tmp_path / "1", 2.1)


def test_drafters_get_a_smaller_vocabulary_beside_a_large_one(verifier, monkeypatch):
    assert plan.draft_vocabulary(["eagle3"], verifier, False, []) == []  # 259 tokens
    monkeypatch.setattr(plan, "LARGE_VOCABULARY", 256)
    assert plan.draft_vocabulary(["eagle3", "dflash"], verifier, False, []) == ["--draft-vocab-size", "64"]
    assert plan.draft_vocabulary(["eagle3"], verifier, False, ["--eagle3.draft-vocab-size", "32"]) == []
    monkeypatch.setattr(plan, "has_draft_vocabulary", lambda name, *args: name == "eagle3")
    assert plan.draft_vocabulary(["eagle3", "other"], verifier, False, []) == ["--draft-vocab-size", "64"]
    assert plan.draft_vocabulary(["other"], verifier, False, []) == []


def test_a_budget_is_a_time_or_the_work_itself():
    assert plan.Budget.parse("20m") == plan.Budget(time_s=1200.0)
    assert plan.Budget.parse("answers=600,epochs=4,prompts=20") == plan.Budget(None, 600, 4, 20)
    assert plan.Budget.parse("prompts=1, answers=2,epochs=3") == plan.Budget(None, 2, 3, 1)
    for text in ("answers=6,epochs=4", "answers=0,epochs=1,prompts=1", "answers=1,epochs=1,prompts=1,x", "a=1"):
        with pytest.raises(ValueError, match="--budget"):
            plan.Budget.parse(text)


def test_names_and_numbers_are_lists_or_texts():
    assert plan.parse_algorithms("auto") == ["eagle3"] and plan.parse_algorithms(["dflash", "auto"]) == [
        "dflash",
        "eagle3",
    ]
    assert plan.parse_draft_tokens("4,2") == plan.parse_draft_tokens([2, 4]) == [2, 4] and plan.parse_draft_tokens(
        3
    ) == [3]
    with pytest.raises(ValueError, match="eagle9"):
        plan.parse_algorithms("eagle9")
    for wrong in ("", "0", "two", [0]):
        with pytest.raises(ValueError, match="numbers from 1"):
            plan.parse_draft_tokens(wrong)


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
    quick = {"time_s": 0.0, "num_conversations": 32, "num_tokens": 32 * 128}
    assert plan.num_epochs([tmp_path], 10_000, 1000.0, quick) == 4  # 450 s, 100 s an epoch
    assert plan.num_epochs([tmp_path], 10_000, 100.0, quick) == 1
    slow = quick | {"time_s": 32.0}  # 24 s more: half of an answer of 4 s, of 12 prompts
    assert plan.num_epochs([tmp_path], 10_000, 1000.0, slow) == 3
    slower = tmp_path / "slower"  # beside the first: a step of both takes what a step of each waited
    slower.mkdir()
    (slower / "metrics.jsonl").write_text(json.dumps({**lines[0], "tokens_per_s": 50.0}))
    assert plan.num_epochs([tmp_path, slower], 10_000, 1000.0, quick) == 2
    assert plan.num_epochs([tmp_path, slower], 10_000, 1000.0, slow) == 1  # 200 s and 48 s an epoch
