"""What a command prints when something is wrong, word for word."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import MambaConfig

from speculators import assets
from speculators.cli.app import main
from speculators.data_generation.preprocessing import load_tokenizer

VERIFIER = str(assets.tiny_verifier_path())
SIZE = json.loads(Path(VERIFIER, "config.json").read_text())["vocab_size"]


@dataclass(frozen=True)
class Place:
    """A directory with rows, prepared data, a finished run and other models."""

    root: Path

    def __truediv__(self, name: str) -> str:
        return str(self.root / name)

    def write_rows(self, name: str, *rows: dict) -> str:
        (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self / name

    def prepare(self, rows: str, output: str, *flags: str) -> list[str]:
        return ["prepare-data", "--verifier", VERIFIER, "--data", self / rows, "--output", self / output, *flags]

    def train(self, *flags: str) -> list[str]:
        place = ["--verifier", VERIFIER, "--data", self / "data", "--output", self / "run"]
        return ["train", *place, "--total-seq-len", "16", "--epochs", "1", "--no-parity-gate", *flags]

    def answer(self, *flags: str) -> list[str]:
        place = ["--verifier", VERIFIER, "--data", self / "chats.jsonl", "--output", self / "answers.jsonl"]
        return ["regenerate-responses", *place, *flags]


def tokens(num_prompt: int, num_answer: int) -> dict:
    mask = [0] * num_prompt + [1] * num_answer
    return {"input_ids": list(range(5, 5 + len(mask))), "loss_mask": mask}


def chat(question: str, answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("place"))
    place.write_rows("rows.jsonl", *[tokens(2, 10)] * 9, tokens(30, 10))
    place.write_rows("text.jsonl", {"text": "hi"})
    place.write_rows("lengths.jsonl", tokens(2, 4), tokens(2, 7), tokens(2, 10))
    place.write_rows("chats.jsonl", chat("hi", "well"))
    place.write_rows("long.jsonl", *[tokens(2, 400)] * 100)
    for name in ("plain", "my-eagle3-llama", "padded", "grown"):
        shutil.copytree(VERIFIER, place / name)
    config = Path(place / "padded", "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": SIZE + 64}))
    tokenizer = load_tokenizer(VERIFIER)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(len(tokenizer), SIZE + 1)])
    tokenizer.save_pretrained(place / "grown")
    place.write_rows("grown.jsonl", chat("hi", f"well <extra_{SIZE}>"))
    MambaConfig(hidden_size=16, num_hidden_layers=6, vocab_size=64).save_pretrained(place / "mamba")
    for command in (place.prepare("rows.jsonl", "data"), place.train(), place.answer("--max-tokens", "2")):
        assert main(command) == 0
    return place


WHOLE_MODEL = (
    "is a whole language model (LlamaForCausalLM), not a head that drafts from the verifier's states; say --method "
    "draft_model to draft with it, or name a drafter with --draft"
)
PADDED = (
    f"Target and draft model should have the same vocabulary size. Target model vocab_size={SIZE}. Draft model "
    f"vocab_size={SIZE + 64}. The tokenizer is the same, the tables are padded to different numbers of rows: set "
    "use_heterogeneous_vocab, which drafts the tokens that both have."
)
DRAFTS = ("--num-speculative-tokens", "2")

ERRORS = {
    # name -> command of a place, what follows "error: "
    "another recipe for a run": (
        lambda at: at.train("--lr", "0.5"),
        "the run in {0}/run was made with other settings:\n"
        "    lr:      0.001 -> 0.5\n"
        "    muon_lr: 0.001 -> 0.5\n"
        "continue with the settings before, or name another --output; --allow-changed-settings mixes both in one "
        "result",
    ),
    "other layers for a run": (
        lambda at: at.train("--target-layer-ids", "1", "5", "9"),
        "the run in {0}/run was made with other settings:\n"
        "    aux_layer_ids:                            [2, 6, 9] -> [1, 5, 9]\n"
        "    drafter.eagle_aux_hidden_state_layer_ids: [2, 6, 9] -> [1, 5, 9]\n"
        "    target_layer_ids:                         none -> [1, 5, 9]\n"
        "continue with the settings before, or name another --output; --allow-changed-settings mixes both in one "
        "result",
    ),
    "another recipe for answers": (
        lambda at: at.answer("--max-tokens", "3", "--resume"),
        "'{0}/answers.jsonl' was made with other settings:\n"
        "    sampling_params.max_tokens: 2 -> 3\n"
        "give the settings before to complete it, or choose another output",
    ),
    "another recipe for data": (
        lambda at: at.prepare("rows.jsonl", "data", "--seq-length", "8"),
        "'{0}/data' was made with other settings:\n"
        "    seq_length: 8192 -> 8\n"
        "pass overwrite (--overwrite) to replace it, or choose another output",
    ),
    "serve a language model as a head": (
        lambda at: ["serve", VERIFIER, "--draft", at / "plain", "--method", "eagle3", *DRAFTS, "--dry-run"],
        f"--method eagle3: {{0}}/plain {WHOLE_MODEL}",
    ),
    "serve one that is named like a head": (
        lambda at: ["serve", VERIFIER, "--draft", at / "my-eagle3-llama", *DRAFTS, "--dry-run"],
        f"--method eagle3 (guessed from 'eagle3' in its name): {{0}}/my-eagle3-llama {WHOLE_MODEL}",
    ),
    "serve by a misspelt method": (
        lambda at: ["serve", VERIFIER, "--method", "eagl3"],
        "--method eagl3 is unknown; vLLM has ngram, ngram_gpu, suffix, custom_class, draft_model, "
        "extract_hidden_states, eagle, eagle3, dflash, dspark, mtp. Did you mean 'eagle3'?",
    ),
    "a tokenizer larger than the embedding": (
        lambda at: ["prepare-data", "--verifier", at / "grown", "--data", at / "grown.jsonl", "--output", at / "g"],
        f"the tokenizer writes token {SIZE} ('<extra_{SIZE}>') and has {SIZE + 1} tokens, but the verifier's embedding "
        f"has {SIZE} rows: use the tokenizer that belongs to this verifier, or give the verifier rows for it "
        "(resize_token_embeddings, then save)",
    ),
    "a verifier without attention": (
        lambda at: ["train", "--verifier", at / "mamba", "--data", at / "data", "--output", at / "m"],
        "--verifier {0}/mamba is a mamba and has no attention heads, which the drafter's layers would follow: give "
        "their shape with --draft-config, the config.json of a llama or qwen3 decoder with hidden_size 16",
    ),
    "a method guessed from a name": (
        lambda at: ["generate", "--verifier", VERIFIER, "--prompt", "x", "--method", at / "my-eagle3-llama", *DRAFTS],
        "method='eagle3' needs a speculators checkpoint and '{0}/my-eagle3-llama' is not one (no config.json with "
        "speculators_model_type); convert it with `speculators convert`, or use one of ['custom_class', 'draft_model', "
        "'early_exit', 'ngram', 'ngram_gpu', 'suffix'] (method 'eagle3' was guessed from 'eagle3' in its name; "
        '{{"method": "draft_model", "model": "{0}/my-eagle3-llama"}} says that it is a whole language model)',
    ),
    "a retired key": (
        lambda at: generate({"method": "ngram", "num_speculative_tokens": 2, "speculative_model": "m"}),
        "speculative_model is retired: say model",
    ),
    "an unknown key": (
        lambda at: generate({"method": "ngram", "num_speculative_token": 2}),
        "num_speculative_token: Extra inputs are not permitted. Did you mean 'num_speculative_tokens'?",
    ),
    "padded tables, generate": (
        lambda at: generate({"method": "draft_model", "model": at / "padded", "num_speculative_tokens": 2}),
        PADDED,
    ),
    "padded tables, serve": (
        lambda at: ["serve", VERIFIER, "--draft", at / "padded", "--method", "draft_model", *DRAFTS, "--dry-run"],
        PADDED,
    ),
    "rendered text": (
        lambda at: at.prepare("text.jsonl", "t"),
        "none of the 1 rows of {0}/text.jsonl gave a training row: 1 x no 'conversations' (or input_ids + loss_mask) "
        "(the first: file {0}/text.jsonl line 1, id None: no 'conversations' (or input_ids + loss_mask): rendered "
        "text does not say where the verifier's answer begins. Tokenise it and give input_ids with a loss_mask (0 "
        "over the prompt; over the first token alone to train on the whole text), or take it as a prompt: "
        "regenerate-responses --prompt-field text)",
    ),
}


def generate(method: dict) -> list[str]:
    return ["generate", "--verifier", VERIFIER, "--prompt", "x", "--method", json.dumps(method)]


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_a_command(name, place, capsys):
    command, said = ERRORS[name]
    assert main(command(place)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err[printed.err.index("error: ") :] == f"error: {said.format(place.root)}\n"


LINES = {
    # name -> command of a place, a line that is said
    "rows that lose their answer": (
        lambda at: at.train(),
        "train split: 1 of 9 rows has no trained token within 16 and is left out; 10 of 90 trained tokens are cut "
        "(--total-seq-len)",
    ),
    "a finished run": (lambda at: at.train(), "finished (8 of 8 steps); nothing to do"),
    "rows that are cut": (
        lambda at: at.prepare("lengths.jsonl", "cut", "--seq-length", "8", "--overwrite"),
        "2 rows are cut to the longest row (seq_length) and lose 5 trained tokens",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_a_command(name, place, capsys, caplog):
    command, line = LINES[name]
    assert main(command(place)) == 0
    assert line in [*capsys.readouterr().err.splitlines(), *caplog.messages]  # pytest takes what is logged


def test_a_reader_that_leaves_ends_a_verb_without_a_word(place):
    command = ["inspect-mask", place / "long.jsonl", "--verifier", VERIFIER, "--num-rows", "100"]
    with subprocess.Popen(
        [sys.executable, "-m", "speculators", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as writer:
        assert writer.stdout.readline() != ""  # as `head` does; what follows is longer than a pipe holds
        writer.stdout.close()
        assert writer.stderr.read() == ""
    assert writer.returncode == 1
