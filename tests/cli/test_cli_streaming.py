"""`generate` on a terminal: the answer appears while it is decoded, once, and `--mark` tells who wrote each token."""

from __future__ import annotations

from collections import Counter

import pytest

from speculators import assets
from speculators.cli import app
from speculators.decoding import Engine

PROMPTS = ("import os\nimport os\nimport", "def add(a, b):\n    return a + b\n\ndef")
WORDS = ("--raw", "--max-tokens", "24", "--method", "ngram", "-k", "3")


def asked(*prompts: str) -> list[str]:
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    return ["generate", "--verifier", str(assets.tiny_verifier_path()), *given, *WORDS]


@pytest.mark.parametrize("flags", [[], ["--mark"]])
def test_every_answer_stands_on_the_terminal_once_in_the_order_of_the_prompts(terminal, flags):
    expected = app.perform(asked(*PROMPTS)).record["outputs"]
    code, shown = terminal.run(*asked(*PROMPTS), *flags)
    assert code == 0
    screen = "".join(f"{prompt}\n{output['text']}\n" for prompt, output in zip(PROMPTS, expected, strict=True))
    following = "marks: " if flags else "prompt 1"  # the title of a table
    assert screen in shown
    assert shown.partition(screen)[2].lstrip().startswith(following)
    assert not any(output["text"] in shown.partition(screen)[2] for output in expected)


def test_marks_count_the_drafts_that_were_accepted(terminal):
    (output,) = app.perform([*asked(PROMPTS[0]), "--mark"]).record["outputs"]
    written_by = Counter(output["written_by"])
    num_drafts = sum(count for who, count in written_by.items() if who.startswith("draft "))
    assert len(output["written_by"]) == len(output["token_ids"]) == 24
    assert 24 - num_drafts in (output["num_rounds"], output["num_rounds"] + 1)  # the limit may cut the last round
    assert num_drafts > written_by["draft 1"] >= written_by["draft 2"] > 0
    raw = terminal.run_raw(*asked(PROMPTS[0]), "--mark")[1]
    underlined = raw[: raw.index("marks: ")].count("\x1b[4;")
    assert underlined > 0
    assert "\x1b[4;" not in terminal.run_raw(*asked(PROMPTS[0]))[1]


def test_what_was_decoded_before_an_interruption_is_on_the_terminal(terminal, monkeypatch):
    whole, seen = Engine.generate, []

    def interrupted(self, *args, on_token, **kwargs):
        def follow(event):
            seen.append(event.text)
            on_token(event)
            if len(seen) == 5:
                raise KeyboardInterrupt

        return whole(self, *args, on_token=follow, **kwargs)

    monkeypatch.setattr(Engine, "generate", interrupted)
    code, shown = terminal.run(*asked(PROMPTS[0]))
    assert code == 130
    assert f"{PROMPTS[0]}\n{''.join(seen)}\n" in shown and len("".join(seen)) > 5
