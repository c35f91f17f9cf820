"""Makes the commands that start vLLM, and runs one until a signal stops it.

command_to_serve        serves a verifier, with or without a drafter
command_to_extract      serves a verifier that writes its hidden states to files, for training
run_server              starts the server, waits for its health, forwards the log, stops everything it started
"""

from __future__ import annotations

import json
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from speculators.deploy.process import ServerProcess, ignore
from speculators.utils.names import refuse_option
from speculators.verifier.capture import ExtractionNote

DEFAULT_PORT = 8000
"""vLLM's own default."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SPECULATIVE_FLAGS = ("--speculative-config", "--speculative_config", "-sc")
TRANSFER_FLAGS = ("--kv-transfer-config", "--kv_transfer_config")


@dataclass(frozen=True)
class Launch:
    """A command, and the address of the server that it starts."""

    command: tuple[str, ...]
    base_url: str | None
    """None: the command starts no front end (a further node of several)."""

    @property
    def served_model(self) -> str:
        """The name that a request gives as `model`."""
        words = self.command[self.command.index("serve") + 1 :]
        return value_of(words, "--served-model-name") or words[0]

    @property
    def first_request(self) -> str | None:
        """A command that asks the server something."""
        if self.base_url is None:
            return None
        body = {"model": self.served_model, "prompt": "Hello", "max_tokens": 16}
        key = ("-H", "Authorization: Bearer API_KEY") if value_of(self.command, "--api-key") else ()
        words = ["curl", f"{self.endpoint}/completions", "-H", "Content-Type: application/json", *key, "-d"]
        return shlex.join([*words, json.dumps(body)])

    @property
    def endpoint(self) -> str | None:
        """The base URL of OpenAI clients."""
        return None if self.base_url is None else f"{self.base_url}/v1"


def command_to_serve(
    vllm: Sequence[str], verifier: str, speculative_config: Mapping[str, Any] | None, vllm_args: Sequence[str] = ()
) -> Launch:
    """Makes the command that serves a verifier.

    `vllm`: how to call vLLM (`VllmEnvironment.command`). `vllm_args` are passed on unchanged. Raises `ValueError` when
    they name a drafter.
    """
    refuse(vllm_args, SPECULATIVE_FLAGS, "the drafter is named by the command itself; use its --speculative-config")
    drafting = () if speculative_config is None else ("--speculative-config", json.dumps(speculative_config))
    return Launch((*vllm, "serve", refuse_option(verifier), *drafting, *vllm_args), base_url_of(vllm_args))


def command_to_extract(
    vllm: Sequence[str], note: ExtractionNote, directory: Path, vllm_args: Sequence[str] = ()
) -> Launch:
    """Makes the command that extracts hidden states into `directory`, by vLLM's own means: a method that drafts nothing
    and a connector that writes files. Raises `ValueError` when `vllm_args` set either."""
    refuse(vllm_args, (*SPECULATIVE_FLAGS, *TRANSFER_FLAGS), "extraction needs its own setting there; leave it out")
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(note.layer_ids)}},
    }
    transfer = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(directory)},
    }
    extraction = ("--speculative_config", json.dumps(speculative), "--kv_transfer_config", json.dumps(transfer))
    return Launch((*vllm, "serve", refuse_option(note.model), *extraction, *vllm_args), base_url_of(vllm_args))


def refuse(vllm_args: Sequence[str], flags: Sequence[str], reason: str) -> None:
    given = next((arg for arg in vllm_args if arg.split("=")[0] in flags), None)
    if given is not None:
        raise ValueError(f"{given.split('=')[0]} after --: {reason}")


def base_url_of(vllm_args: Sequence[str]) -> str | None:
    """Finds the server's address from vLLM's own flags; None for a node without a front end."""
    if "--headless" in vllm_args:
        return None
    host = value_of(vllm_args, "--host") or "0.0.0.0"
    port = value_of(vllm_args, "--port") or str(DEFAULT_PORT)
    if not port.isdigit():
        raise ValueError(f"--port {port}: a port is a number")
    if host in ("0.0.0.0", "::"):  # all addresses, including this one
        host = "127.0.0.1"
    scheme = "https" if value_of(vllm_args, "--ssl-certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def value_of(args: Sequence[str], flag: str) -> str | None:
    """Returns the value of `--flag value` or `--flag=value`; the last one counts, as in argparse."""
    value = None
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            value = args[index + 1]
        elif arg.startswith(f"{flag}="):
            value = arg.removeprefix(f"{flag}=")
    return value


def refuse_taken_port(base_url: str) -> None:
    """Raises `ValueError` if a server answers there already: it would pass for the new one, ready at once."""
    where = urlsplit(base_url)
    assert where.hostname is not None and where.port is not None
    try:
        socket.create_connection((where.hostname, where.port), timeout=1.0).close()
    except OSError:
        return
    raise ValueError(
        f"port {where.port} is taken: something answers at {base_url} already; end it, or serve at another port: "
        f"-- --port {where.port + 1}"
    )


class StopRequested(BaseException):
    """A signal asked the server to stop. Not an `Exception`, so that no handler swallows it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raises `StopRequested` on Ctrl-C, SIGTERM and SIGHUP inside the block; does nothing outside the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequested(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_server(
    launch: Launch,
    *,
    ready_timeout_s: float,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = ignore,
    on_wait: Callable[[float, str], None] = ignore,
    on_ready: Callable[[float], None] = ignore,
) -> str:
    """Serves until a signal asks to stop; returns the signal's name.

    Raises `ServerFailedError` when the server ends by itself or is not healthy after `ready_timeout_s` seconds, and
    `ValueError` when its port is taken.
    """
    if launch.base_url is not None:
        refuse_taken_port(launch.base_url)
    try:
        with stopping_on_signals(), ServerProcess(launch.command, env=env, on_line=on_line) as server:
            if launch.base_url is not None:
                on_ready(server.wait_until_healthy(f"{launch.base_url}/health", ready_timeout_s, on_wait))
            server.wait()
    except StopRequested as request:
        return request.signal_name
    raise AssertionError("ServerProcess.wait always raises")
