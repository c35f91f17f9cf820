"""Asks a vLLM server: the client, its retry rule, hidden states of token sequences, which files it may name, rendering.

    POST <endpoint>/completions  {"prompt": [ids], "max_tokens": 1, "return_token_ids": true}
    answer                       choices[0].prompt_token_ids, kv_transfer_params.hidden_states_path

Transient failures (a dropped connection, a busy or restarting server) are tried again; wrong answers are not. Every
client of a server follows the one rule, `retry_wait_s`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from speculators.utils.report import WorkFailedError

logger = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "http://localhost:8000/v1"
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_MAX_RETRIES = 3
BACKOFF_S, MOST_DOUBLINGS = 1.0, 6
"""Wait before the first retry; each further wait is twice as long, up to about a minute."""
MOST_RETRY_AFTER_S = 600.0
"""A server that asks for more patience (`Retry-After`) is asked again after this."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}\.safetensors", re.ASCII)
"""vLLM names a file after its request."""
KEPT_NAMES = re.compile(r"hs_\d+\.safetensors|(pytorch_)?model.*", re.ASCII)
"""Files of stored rows and of models, which no server writes and nobody wants deleted."""
TRANSIENT_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP codes of a server that may answer soon."""


class InvalidResponseError(WorkFailedError):
    """The server answered wrongly. Another request would not help."""


class ServerUnavailableError(ConnectionError):
    """The server could not be reached, or failed, in every allowed attempt."""


class TransientError(Exception):
    """A failure that another attempt may not meet; `retry_after_s`: the wait that the server asked for."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


TRANSIENT_ERRORS = (TransientError, httpx.TransportError, httpx.DecodingError)


def retry_wait_s(error: Exception, attempt: int, jitter: float = 0.0) -> float:
    """Returns the wait after a failed attempt (from 0): 1, 2, 4, ... s, or what the server asked for if that is longer.

    `jitter`: adds up to this share of it at random, so that many clients do not come back at once.
    """
    backoff_s = BACKOFF_S * 2 ** min(attempt, MOST_DOUBLINGS) * (1 + jitter * random.random())
    return max(backoff_s, min(getattr(error, "retry_after_s", 0.0), MOST_RETRY_AFTER_S))


def gave_up(error: Exception, num_attempts: int, waited_s: float) -> ServerUnavailableError:
    return ServerUnavailableError(
        f"{describe(error)}: {num_attempts} attempts in {waited_s:.0f} s. Look at the server's log and start it "
        "again; more retries wait longer (7: about two minutes)"
    )


def with_retries(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `max_retries=3` to a plain or async function: retries by `retry_wait_s` when it fails transiently.

    The result raises `ServerUnavailableError` after the last attempt.
    """

    def wait_of(error: Exception, waits_s: list[float], max_retries: int) -> float:
        if len(waits_s) == max_retries:
            raise gave_up(error, max_retries + 1, sum(waits_s)) from error
        waits_s.append(retry_wait_s(error, len(waits_s)))
        logger.warning("%s; trying again in %.0f s", describe(error), waits_s[-1])
        return waits_s[-1]

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def retried(*args: Any, max_retries: int = DEFAULT_MAX_RETRIES, **kwargs: Any) -> Any:
            waits_s: list[float] = []
            while True:
                try:
                    return await function(*args, **kwargs)
                except TRANSIENT_ERRORS as error:
                    await asyncio.sleep(wait_of(error, waits_s, max_retries))

        return retried

    @functools.wraps(function)
    def retried_plainly(*args: Any, max_retries: int = DEFAULT_MAX_RETRIES, **kwargs: Any) -> Any:
        waits_s: list[float] = []
        while True:
            try:
                return function(*args, **kwargs)
            except TRANSIENT_ERRORS as error:
                time.sleep(wait_of(error, waits_s, max_retries))

    return retried_plainly


def describe(error: Exception) -> str:
    if isinstance(error, httpx.RequestError):  # httpx's own text speaks of sockets
        return f"no answer from {error.request.url} ({error or type(error).__name__})"
    return str(error)


@dataclass(frozen=True)
class ServedModel:
    """The model that a server serves."""

    name: str
    """Its name in requests."""
    root: str
    """The directory or hub id it was loaded from."""
    max_model_len: int | None
    """Longest sequence, in tokens; None when the server does not say."""


def make_client(
    endpoint: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, num_connections: int = 32, api_key: str | None = None
) -> httpx.Client:
    """Makes a client whose paths are relative to `endpoint` (which ends in /v1).

    `api_key`: sent as the bearer token. Raises `ValueError` when the endpoint is not an http address.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"endpoint {endpoint!r}: an address begins with http://, e.g. {DEFAULT_ENDPOINT}")
    limits = httpx.Limits(max_connections=num_connections, max_keepalive_connections=num_connections)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return httpx.Client(base_url=endpoint.rstrip("/") + "/", timeout=timeout_s, limits=limits, headers=headers)


@with_retries
def served_model(client: httpx.Client) -> ServedModel:
    """Asks the server for its first model. Raises `InvalidResponseError` when it serves no model."""
    body = checked_json(client.get("models"))
    models = body.get("data") or []
    if not models:
        raise InvalidResponseError(f"{client.base_url} serves no model")
    first = models[0] if isinstance(models, list) else models
    if not isinstance(first, Mapping) or not isinstance(first.get("id"), str):
        raise wrong_kind("list of models", models, "a list of objects with an id")
    root, length = first.get("root") or first["id"], first.get("max_model_len")
    if not isinstance(root, str) or not (length is None or type(length) is int):
        raise wrong_kind("model", first, "one with a root and a number as max_model_len")
    return ServedModel(first["id"], root, length)


def checked_json(response: httpx.Response) -> dict[str, Any]:
    """Returns the body of a good answer. Raises `TransientError` (worth a retry), else `InvalidResponseError`."""
    if response.status_code in TRANSIENT_CODES:
        message = f"{response.url} answered {response.status_code}: {response.text[:300]}"
        raise TransientError(message, retry_after_s(response))
    if response.status_code != 200:
        raise InvalidResponseError(f"{response.url} answered {response.status_code}: {response.text[:300]}")
    try:
        body = response.json()
    except (ValueError, RecursionError) as error:
        raise InvalidResponseError(f"{response.url} did not answer with JSON: {response.text[:300]}") from error
    if not isinstance(body, dict):
        raise InvalidResponseError(f"{response.url} answered {type(body).__name__}, not an object")
    return body


def retry_after_s(response: httpx.Response) -> float:
    """Returns the wait that a server asks for, given in seconds or as a date; 0 when it asks for none."""
    asked = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", asked):
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date; one without a time zone
        return 0.0


def completion_request(model: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the request for `item["input_ids"]`. Raises `ValueError` for a row of messages."""
    if "messages" in item and "input_ids" not in item:
        raise ValueError("rows of messages have no token ids; prepare them with prepare-data")
    return {
        "model": model,
        "prompt": [int(token) for token in item["input_ids"]],
        "max_tokens": 1,
        "temperature": 0.0,
        "return_token_ids": True,
    }


@with_retries
def generate_hidden_states(
    client: httpx.Client, model: str, item: Mapping[str, Any], *, timeout: float = DEFAULT_TIMEOUT_S
) -> tuple[str, dict[str, Any]]:
    """Asks for the states of `item["input_ids"]`; returns (handle, all transfer parameters). `timeout` in seconds.

    Raises `InvalidResponseError` for a wrong answer, `ServerUnavailableError` after the last attempt.
    """
    request = completion_request(model, item)
    return extract_output(checked_json(client.post("completions", json=request, timeout=timeout)), request["prompt"])


@with_retries
async def generate_hidden_states_async(
    client: httpx.AsyncClient, model: str, item: Mapping[str, Any], *, timeout: float = DEFAULT_TIMEOUT_S
) -> tuple[str, dict[str, Any]]:
    """Does the same as `generate_hidden_states` with an async client."""
    request = completion_request(model, item)
    response = await client.post("completions", json=request, timeout=timeout)
    return extract_output(checked_json(response), request["prompt"])


def extract_output(response: Mapping[str, Any], token_ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Returns (handle, transfer parameters) of an answer to these tokens.

    Raises `InvalidResponseError` when the answer is about other tokens or has no handle.
    """
    if first_choice(response).get("prompt_token_ids") is None:
        raise InvalidResponseError("the answer has no prompt_token_ids: the server is older than return_token_ids")
    refuse_other_prompt(first_choice(response), token_ids)
    transfer = response.get("kv_transfer_params")
    if not transfer:
        raise InvalidResponseError(
            "the answer has no kv_transfer_params: this server does not extract hidden states; start one with "
            "`speculators launch-vllm`"
        )
    if not isinstance(transfer, Mapping):
        raise wrong_kind("kv_transfer_params", transfer, "an object")
    handle = transfer.get("hidden_states_path") or transfer.get("handle")
    if not handle:
        raise InvalidResponseError(
            f"kv_transfer_params has neither hidden_states_path nor handle: {str(dict(transfer))[:300]}"
        )
    if not isinstance(handle, str):
        raise wrong_kind("hidden_states_path", handle, "a path")
    return handle, dict(transfer)


def refuse_other_prompt(choice: Mapping[str, Any], token_ids: Sequence[int]) -> None:
    """Raises `InvalidResponseError` when the server says that it read other tokens than it was sent."""
    seen = choice.get("prompt_token_ids")
    if seen is not None and not isinstance(seen, list):
        raise wrong_kind("prompt_token_ids", seen, "a list of token ids")
    if seen is not None and seen != list(token_ids):
        raise InvalidResponseError(
            f"the server read {len(seen)} tokens, not the {len(token_ids)} that were sent: it cuts or changes prompts"
        )


def first_choice(response: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the first completion of an answer, {} without any. Raises `InvalidResponseError` for another kind."""
    choices = response.get("choices") or [{}]
    if not isinstance(choices, list) or not isinstance(choices[0], Mapping):
        raise wrong_kind("choices", choices, "a list of objects")
    return choices[0]


def wrong_kind(what: str, value: Any, wanted: str) -> InvalidResponseError:
    return InvalidResponseError(f"the answer's {what} is {str(value)[:100]!r}, not {wanted}: is this a vLLM server?")


def name_of_served_file(handle: str, directory: Path) -> str:
    """Returns the file's name in `directory`.

    Raises `InvalidResponseError` unless the server's path is directly in the directory and named as vLLM names files.
    """
    try:
        parent, name = Path(handle).parent.resolve(), Path(handle).name
        is_inside = Path(handle).is_absolute() and parent == directory.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
        is_inside, name = False, ""
    if not is_inside:
        raise InvalidResponseError(
            f"the server names the file {handle[:200]!r}, which is not directly in {directory}: nothing else is read "
            "or deleted; name the directory that the server writes to (launch-vllm --hidden-states-path) with "
            "--server-states-path"
        )
    if FILE_NAME.fullmatch(name) is None or KEPT_NAMES.fullmatch(name):
        raise InvalidResponseError(
            f"the server names the file {name[:200]!r} in {directory}; files of states are called "
            "<request id>.safetensors, and no other file is read or deleted"
        )
    return name
