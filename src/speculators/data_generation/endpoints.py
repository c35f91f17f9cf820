"""Asks servers with OpenAI's interface to continue prompts: several of them, one retry rule, and what each understands.

    POST <endpoint>/completions        {"prompt": [ids], "seed": ..., "return_token_ids": true, ...}
    answer                             choices[0].token_ids (vLLM), else choices[0].text, which is tokenised here
    POST <endpoint>/chat/completions   {"messages": [...], ...}: of a server that refuses the first
    answer                             choices[0].message, which the verifier's template renders here

Prompts are rendered here and sent as tokens, so a server's own chat template does not matter, except to a server that
takes only messages. A server that fails or is busy rests while the others are asked. With all of them resting, a
request waits by `retry_wait_s` and asks again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from speculators.data_generation.answering import CHAT, COMPLETIONS, requests_of, tokens_of_message
from speculators.data_generation.configs import DEFAULT_ANSWER_RETRIES, DEFAULT_ANSWER_TIMEOUT_S
from speculators.data_generation.rollout import Answer, Question
from speculators.data_generation.vllm_client import (
    TRANSIENT_ERRORS,
    InvalidResponseError,
    ServedModel,
    ServerUnavailableError,
    TransientError,
    checked_json,
    describe,
    first_choice,
    gave_up,
    make_client,
    refuse_other_prompt,
    retry_wait_s,
    served_model,
    wrong_kind,
)
from speculators.utils.chat_template import REASONING_KEYS, ChatRenderer

logger = logging.getLogger(__name__)

JITTER = 0.5
STANDARD = ("top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stop")
"""Sampling settings of OpenAI's interface, besides max_tokens, temperature and seed."""
EXTENSIONS = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "bad_words": (),
    "min_tokens": 0,
    "ignore_eos": False,
}
"""Sampling settings that vLLM and SGLang add, with their values for "off". Sent even then: a server may have other
defaults from the model's generation config. One that refuses unknown keys gets those that are on."""
REFUSALS = frozenset({400, 404, 405, 422, 501})
"""HTTP codes of a server that does not know a path or a key."""


@dataclass
class Endpoint:
    """One server."""

    url: str
    client: httpx.Client
    served: ServedModel | None = None
    form: tuple[str, bool] | None = None
    """The path that it answers, and whether it takes the extensions there; None: not known yet."""
    rests_until_s: float = 0.0
    """Not asked before this time (of `time.monotonic`) while another one is not resting."""
    busy_until_s: float = 0.0
    """Not asked before this time at all: the server said so."""
    num_in_flight: int = 0

    def model(self) -> ServedModel:
        if self.served is None:
            self.served = served_model(self.client, max_retries=0)
        return self.served

    def complete(self, requests: Mapping[str, Mapping[str, Any]], extensions: Mapping[str, Any]) -> dict[str, Any]:
        """Asks by path until the server takes a form, which it keeps. Raises `InvalidResponseError` (first refusal)."""
        needed = {key: value for key, value in extensions.items() if key in EXTENSIONS and value != EXTENSIONS[key]}
        known = self.form  # other threads may find it out meanwhile
        forms = [(path, takes) for path in requests for takes in (True, False)] if known is None else [known]
        refusal: httpx.Response | None = None
        for path, takes_extensions in forms:
            if path not in requests:
                raise InvalidResponseError(f"{self.url} answers only {CHAT}, and a row of tokens has no messages")
            response = self.client.post(path, json={**requests[path], **(extensions if takes_extensions else needed)})
            if known is not None or response.status_code not in REFUSALS:
                body = checked_json(response)
                if self.form is None and (path == CHAT or not takes_extensions):
                    what = "takes messages only: it makes the prompts" if path == CHAT else "refuses vLLM's keys"
                    logger.warning("%s %s, and its answers are tokenised here, from their text", self.url, what)
                self.form = (path, takes_extensions)
                return body
            refusal = refusal or response
        assert refusal is not None
        return checked_json(refusal)


@dataclass
class AnswerServers:
    """Continues prompts with one of several servers. Threads may share it; whoever makes it closes it."""

    urls: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    sampling: Mapping[str, Any]
    """The fields of `SamplingParams`."""
    stop_token_ids: Collection[int]
    num_connections: int = 32
    timeout_s: float = DEFAULT_ANSWER_TIMEOUT_S
    max_retries: int = DEFAULT_ANSWER_RETRIES
    api_key: str | None = None
    template_kwargs: Mapping[str, Any] | None = None
    """Arguments of the chat template, for servers that render prompts themselves."""
    endpoints: list[Endpoint] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> AnswerServers:
        """Connects. Raises `ServerUnavailableError` when no server answers, `ValueError` for different models."""
        for url in self.urls:
            base = url.rstrip("/").removesuffix(f"/{COMPLETIONS}").removesuffix("/chat")
            client = make_client(
                base, timeout_s=self.timeout_s, num_connections=self.num_connections, api_key=self.api_key
            )
            self.endpoints.append(Endpoint(base, client))
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        for endpoint in self.endpoints:
            endpoint.client.close()

    def connect(self) -> None:
        waited_s = 0.0
        for attempt in range(self.max_retries + 1):
            errors = [error for endpoint in self.endpoints if (error := self.failure_of(endpoint)) is not None]
            if len(errors) < len(self.endpoints):
                break
            if attempt == self.max_retries:
                raise gave_up(errors[0], attempt + 1, waited_s) from errors[0]
            wait_s = retry_wait_s(errors[0], attempt, JITTER)
            logger.warning("%s; trying again in %.0f s", describe(errors[0]), wait_s)
            waited_s += wait_s
            self.closing.wait(wait_s)
        for error in errors:
            logger.warning("%s; going on without this server until it answers", describe(error))
        for endpoint in self.connected():
            self.refuse_other_model(endpoint.model())

    def refuse_other_model(self, served: ServedModel) -> None:
        """Raises `ValueError` unless a server serves the model of the first one, whatever directory it lies in."""
        names = [model.root.rstrip("/").rpartition("/")[2] for model in (self.served, served)]
        if names[0] != names[1]:
            raise ValueError(f"the endpoints serve different models: {names}; answers must come from one")

    def failure_of(self, endpoint: Endpoint) -> Exception | None:
        try:
            endpoint.model()
        except (*TRANSIENT_ERRORS, ServerUnavailableError) as error:
            return error.__cause__ if isinstance(error.__cause__, Exception) else error
        return None

    def connected(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.endpoints if endpoint.served is not None]

    @property
    def served(self) -> ServedModel:
        """The model that the first server serves."""
        return self.connected()[0].model()

    def warn_about_other_model(self, verifier: str) -> None:
        """Warns when the servers' model does not look like the one whose tokenizer makes the prompts."""
        names = [name.rstrip("/").rpartition("/")[2] for name in (verifier, self.served.root, self.served.name)]
        if names[0] not in names[1:]:
            served = f"{self.served.root!r} (as {self.served.name!r})"
            logger.warning("prompts are made for %r, but the server serves %s: is it the same model?", verifier, served)

    @property
    def max_model_len(self) -> int | None:
        """Longest sequence in tokens that every server takes; None when none says."""
        lengths = [endpoint.model().max_model_len for endpoint in self.connected()]
        return min((length for length in lengths if length is not None), default=None)

    def __call__(self, questions: Sequence[Question]) -> list[Answer | Exception]:
        return [self.answer_or_error(question) for question in questions]

    def answer_or_error(self, question: Question) -> Answer | Exception:
        try:
            return self.answer(question)
        except (InvalidResponseError, ServerUnavailableError) as error:
            return error

    def answer(self, question: Question) -> Answer:
        """Asks servers until one answers. Raises `ServerUnavailableError` after `max_retries` waits for all of them."""
        num_waits, waited_s = 0, 0.0
        while True:
            endpoint = self.choose()
            try:
                return self.ask(endpoint, question)
            except (*TRANSIENT_ERRORS, ServerUnavailableError) as error:
                wait_s = retry_wait_s(error, num_waits, JITTER)
                endpoint.rests_until_s = time.monotonic() + wait_s
                if getattr(error, "retry_after_s", 0.0):
                    endpoint.busy_until_s = endpoint.rests_until_s
                if any(other.rests_until_s <= time.monotonic() for other in self.endpoints):
                    logger.warning("%s; asking another server", describe(error))
                    continue
                if num_waits == self.max_retries or self.closing.is_set():
                    raise gave_up(error, num_waits + 1, waited_s) from error
                logger.warning("%s; trying again in %.0f s", describe(error), wait_s)
                num_waits, waited_s = num_waits + 1, waited_s + wait_s
                self.closing.wait(wait_s)

    def choose(self) -> Endpoint:
        """Returns the server with the fewest requests of those that are not resting; waits while all are busy."""
        wait_s = min(endpoint.busy_until_s for endpoint in self.endpoints) - time.monotonic()
        if wait_s > 0:
            self.closing.wait(wait_s)
        now_s = time.monotonic()
        with self.lock:
            return min(self.endpoints, key=lambda e: (e.busy_until_s > now_s, e.rests_until_s > now_s, e.num_in_flight))

    def ask(self, endpoint: Endpoint, question: Question) -> Answer:
        with self.lock:
            endpoint.num_in_flight += 1
        try:
            served = endpoint.model()
            self.refuse_other_model(served)
            body = endpoint.complete(self.requests(served, question), self.extensions)
        finally:
            with self.lock:
                endpoint.num_in_flight -= 1
        choice = {"prompt_token_ids": body.get("prompt_token_ids"), **first_choice(body)}
        reason = choice.get("finish_reason")
        if reason in ("abort", "error"):
            raise TransientError(f"{endpoint.url} ended an answer by {reason!r}")
        refuse_other_prompt(choice, question.prompt)
        token_ids = generated_token_ids(choice)
        if token_ids is None:
            return Answer(self.tokenised(choice, question), is_from_text=True, finish_reason=reason)
        stop = choice.get("stop_reason")
        return Answer(token_ids, finish_reason=reason, stop=stop if isinstance(stop, str) else "")

    def requests(self, served: ServedModel, question: Question) -> dict[str, dict[str, Any]]:
        max_tokens = self.sampling["max_tokens"]
        if served.max_model_len is not None:
            max_tokens = max(1, min(max_tokens, served.max_model_len - len(question.prompt)))
        standard = {key: self.sampling[key] for key in STANDARD if self.sampling.get(key)}
        request = {"model": served.name, "max_tokens": max_tokens, **standard}
        return requests_of(question, request, self.template_kwargs)

    @cached_property
    def extensions(self) -> dict[str, Any]:
        """Keys that vLLM adds to OpenAI's interface."""
        return {
            **{key: self.sampling.get(key, off) for key, off in EXTENSIONS.items()},
            "stop_token_ids": sorted(self.stop_token_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }

    def tokenised(self, choice: Mapping[str, Any], question: Question) -> list[int]:
        """Returns the tokens of an answer's text, with the end token that servers leave out of it."""
        message, stop, reason = choice.get("message"), choice.get("stop_reason"), choice.get("finish_reason")
        if isinstance(message, Mapping) and any(message.get(key) for key in ("tool_calls", *REASONING_KEYS)):
            renderer = ChatRenderer(self.tokenizer, self.template_kwargs)
            return tokens_of_message(message, question, renderer, is_cut=reason == "length")
        text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
        if not isinstance(text, str):
            raise wrong_kind("text", text, "a text")
        token_ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        end = stop if type(stop) is int else self.tokenizer.eos_token_id
        if reason == "stop" and not isinstance(stop, str) and end is not None:
            token_ids += [] if token_ids[-1:] == [end] else [end]
        return token_ids


def generated_token_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """Returns the generated tokens of a completion; None from a server that does not know `return_token_ids`."""
    token_ids = choice.get("token_ids")
    if token_ids is None or (isinstance(token_ids, list) and all(type(token) is int for token in token_ids)):
        return token_ids
    raise wrong_kind("token_ids", token_ids, "a list of token ids")
