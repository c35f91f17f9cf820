"""A verifier of a few thousand parameters with a chat template, on disk, as the command line wants it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from speculators import assets
from speculators.cli import train
from speculators.cli.app import main

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(path: Path, chat_template: str | None) -> int:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=chat_template
    ).save_pretrained(path)
    return len(vocab)


def save_verifier(path: Path, chat_template: str | None = CHATML, hidden_size: int = 32) -> str:
    vocab_size = save_tokenizer(path, chat_template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="session")
def base_verifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    return save_verifier(tmp_path_factory.mktemp("base_verifier"), chat_template=None)


@pytest.fixture(scope="session")
def wide_verifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_verifier(tmp_path_factory.mktemp("wide_verifier"), hidden_size=64)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {"conversations": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} it is"}]}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Terminal:
    """A terminal of 80 columns and 24 rows in the place of stdout and stderr, while a command runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def run(self, *args: str) -> tuple[int, str]:
        """Returns the exit code and all that was shown, without colours and movements of the cursor."""
        code, shown = self.run_raw(*args)
        return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown)

    def run_raw(self, *args: str) -> tuple[int, str]:
        pieces: list[bytes] = []
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        reader = threading.Thread(target=self.read, args=(master, pieces))
        reader.start()
        with self.monkeypatch.context() as patch, os.fdopen(slave, "w", buffering=1, encoding="utf-8") as stream:
            for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            code = main(list(args))
        reader.join()
        os.close(master)
        return code, b"".join(pieces).decode()

    @staticmethod
    def read(master: int, pieces: list[bytes]) -> None:
        while True:
            try:
                pieces.append(os.read(master, 65536))
            except OSError:  # the other end was closed
                return


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


@pytest.fixture
def toy_assets(verifier, chats, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(assets, "tiny_verifier_path", lambda: Path(verifier))
    held_out = tmp_path_factory.mktemp("held_out") / "heldout.jsonl"
    rows = [{"prompt": f"held {number}"} for number in range(3)] + [{"prompt": "say 0"}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(assets, "prompts_path", lambda split: Path(chats) if split == "train" else held_out)
    small = {"budget": "answers=10,epochs=1,prompts=3", "num_speculative_tokens": 4, "max_tokens": 12}
    monkeypatch.setattr(train, "QUICKSTART", {**small, "train_flags": "--target-layer-ids 1 3 5"})
