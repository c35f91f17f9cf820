"""The command itself: help, exit codes, one message for an error, nothing heavy imported for help."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from speculators.assets import tiny_verifier_path
from speculators.cli import app, data
from speculators.cli.shared import Result, say, say_error, show
from speculators.utils.report import facts_table

HELP = """
import contextlib, io, json, sys
from speculators.cli.app import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = main(words)
    heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
    assert code == 0 and shown.getvalue().strip() and not heavy, (words, code, shown.getvalue(), heavy)
"""


def test_help_imports_neither_torch_nor_transformers():
    commands = [["--help"], ["--version"], *([verb, "--help"] for verb in app.VERBS)]
    done = subprocess.run([sys.executable, "-c", HELP, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WRITTEN_HERE = {("root", "version"), ("quickstart", "output"), ("inspect_mask", "first_row")}
"""What is the command's alone: a help text, a directory of its own, and that rows are shown from the first."""


def literal_defaults(source: str) -> list[tuple[str, str]]:
    """(command, flag) of each default that is a number or a text, in place of the name of where it is written."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.args.defaults:
            flags = function.args.args[-len(function.args.defaults) :]
            for flag, default in zip(flags, function.args.defaults, strict=True):
                values = [node.value for node in ast.walk(default) if isinstance(node, ast.Constant)]
                if any(value is not None and not isinstance(value, bool) and value != "," for value in values):
                    found.append((function.name, flag.arg))
    return found


def test_a_flag_takes_its_default_from_the_config_or_function_behind_it():
    """The default that a flag repeats drifts from the one that Python has."""
    sources = [file.read_text() for file in Path(app.__file__).parent.glob("*.py")]
    assert {default for source in sources for default in literal_defaults(source)} == WRITTEN_HERE
    assert literal_defaults("def generate(top_k: TopK = 0, output: Path = Path('out'), raw=False, seed=None): ...") == [
        ("generate", "top_k"),
        ("generate", "output"),
    ]


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]):
    assert app.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in app.VERBS)


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]):
    assert app.main([]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evalute"], "Did you mean 'evaluate'?"),
        (["evaluate", "--nonsense"], "--nonsense"),
        (["prepare-data"], "--verifier"),
        (["prepare-data", "--model", "x", "--data", "y", "--seq-length", "many"], "--seq-length"),
        (["train", "--lrr", "3"], "--lrr"),
        (["train"], "verifier"),
    ],
)
def test_bad_usage_ends_with_2_and_one_message(args: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert app.main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def raise_it(error: BaseException):
    def run(args: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("hidden sizes differ: 64 and 128"), 2, "error: hidden sizes differ: 64 and 128"),
        (
            OSError(28, "No space left on device", "/data/hs_3.safetensors"),
            1,
            "the disk is full (/data/hs_3.safetensors)",
        ),
        (OSError(28, "No space left on device"), 1, "error: the disk is full: free some space"),
        (OSError(13, "Permission denied", "/data"), 2, "Permission denied: /data"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "perform", raise_it(error))
    assert app.main(["train"]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_ctrl_c_inside_a_verb_says_what_the_verb_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "inspect_mask", stopped_verb)
    assert app.main(["inspect-mask"]) == 130
    assert capsys.readouterr().err == "error: stopped, run again to continue\n"


def stopped_verb() -> None:
    raise KeyboardInterrupt("stopped, run again to continue")


def test_a_refused_setting_is_named_without_the_machinery_behind_it(capsys: pytest.CaptureFixture[str], tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    command = ["evaluate", "--verifier", str(tiny_verifier_path()), "--data", str(prompts), "--method", "nosuchmethod"]
    assert app.main(command) == 2
    printed = capsys.readouterr().err
    assert "method" in printed and "nosuchmethod" in printed
    assert "pydantic" not in printed and "input_value" not in printed


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "perform", raise_it(ValueError("bad")))
    assert app.main(["train", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_last_line_is_the_result_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "perform", lambda args: Result({"verb": "train", "num_steps": 3}))
    assert app.main(["train"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '{"verb": "train", "num_steps": 3}'


FOREIGN = "[/b] [red]x[/] :smile: \x1b[2J\x07\x9b \u202egnp"
SHOWN = "[/b] [red]x[/] :smile: \\x1b[2J\\x07\\x9b \\u202egnp"


def test_foreign_text_is_text_on_the_terminal(capsys: pytest.CaptureFixture[str]):
    say(FOREIGN, "yellow")
    say_error(FOREIGN, FOREIGN)
    show(Result({}, [facts_table("facts", {"path": FOREIGN}), FOREIGN], FOREIGN))
    printed = capsys.readouterr()
    assert printed.err.count(SHOWN) == 3 and printed.out.count(SHOWN) == 3


def test_a_path_in_brackets_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "[b]run[/b]\x1b[2J"
    path.mkdir(parents=True)  # the bracket holds a slash
    (path / "config.json").write_text('{"speculators_model_type": "[/b]\x1b[31m"}'.replace("\x1b", "\\u001b"))
    assert app.main(["check", str(path)]) == 1
    printed = capsys.readouterr()
    assert "[/b]" in printed.out and "[b]run[/b]" in printed.out and "\x1b" not in printed.out + printed.err


def test_a_logged_warning_shows_control_characters_escaped(capsys: pytest.CaptureFixture[str]):
    program = (
        "import logging; from speculators.cli.shared import escape_warnings; escape_warnings();"
        "logging.getLogger('x').warning('row %s', chr(27) + '[2J')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "row \\x1b[2J\n"
