"""Renders chat messages as token ids with a tokenizer's own template, as the verifier's serving engine would."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING_KEYS = ("reasoning_content", "thinking")


class ChatTemplateError(ValueError):
    """The template refuses these messages, e.g. because roles do not alternate."""


class ChatRenderer:
    """Renders messages as token ids. Raises `ValueError` for a tokenizer without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template_of(tokenizer)
        self.template_kwargs = dict(template_kwargs or {})

    @property
    def marks_generations(self) -> bool:
        """Whether the template itself marks the assistant's text with {% generation %} blocks."""
        return GENERATION_BLOCK.search(self.template) is not None

    def token_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool
    ) -> list[int]:
        """Renders the messages. Raises `ChatTemplateError` when the template refuses them."""
        rendered = self.render(messages, tools, add_generation_prompt=add_generation_prompt, tokenize=False)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def generation_mask(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Returns the mask of the template's own {% generation %} blocks, one entry per token of the conversation."""
        encoded = self.render(
            messages,
            tools,
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["assistant_masks"])

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, **options: Any) -> Any:
        renamed = [rename_reasoning(message, self.template) for message in messages]
        given = None if tools is None else list(tools)
        try:
            return self.tokenizer.apply_chat_template(renamed, tools=given, **options, **self.template_kwargs)
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatTemplateError(f"chat template refuses it: {str(error)[:100]}") from error


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Renders one user turn, or a list of messages (`{"role": ..., "content": ...}`), up to where the verifier answers.

    Raises `ValueError` for a tokenizer without a chat template and for anything but text or a list of messages, and
    `ChatTemplateError` (a `ValueError`) for messages that the template refuses.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError(
            "a chat is one text, or a list of messages such as "
            f'[{{"role": "user", "content": "What is the capital of France?"}}]; got {question!r:.80}'
        )
    return ChatRenderer(tokenizer, template_kwargs).token_ids(messages, tools, add_generation_prompt=True)


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the template's text. Raises `ValueError` for a tokenizer without a template."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        name = getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer of {name!r} has no chat template, so conversations cannot be rendered; use the chat "
            "(instruct) version of the model, put a chat_template.jinja into its directory, or give pre-tokenised "
            "rows (input_ids and loss_mask)"
        )
    return str(template)


def rename_reasoning(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """Renames `thinking` or `reasoning_content` to the one that the template reads; it would ignore the other."""
    for given, other in (REASONING_KEYS, REASONING_KEYS[::-1]):
        if given in message and other not in message and given not in template and other in template:
            renamed = {key: value for key, value in message.items() if key != given}
            return {**renamed, other: message[given]}
    return dict(message)
