"""prepare-data and inspect-mask through the command line, and what they say to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.cli.app import main


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prepare_data_reports_what_it_wrote(verifier, chats, tmp_path, capsys):
    output = tmp_path / "data"
    assert main(["prepare-data", "--model", verifier, "--data", chats, "--output", str(output)]) == 0
    result = last_json(capsys)
    assert (result["num_rows"], result["reused"]) == (12, False)
    assert (output / "manifest.json").is_file()

    assert main(["prepare-data", "--model", verifier, "--data", chats, "--output", str(output)]) == 0
    assert last_json(capsys)["reused"] is True


def test_inspect_mask_marks_the_answer(verifier, chats, tmp_path, capsys):
    assert main(["inspect-mask", chats, "--model", verifier, "--num-rows", "1"]) == 0
    captured = capsys.readouterr().out
    assert "⟦0 it is<|im_end|>" in captured
    assert len(json.loads(captured.splitlines()[-1])["rows"]) == 1


def test_a_first_row_past_the_end_says_how_many_there_are(verifier, chats, capsys):
    assert main(["inspect-mask", chats, "--model", verifier, "--first-row", "12"]) == 2
    assert "first_row=12 is past the end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows in"),
        ([{"conversations": [{"role": "user", "content": "hi"}]}], "no assistant turn"),
        ([{"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}], "gave a training row"),
        ([{"input_ids": [5, 6, 7], "loss_mask": [1]}], "loss_mask"),
    ],
)
def test_unusable_data_is_one_clear_message_and_nothing_is_written(rows, message, verifier, tmp_path, capsys):
    data, output = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "data"
    assert main(["prepare-data", "--model", verifier, "--data", data, "--output", str(output)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not output.exists()
    assert list(tmp_path.iterdir()) == [Path(data)]


def test_a_missing_verifier_is_named(chats, tmp_path, capsys):
    assert main(["prepare-data", "--model", str(tmp_path / "nowhere"), "--data", chats]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_tokenizer_without_a_chat_template_is_named(base_verifier, chats, tmp_path, capsys):
    output = tmp_path / "data"
    assert main(["prepare-data", "--model", base_verifier, "--data", chats, "--output", str(output)]) == 2
    assert "chat template" in capsys.readouterr().err
    assert not output.exists()


def test_template_arguments_must_be_a_json_object(verifier, chats, capsys):
    args = ["prepare-data", "--model", verifier, "--data", chats, "--chat-template-kwargs", "[1]"]
    assert main(args) == 2
    assert "JSON object" in capsys.readouterr().err
