"""The lines of docs/python.md and docs/generate.md run as they are written, on the embedded verifier."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from speculators import SamplingParams, assets

DOCS = Path(__file__).parents[2] / "docs"
TINY = {
    '"Qwen/Qwen3-8B"': f'"{assets.tiny_verifier_path()}"',
    '"MODEL"': f'"{assets.tiny_verifier_path()}"',
    '"run/checkpoint_best"': '"ngram"',
    'dtype="bfloat16", device="cuda"': 'dtype="float32", device="cpu"',
    "draft_vocab_size=32_000": "draft_vocab_size=256, max_steps=2, total_seq_len=256",
    "epochs=4": "epochs=1",
    'budget="20m"': 'budget="answers=4,epochs=1,prompts=1", max_tokens=8, num_speculative_tokens=2, '
    'train_flags="--max-steps 1 --total-seq-len 256 --draft-vocab-size 256 --no-parity-gate"',
    "run.checkpoint])": "run.checkpoint], num_prompts=2, max_tokens=16, num_warmup=0)",
    "max_tokens=64": "max_tokens=16",
}
"""What the documents say -> what runs here: a verifier that is there, and sizes for a test."""


def code_of(document: str, line: int | None = None) -> list[str]:
    """The Python in a document: its indented blocks."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (DOCS / document).read_text(), re.MULTILINE)
    code = [textwrap.dedent(block).strip() for block in blocks]
    return [block for block in code if is_python(block)]


def is_python(block: str) -> bool:
    try:
        ast.parse(block)
    except SyntaxError:
        return False
    return any(word in block for word in ("speculators", "engine", "sp."))


def as_it_runs(block: str) -> str:
    for said, runs in TINY.items():
        block = block.replace(said, runs)
    return block


@pytest.fixture
def chats(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = assets.prompts_path("train").read_text().splitlines()[:60]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "heldout.jsonl").write_text(assets.prompts_path("heldout").read_text())
    return tmp_path


def test_the_lines_of_the_document_run_and_are_silent(chats):
    """In one process, as someone types them: nothing but what they print is printed, and no bar is drawn."""
    [main, whole, loaded, chat] = code_of("python.md")
    check = (
        "assert reply.token_ids and reply.finish_reason in ('stop', 'length')\n"
        "assert 1 <= reply.stats.acceptance_length <= 5\n"
        "assert [row.method for row in table.rows] == ['none', 'ngram', 'eagle3'] and table.lossless\n"
        "assert run.parity.passed and 'Trained' in str(run) and '<pre' in table._repr_html_()\n"
        "assert sp.verify(run, num_prompts=1, max_tokens=8).passed\n"
    )
    script = "\n".join([as_it_runs(main), check, as_it_runs(whole), as_it_runs(loaded), as_it_runs(chat)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=chats)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\d+%|it/s|━|█|Loading", done.stderr), done.stderr
    assert "eagle3" in done.stdout and "acceptance" in done.stdout


def test_the_lines_of_the_guide_to_generating_run(chats, capsys):
    chat, per_request = code_of("generate.md")
    names: dict = {}
    exec(compile(as_it_runs(chat), "docs/generate.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].rsplit(" ", 1)[0].strip()  # the text before the acceptance length
    assert float(printed[0].rsplit(" ", 1)[1]) >= 1 if len(printed) == 1 else printed

    exec(compile(as_it_runs(per_request), "docs/generate.md", "exec"), names)
    outputs, engine = names["outputs"], names["engine"]
    assert outputs[0].stats.num_drafted == 0
    plain = engine.generate(["The sum of", "def zip(", "A list is"], SamplingParams(num_speculative_tokens=0))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
