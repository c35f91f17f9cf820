"""A byte-level BPE tokenizer for the verifier, with a ChatML-like chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, START, END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""Each message renders the same whatever follows it, so an earlier prompt is always a prefix of a longer one."""


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    # Digits stand alone: at this vocabulary size, merged numbers would take the place of words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def render(tokenizer: PreTrainedTokenizerFast, document: str | list[dict[str, str]]) -> str:
    """The text of one training document: a chat as the template shows it, anything else closed by end-of-text."""
    if isinstance(document, str):
        return document + PAD
    return tokenizer.apply_chat_template(document, tokenize=False)


def first_prompts(tokenizer: PreTrainedTokenizerFast, documents: list[str | list[dict[str, str]]]) -> list[str]:
    """The text of each conversation up to where its first answer begins."""
    chats = [document for document in documents if not isinstance(document, str)]
    openings = [chat[: [message["role"] for message in chat].index("assistant")] for chat in chats]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in openings]


def tokenizer_texts(documents: list[str | list[dict[str, str]]]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            yield from (message["content"] for message in document)


def load(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)
