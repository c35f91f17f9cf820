"""Opens an engine by names in place of loaded models, and answers questions in place of token ids."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any, Literal, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from speculators.decoding.config import SpeculativeConfig
from speculators.decoding.method import PLAIN, Drafter, parse_methods
from speculators.decoding.request import NonFiniteScoresError, RequestOutput, StreamEvent
from speculators.decoding.settings import SamplingParams
from speculators.decoding.target import VerifierSource, open_target
from speculators.interfaces import Proposer, Verifier
from speculators.utils.chat_template import Tool, chat_prompt
from speculators.utils.names import refuse_unknown

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`"""


class ChatEngine(ABC):
    """The part of `Engine` that opens models by name and answers chats; the subclass decodes."""

    tokenizer: PreTrainedTokenizerBase | None

    @abstractmethod
    def __init__(
        self,
        verifier: PreTrainedModel | Verifier,
        speculative_config: SpeculativeConfig | dict[str, Any] | Proposer | None = None,
        **options: Any,
    ) -> None: ...

    @abstractmethod
    def generate(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[RequestOutput]: ...

    @abstractmethod
    def stream(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> Iterator[StreamEvent]: ...

    @classmethod
    def from_pretrained(
        cls,
        verifier: VerifierSource,
        drafter: Drafter | SpeculativeConfig | Proposer | None = None,
        *,
        num_speculative_tokens: int | None = None,
        other_methods: Sequence[Drafter] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """An engine from names: `Engine.from_pretrained("Qwen/Qwen3-8B", drafter="run/checkpoint_best")`.

        `verifier`: hub id, directory or loaded model; `tokenizer`, `dtype`, `device`: see `open_target`.
        `drafter`: a speculator's directory or the result of its training, a method's name ("ngram"), vLLM's
        speculative config as a dict, JSON or `SpeculativeConfig`, a ready `Proposer`; None or "none" decodes plainly.
        `other_methods`: further drafters by name, for requests that choose one by `SamplingParams.method`; they are
        called as in the results table ("eagle3", "ngram", a second one "eagle3-2").
        `options`: further arguments of `Engine` (`max_batch_size`, `max_length`, ...).
        Raises `ValueError` for a verifier or drafter that is not there, for two that do not fit each other, and for an
        option that `Engine` does not have.
        """
        refuse_unknown("option of Engine", options, option_names(cls))
        target = open_target(
            verifier, tokenizer=tokenizer, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        config: dict[str, Any] | SpeculativeConfig | Proposer | None
        named = drafter if isinstance(drafter, str | os.PathLike | Mapping) else PLAIN
        first, *others = parse_methods([named, *other_methods], num_speculative_tokens)
        if others:
            options["other_methods"] = {method.name: method.speculative_config for method in others}
        if isinstance(drafter, str | os.PathLike | Mapping):
            config = first.speculative_config
            num_speculative_tokens = None  # it is in the config
        else:
            config = drafter
        return cls(
            target.model, config, tokenizer=target.tokenizer, num_speculative_tokens=num_speculative_tokens, **options
        )

    @overload
    def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: Literal[False] = False,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: Literal[True],
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Iterator[str]: ...

    def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: bool = False,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> RequestOutput | Iterator[str]:
        """Answers one question, or a list of messages, through the verifier's chat template.

        `sampling`: the fields of `SamplingParams` (`max_tokens`, `temperature`, ...). `stream=True` yields the text in
        pieces as it becomes readable. `tools` and `chat_template_kwargs` (`enable_thinking`, ...) go to the template.
        Raises `ValueError` without a tokenizer or template, and for settings that `SamplingParams` does not have.
        """
        if self.tokenizer is None:
            raise ValueError("a chat is text but the engine has no tokenizer; pass Engine(..., tokenizer=...)")
        prompt = chat_prompt(self.tokenizer, question, tools=tools, template_kwargs=chat_template_kwargs)
        params = sampling_params(**sampling)
        if stream and params.n > 1:
            raise ValueError(f"n={params.n}: the pieces of several samples would mix; use engine.stream, or n=1")
        if stream:
            return pieces(self.stream([prompt], params))
        return self.generate([prompt], params)[0]


def option_names(engine_class: type[ChatEngine]) -> list[str]:
    """Lists the options that only the constructor takes: `max_batch_size`, `max_length`, ..."""
    named_here = {"speculative_config", *signature(ChatEngine.from_pretrained).parameters}
    return sorted(signature(engine_class).parameters.keys() - named_here)


def pieces(events: Iterator[StreamEvent]) -> Iterator[str]:
    """The texts of one request's events. Raises `NonFiniteScoresError` where the verifier's scores end."""
    for event in events:
        if event.text:
            yield event.text
        if event.error is not None:
            raise NonFiniteScoresError(event.error)


def sampling_params(**settings: Any) -> SamplingParams:
    refuse_unknown("sampling setting", settings, (field.name for field in fields(SamplingParams)))
    return SamplingParams(**settings)


def refuse_name(verifier: object) -> None:
    """`Engine("dir")`: a name where a loaded model belongs."""
    if isinstance(verifier, str | os.PathLike):
        raise ValueError(
            f"Engine takes a loaded verifier, not the name {os.fspath(verifier)!r}; Engine.from_pretrained loads it, "
            "with its tokenizer"
        )


def refuse_other_than_variables(template_kwargs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for arguments, from a stranger, that are the tokenizer's own: another template could run for
    ever, and `tokenize` would change what is returned."""
    for name in signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() & template_kwargs.keys():
        raise ValueError(f"chat_template_kwargs: {name!r} is no variable of a template, and not for a client to say")


def openai_messages(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Messages of OpenAI's interface as the chat template takes them: texts for parts, objects for the arguments of
    tool calls. Raises ValueError for parts that are no text, and for calls that the template would leave out."""
    taken = []
    for message in messages:
        values = {**message, "content": text_of(message)}
        if calls := values.pop("tool_calls", None):
            if "tool_calls" not in template:
                raise ValueError("messages have tool_calls, which this model's chat template does not render")
            values["tool_calls"] = [parsed_call(call) for call in calls]
        taken.append(values)
    return taken


def text_of(message: Message) -> str:
    content = message.get("content")
    if content is None and message["role"] in ("user", "system"):
        raise ValueError(f"a message of the role {message['role']!r} needs content")
    if not isinstance(content, list):
        return content or ""  # of an assistant that called tools
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type")
            raise ValueError(f"a content part of type {kind!r}: only {{'type': 'text', 'text': ...}} is decoded")
    return "\n".join(part["text"] for part in content)


def parsed_call(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object; clients send them as JSON text. Raises ValueError for what is no
    call of a function."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"tool_calls: {call!r} is no call of a function: {{'function': {{'name', 'arguments'}}}}")
    given = function.get("arguments") or {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"tool_calls: the arguments {str(given)[:200]!r} are no JSON object")
    return {**call, "function": {**function, "arguments": arguments}}
