"""What the local server takes: its own settings, and the bodies of requests. Imports nothing heavy.

Names and meanings are those of OpenAI's interface and of vLLM's additions to it. A field that is not here is refused:
an answer that leaves out what was asked for is no answer. Fields that change no text (`user`, `metadata`, ...) are
ignored.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from speculators.decoding.settings import SERVED_BIAS, SamplingParams, is_count, refuse_fewer
from speculators.utils.readable import ReadableModel

NEEDS_EXTRA = "serve-local needs FastAPI and uvicorn: pip install 'speculators[serve-local]'"
IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "prediction", "parallel_tool_calls", "request_id", "priority"),
}
"""Fields that change no text."""
WITHOUT_EFFECT = {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "modalities": ["text"]}
"""Values that ask for what is done anyway."""
REFUSED = {
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), "tools are not called"),
    **dict.fromkeys(("audio", "modalities", "moderation", "web_search_options"), "answers are the model's text alone"),
    **dict.fromkeys(("reasoning_effort", "verbosity"), "say it to the chat template, in chat_template_kwargs"),
}
"""Fields of OpenAI's interface that are not followed here."""
LOCAL_NAME = re.compile(r"(https?://)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.ASCII | re.IGNORECASE)
"""This machine, as the headers Host and Origin say it."""
ModelBody = TypeVar("ModelBody", bound=ReadableModel)
MOST_TEXTS = 64
"""Stop strings, or bad words, of one request: each costs time at every token of everybody."""
MOST_LOGPROBS = 20
"""Alternatives per token, as in OpenAI's and vLLM's server."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a local server listens, and what it takes in. Raises ValueError for an address that others reach, where no
    key is asked of them."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    api_key: str | None = None
    model_name: str | None = None
    """What clients call the model; None: the verifier's name."""
    max_waiting: int = 64
    """Samples that may wait for a row of the batch; further ones are answered 503."""
    max_body_bytes: int = 4 * 2**20
    max_tokens: int | None = None
    """Longest answer that a request may ask for; None: as long as the engine decodes."""
    shutdown_s: int = 30
    """How long answers under way may take to end when the server is stopped."""
    playground: bool = False
    """Also serve the page that shows who wrote each token."""

    def __post_init__(self) -> None:
        refuse_fewer(self, max_waiting=0, max_body_bytes=1, max_tokens=1, shutdown_s=1)
        if not is_count(self.port, 0) or self.port > 65535:
            raise ValueError(f"port={self.port!r} must be in 0..65535 (0: any free one)")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise ValueError("api_key must be text in ASCII that is not blank: it travels in a header")
        if not self.is_loopback and self.api_key is None:
            raise ValueError(
                f"host={self.host!r} lets other machines in, and no key is asked of them: give an api_key, or listen "
                "on 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class ApiError(Exception):
    """An answer in OpenAI's form for errors."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})

    TYPES: ClassVar[dict[int, str]] = {
        **dict.fromkeys((400, 405, 413, 415), "invalid_request_error"),
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        503: "overloaded_error",
    }

    @property
    def body(self) -> dict[str, Any]:
        kind = self.TYPES.get(self.status, "internal_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def refuse_stranger(config: ServeConfig, headers: Mapping[str, str]) -> None:
    """Asks for the key; without one, for a name of this machine: a page of another site has its own in the header.
    Raises `ApiError`."""
    if config.api_key is not None:
        given = headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {config.api_key}".encode()):
            raise ApiError(401, "a wrong key, or none: send the header Authorization: Bearer KEY")
        return
    for header in ("host", "origin"):
        value = headers.get(header)
        if value and LOCAL_NAME.fullmatch(value) is None:
            raise ApiError(403, f"{header}: {value!r} is no name of this machine; call it 127.0.0.1")


def parsed(kind: type[ModelBody], values: Any) -> ModelBody:
    """Raises `ApiError` that names each wrong field with its rule."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]["loc"]
        named = re.match(r"[a-z_]+", str(error))  # rules about several fields begin with the name of one
        raise ApiError(400, str(error), str(first[0]) if first else named and named[0]) from error


class StreamOptions(ReadableModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken and not followed: no padding is sent."""


class Body(ReadableModel):
    """What both kinds of requests have in common. Fields named as in `SamplingParams` mean what they mean there."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: str | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float = 1.0
    """As in OpenAI's interface, not greedy."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] = Field(default_factory=list)
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    return_token_ids: bool = False
    num_speculative_tokens: int | None = None
    """Ours: most drafts per round; 0 = plain decoding."""
    speculative_method: str | None = None
    """Ours: which of the engine's methods drafts; "none" = plain decoding."""
    return_token_origins: bool = False
    """Ours: who wrote each piece of the text, and the counts of drafts."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        """Without the fields that change no text, and those that are null: these have their defaults."""
        if not isinstance(values, Mapping):
            return values
        given = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
        given = {name: value for name, value in given.items() if value != WITHOUT_EFFECT.get(name, ())}
        refused = [f"{name} is not supported: {reason}" for name, reason in REFUSED.items() if name in given]
        if refused:
            raise ValueError("; ".join(refused))
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("stop", "bad_words"):
            given = getattr(self, name)
            if isinstance(given, list) and len(given) > MOST_TEXTS:
                raise ValueError(f"{name} has {len(given)} texts; at most {MOST_TEXTS} are looked for")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Raises ValueError for what is no setting, and for a bias outside of what servers take."""
        given = {name: value for name in SHARED if (value := getattr(self, name)) is not None}
        if any(abs(bias) > SERVED_BIAS for bias in (self.logit_bias or {}).values()):
            raise ValueError(f"logit_bias={self.logit_bias} must be in [-{SERVED_BIAS}, {SERVED_BIAS}]")
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, method=self.speculative_method)


SHARED = {field.name for field in fields(SamplingParams)} & set(Body.model_fields)


class CompletionBody(Body):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] = False
    suffix: None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} must be n={self.n}: all samples are returned")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Raises ValueError for none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ValueError("prompt is empty; give a text, token ids, or a list of either")
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


class ChatMessage(ReadableModel):
    model_config = ConfigDict(extra="allow")  # name, reasoning_content, tool_calls, ...: for the template
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_answer(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError(f"response_format={self.response_format}: answers are free text here, {{'type': 'text'}}")
        return self


class TokenizeBody(ReadableModel):
    """`POST /tokenize`, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
