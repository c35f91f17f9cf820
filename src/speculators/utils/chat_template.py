"""Renders chat messages as token ids with a tokenizer's own template, as the verifier's serving engine would."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of the same thing: of older servers, of newer ones, and of gpt-oss."""
READS_CLOCK = re.compile(r"\bstrftime_now\b")
CLOCK_CALL = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
TEMPLATE_DATE = "template_date"
"""Key among the template's arguments: the date (2026-01-31) of templates that ask for today's."""
Tool = dict[str, Any] | Callable[..., Any]  # JSON schema, or a documented Python function
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class ChatTemplateError(ValueError):
    """The template refuses these messages, e.g. because roles do not alternate."""


class ChatRenderer:
    """Renders messages as token ids. Raises `ValueError` for a tokenizer without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template_of(tokenizer)
        self.template_kwargs = dict(template_kwargs or {})
        date = self.template_kwargs.pop(TEMPLATE_DATE, None)
        self.date = read_date(date) if READS_CLOCK.search(self.template) else None
        """What a template that asks for the time is told, so that a run over midnight renders one date."""
        if (today := self.date) is not None:
            dated = CLOCK_CALL.sub(lambda call: repr(today.strftime(call[2])), self.template)
            self.template_kwargs["chat_template"] = dated
        self.tokens_after_answer: dict[str, int | None] = {}

    @property
    def marks_generations(self) -> bool:
        """Whether the template itself marks the assistant's text with {% generation %} blocks."""
        return GENERATION_BLOCK.search(self.template) is not None

    def token_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None = None, *, add_generation_prompt: bool
    ) -> list[int]:
        """Renders the messages as tokens. Raises `ChatTemplateError` when the template refuses them."""
        return self.encode(self.text(messages, tools, add_generation_prompt=add_generation_prompt))

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None = None, *, add_generation_prompt: bool
    ) -> str:
        """Renders the messages as text. Raises `ChatTemplateError` when the template refuses them."""
        return str(self.render(messages, tools, add_generation_prompt=add_generation_prompt, tokenize=False))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def encode_from(self, text: str, start: int) -> list[int]:
        """Returns the tokens of `text[start:]` as they stand in the whole text, where the tokenizer can say so: some
        put a space in front of a text."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = encoded["offset_mapping"]
            if all(end <= start or begin >= start for begin, end in spans):
                return [token for token, (begin, _) in zip(encoded["input_ids"], spans, strict=True) if begin >= start]
        return self.encode(text[start:])

    def answer_message(self, token_ids: Sequence[int], stop: str = "") -> dict[str, Any]:
        """Returns the message that a server would put back into the conversation for these generated tokens, which end
        with the stop string `stop`, if it is given."""
        num_text = len(token_ids)
        while num_text and token_ids[num_text - 1] in self.end_token_ids:
            num_text -= 1
        text = self.decode(token_ids[:num_text])
        message = parse_answer(text[: text.rfind(stop)] if stop and stop in text else text, self.template)
        return {**message, "content": self.without_special_tokens(message["content"])}

    def without_special_tokens(self, text: str) -> str:
        special = sorted(content.content for content in self.tokenizer.added_tokens_decoder.values() if content.special)
        return re.sub("|".join(map(re.escape, special)), "", text) if special else text

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """The special tokens that may end an answer: all but those that close a part of it (`</think>`)."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token for token, content in added if content.special} | set(self.tokenizer.all_special_ids)
        return frozenset(token for token in special if not self.decode([token]).startswith("</"))

    def token_after_answer(self, role: str) -> int | None:
        """Returns the special token that the template renders right behind an answer when a turn of `role` follows."""
        if role not in self.tokens_after_answer:
            contents = ("ask", "answer", "follow")
            roles = ("user", "assistant", role)
            try:
                text = self.text(
                    [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)],
                    add_generation_prompt=False,
                )
                first = self.encode(text.rpartition("answer")[2].partition("follow")[0])[:1]
            except ChatTemplateError:
                first = []
            is_end = bool(first) and first[0] in self.end_token_ids
            self.tokens_after_answer[role] = first[0] if is_end else None
        return self.tokens_after_answer[role]

    def generation_mask(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None = None) -> list[int]:
        """Returns the mask of the template's own {% generation %} blocks, one entry per token of the conversation."""
        wanted = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self.render(messages, tools, add_generation_prompt=False, **wanted)
        return list(encoded["assistant_masks"])

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None, **options: Any) -> Any:
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
    tools: Sequence[Tool] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Renders one user turn, or a list of messages (`{"role": ..., "content": ...}`), up to where the verifier answers.

    Raises `ValueError` for a tokenizer without a chat template and for anything but text or a list of messages, and
    `ChatTemplateError` (a `ValueError`) for messages that the template refuses.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    is_list = isinstance(messages, Sequence) and len(messages) > 0
    if not is_list or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError(
            "a chat is one text, or a list of messages such as "
            f'[{{"role": "user", "content": "What is the capital of France?"}}]; got {question!r:.80}'
        )
    return ChatRenderer(tokenizer, template_kwargs).token_ids(messages, tools, add_generation_prompt=True)


def parse_answer(text: str, template: str) -> dict[str, Any]:
    """Parses generated text by the template's family into `content`, `reasoning_content` and `tool_calls`.

    Fed back to the template, the message is rendered as the template renders earlier answers; as mere content, thoughts
    and calls would stay in the conversation in a form that no server puts there. What cannot be parsed is content.
    """
    if "<|channel|>" in template:
        reasoning, content, calls = parse_harmony(text)
    else:
        reasoning, content = split_thought(text) if "</think>" in template else ("", text)
        content, calls = split_calls(content, template)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.get("id") or call_id(i, call), "type": "function", "function": call["function"]}
            for i, call in enumerate(calls)
        ]
    return message


def split_thought(text: str) -> tuple[str, str]:
    """Returns (reasoning, content). The prompt may have opened the block, and the length limit may have cut it."""
    before, end, after = text.partition("</think>")
    if end:
        return before.strip().removeprefix("<think>").strip("\n"), after.lstrip("\n")
    if before.lstrip().startswith("<think>"):
        return before.strip().removeprefix("<think>").strip("\n"), ""
    return "", text


def parse_harmony(text: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Returns (reasoning, content, calls) of gpt-oss's channels.

    ` <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`
    """
    reasoning, content, calls = [], [], []
    for part in text.split("<|start|>assistant"):
        header, is_message, body = part.partition("<|message|>")
        body = re.split(r"<\|(?:end|return|call)\|>", body)[0]
        recipient = re.search(r"to=functions\.([\w.-]+)", header)
        arguments = parsed_object(body) if recipient else None
        if recipient and arguments is not None:
            calls.append({"function": {"name": recipient[1], "arguments": arguments}})
        elif "analysis" in header:
            reasoning.append(body)
        else:
            content.append(body if is_message else header)
    return "\n".join(reasoning), "".join(content), calls


def split_calls(text: str, template: str) -> tuple[str, list[dict[str, Any]]]:
    """Returns the text without calls in the template's form (GLM, Hermes, Mistral, Command-R, Llama), and the calls."""
    calls, rest = list[Any](), text
    if "<arg_key>" in template:
        calls = [parsed_glm_call(body) for body in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)]
        rest = text.partition("<tool_call>")[0].rstrip("\n")
    elif "<tool_call>" in template:
        calls = [parsed_object(body) for body in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)]
        rest = text.partition("<tool_call>")[0].rstrip("\n")
    elif "[TOOL_CALLS]" in template or "tool_name" in template:
        rest, _, body = text.partition("[TOOL_CALLS]" if "[TOOL_CALLS]" in template else "Action:")
        found = parsed_json(body.strip().removeprefix("```json").removesuffix("```"))
        calls = found if isinstance(found, list) else []
    elif '"parameters"' in template and text.lstrip().startswith("{"):
        calls, rest = [parsed_object(text)], ""
    named = [call for call in calls if isinstance(call, Mapping) and isinstance(tool_name(call), str)]
    if not named or len(named) != len(calls):
        return text, []
    functions = ({"name": tool_name(c), "arguments": c.get("arguments", c.get("parameters", {}))} for c in named)
    return rest, [{"id": call.get("id"), "function": function} for call, function in zip(named, functions, strict=True)]


def tool_name(call: Mapping[str, Any]) -> Any:
    return call.get("name", call.get("tool_name"))


def parsed_glm_call(body: str) -> dict[str, Any]:
    """Parses `name<arg_key>a</arg_key><arg_value>2</arg_value>...`: values are JSON, or else the text itself."""
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, re.DOTALL)
    arguments = {key.strip(): text if (value := parsed_json(text)) is None else value for key, text in pairs}
    return {"name": body.partition("<arg_key>")[0].strip(), "arguments": arguments}


def parsed_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def parsed_object(text: str) -> dict[str, Any] | None:
    value = parsed_json(text)
    return value if isinstance(value, dict) else None


def call_id(index: int, call: Mapping[str, Any]) -> str:
    """Makes the id of a call that has none: nine letters and digits, as Mistral's templates demand."""
    return hashlib.sha256(json.dumps([index, call], sort_keys=True).encode()).hexdigest()[:9]


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


def read_date(given: str | None) -> datetime:
    """Parses the date that a template is told; None: today's."""
    try:
        day = datetime.now() if given is None else datetime.strptime(given, "%Y-%m-%d")
    except (ValueError, TypeError):
        raise ValueError(f"{TEMPLATE_DATE}={given!r} is not a date like '2026-01-31'") from None
    return day.replace(hour=0, minute=0, second=0, microsecond=0)


def rename_reasoning(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """Puts a message's reasoning under the name that the template reads; it would ignore the others.

    Takes it from a <think> block that begins the content, too, for templates that read it apart.
    """
    given = [key for key in REASONING_KEYS if key in message]
    read = next((key for key in REASONING_KEYS if reads(template, key)), None)
    if read is None or read in given:
        return dict(message)
    if given:
        return {**{key: value for key, value in message.items() if key not in given}, read: message[given[0]]}
    content = message.get("content")
    thought = THOUGHT.match(content.lstrip()) if isinstance(content, str) and message["role"] == "assistant" else None
    if thought is None:
        return dict(message)
    return {**message, "content": thought.string[thought.end() :].lstrip("\n"), read: thought[1].strip("\n")}


def reads(template: str, key: str) -> bool:
    """Says whether a template reads this key of a message (`m.key`, `m['key']`, `'key' in m`)."""
    return re.search(rf"""[.'"]{key}\b""", template) is not None
