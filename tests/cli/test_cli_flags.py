"""One name for one thing on every verb, old names accepted; `-h` everywhere; completion; the help of `train`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from speculators.cli import app
from speculators.cli.flags import OLD_NAMES
from speculators.train.config import TrainConfig, read_yaml
from speculators.train.flags import FLAG_NAMES

TRAIN_NAMES = {flag: "--" + key.replace("_", "-") for key, flag in FLAG_NAMES.items()}
RETIRED = {old for names in [*OLD_NAMES.values(), TRAIN_NAMES] for old in names.values()} - {"--concurrency"}
"""`--concurrency` is the name of another thing on other verbs."""


def flags_shown(verb: str) -> Iterator[str]:
    for parameter in app.shown_command_of(verb, [], all_names=True).params:
        yield from (name for name in parameter.opts if name.startswith("--"))


@pytest.mark.parametrize("verb", app.VERBS)
def test_a_verb_shows_no_retired_name(verb: str):
    assert not RETIRED & set(flags_shown(verb))


@pytest.mark.parametrize(("verb", "names"), OLD_NAMES.items())
def test_an_old_name_is_read_as_the_new_one_and_not_shown(verb: str, names: dict[str, str]):
    command = app.command_of(verb)
    assert set(names) <= set(flags_shown(verb))
    for new, old in names.items():
        parsed = []
        for name in (new, old):
            context = command.make_context(verb, [name, "7"], resilient_parsing=True)
            parsed.append({key: value for key, value in context.params.items() if value not in (None, False)})
        assert parsed[0] == parsed[1]
        assert "7" in str(parsed[0][new.removeprefix("--").replace("-", "_")])


def test_train_reads_the_names_of_the_other_verbs_and_its_old_ones_by_flag_and_yaml(tmp_path):
    values = {"verifier_name_or_path": "v", "data_path": "d", "save_path": "s"}
    new = [word for key, value in values.items() for word in (FLAG_NAMES[key], value)]
    old = [word for key, value in values.items() for word in ("--" + key.replace("_", "-"), value)]
    for words in (new, old):
        flat = TrainConfig.first_look(words)
        assert flat == values
    file = tmp_path / "run.yaml"
    file.write_text("verifier: v\ndata: d\ntrainer:\n  output: s\n")
    assert read_yaml(file)[0] == values
    file.write_text("verifier:\n  verifier_name_or_path: v\ndata:\n  data: d\noutput: s\n")
    assert read_yaml(file)[0] == values


@pytest.mark.parametrize("verb", app.VERBS)
def test_h_is_help(verb: str, capsys: pytest.CaptureFixture[str]):
    assert app.main([verb, "-h"]) == 0
    assert f"Usage: speculators {verb}" in capsys.readouterr().out


def test_h_after_the_dashes_is_vllms(capsys: pytest.CaptureFixture[str]):
    assert not app.asks_for_help(["launch-vllm", "model", "--", "-h"])
    assert app.main(["-h"]) == 0
    assert "--install-completion" in capsys.readouterr().out


def test_launch_vllm_takes_the_verifier_by_position_or_name_once(tmp_path, capsys: pytest.CaptureFixture[str]):
    for words in ([], ["a", "--verifier", "b"]):
        assert app.main(["launch-vllm", *words]) == 2
        assert "name the verifier, once: speculators launch-vllm VERIFIER" in " ".join(capsys.readouterr().err.split())
    for words in ([str(tmp_path / "v")], ["--verifier", str(tmp_path / "v")]):
        assert app.main(["launch-vllm", *words, "--dry-run"]) != 0
        assert "no verifier at" in capsys.readouterr().err


def completed(typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("_SPECULATORS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    assert app.main([]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("speculators ev", ["evaluate"]),
        ("speculators in", ["inspect-mask"]),
        ("speculators evaluate --num-w", ["--num-warmup"]),
        ("speculators prepare-data --ver", ["--verifier"]),
        ("speculators prepare-data --mod", []),
        ("speculators train --ttt", ["--ttt-steps", "--ttt-step-loss-decay"]),
        ("speculators train --no-parity", ["--no-parity-gate"]),
        ("speculators launch-vllm --target", ["--target-layer-ids"]),
    ],
)
def test_the_shell_completes_verbs_and_flags(typed, found, monkeypatch, capsys):
    assert completed(typed, monkeypatch, capsys) == found


def test_bash_is_told_to_call_the_command_to_complete(monkeypatch, capsys):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert app.main(["--show-completion", "bash"]) == 0
    printed = capsys.readouterr().out
    assert "_SPECULATORS_COMPLETE=complete_bash $1" in printed
    assert printed.splitlines()[-1] == "complete -o default -F _speculators_completion speculators"


def test_the_help_of_train_is_that_of_the_default_algorithm_in_the_style_of_the_others(capsys):
    assert app.main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--ttt-steps" in printed and "eagle3" in printed and "dflash" in printed
    assert "╭─ optimizer ─" in printed and "╭─ eagle3 ─" in printed
    assert "…" not in printed.replace("--generation-validation-retr…", "")
    assert app.main(["train", "--speculator-type", "medusa", "-h"]) == 0
    printed = capsys.readouterr().out
    assert "╭─ medusa ─" in printed and "--ttt-steps" not in printed
