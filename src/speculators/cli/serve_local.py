"""`speculators serve-local` and `speculators playground`: one engine of this process over OpenAI's interface, and the
page that shows who wrote each token.

named on the command line         verifier                     drafter
a speculator                      as recorded, or --verifier   the speculator; then each --method, for requests
a model, or --verifier            the model                    the first --method, if any; then the others
nothing (playground)              the embedded one             ngram
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators.cli.shared import Device, Dtype, NumSpeculativeTokens, Result, TrustRemoteCode, say, with_flags_of
from speculators.decoding.method import PLAIN, Drafter
from speculators.decoding.settings import DEFAULT_DEVICE, DEFAULT_DTYPE
from speculators.local_server.protocol import NEEDS_EXTRA, ServeConfig

if TYPE_CHECKING:
    from speculators.decoding import Engine

Model = Annotated[
    str | None, typer.Argument(help="Speculator, served with the verifier it was trained for, or a verifier.")
]
VerifierName = Annotated[str | None, typer.Option("--verifier", help="Verifier, where MODEL does not say it.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(help="Way of drafting that requests may choose: a speculator's directory, ngram, JSON. Repeatable."),
]
Host = Annotated[str, typer.Option(help="Address to listen on. One that other machines reach needs a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")]
KeyVariable = Annotated[
    str | None, typer.Option("--api-key-env", help="Environment variable that holds the key clients must send.")
]
Rows = Annotated[int, typer.Option("--max-batch-size", min=1, help="Requests that are decoded together.")]
Length = Annotated[int | None, typer.Option("--max-length", min=2, help="Prompt plus answer, in tokens.")]
DEFAULT_ROWS = 8


@dataclass(frozen=True)
class Served:
    """What is served, as the command names it."""

    verifier: str
    drafters: Sequence[Drafter]
    """The first one drafts for requests that choose none; empty: nothing drafts."""


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Flags of both commands: what is served, and how it is opened."""

    model: Model = None
    verifier: VerifierName = None
    method: Methods = None
    num_speculative_tokens: NumSpeculativeTokens = None
    max_batch_size: Rows = DEFAULT_ROWS
    max_length: Length = None
    dtype: Dtype = DEFAULT_DTYPE
    device: Device = DEFAULT_DEVICE
    trust_remote_code: TrustRemoteCode = False


@with_flags_of("engine", EngineFlags)
def serve_local(
    engine: EngineFlags,
    host: Host = ServeConfig.host,
    port: Port = ServeConfig.port,
    api_key: Annotated[
        str | None, typer.Option(help="The key itself; other users of this machine can see it: better by variable.")
    ] = None,
    api_key_env: KeyVariable = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the verifier's name.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for a row; further ones are answered 503.")
    ] = ServeConfig.max_waiting,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer that a request may ask for. Default: what fits.")
    ] = None,
) -> Result:
    """Serve a verifier with its drafter from this process, over OpenAI's interface: without vLLM."""
    if api_key is not None and api_key_env is not None:
        raise typer.BadParameter("--api-key and --api-key-env both say the key: leave one out")
    config = ServeConfig(
        host=host,
        port=port,
        api_key=key_of(api_key_env) if api_key is None else api_key,
        model_name=served_model_name,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
    )
    return serve("serve-local", engine, config)


@with_flags_of("engine", EngineFlags)
def playground(
    engine: EngineFlags, host: Host = ServeConfig.host, port: Port = ServeConfig.port, api_key_env: KeyVariable = None
) -> Result:
    """Open a page on this machine: chat with drafts beside plain decoding, every token coloured by who wrote it."""
    key = key_of(api_key_env)
    if key is None and not ServeConfig(host=host, port=port, api_key="any").is_loopback:
        key = secrets.token_urlsafe(24)
    config = ServeConfig(host=host, port=port, api_key=key, playground=True)
    if engine.model is None and engine.verifier is None:
        from speculators import assets

        engine = replace(engine, verifier=str(assets.tiny_verifier_path()), method=engine.method or ["ngram"])
    return serve("playground", engine, config)


def serve(verb: str, flags: EngineFlags, config: ServeConfig) -> Result:
    served = what_to_serve(flags.model, flags.verifier, flags.method or [])
    engine = open_engine(
        served,
        flags.num_speculative_tokens,
        max_batch_size=flags.max_batch_size,
        max_length=flags.max_length,
        dtype=flags.dtype,
        device=flags.device,
        trust_remote_code=flags.trust_remote_code,
    )
    return serve_until_stopped(verb, engine, config, served)


def key_of(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise typer.BadParameter(f"--api-key-env {variable}: this environment variable is not set")
    return None if variable is None else os.environ[variable]


def what_to_serve(model: str | None, verifier: str | None, methods: Sequence[str]) -> Served:
    """By the table above. Raises ValueError where no verifier is named."""
    from speculators.checkpoint.io import read_model_config, speculator_facts

    drafters: list[Drafter] = [method for method in methods if method != PLAIN]
    if model is None:
        if verifier is None:
            raise ValueError("name a speculator, or a verifier: speculators serve-local CHECKPOINT")
        return Served(verifier, drafters)
    facts = speculator_facts(model, read_model_config(model))
    if facts is None:
        if verifier is not None:
            raise ValueError(f"{model} is no speculator, and --verifier {verifier} says what to serve: leave one out")
        return Served(model, drafters)
    verifier = verifier or facts.verifier
    if verifier is None:
        raise ValueError(f"{model} names no verifier; name the one it was trained for with --verifier")
    return Served(verifier, [model, *drafters])


def open_engine(served: Served, num_speculative_tokens: int | None, **options: Any) -> Engine:
    try:
        import speculators.local_server.app  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(NEEDS_EXTRA) from error

    from speculators.decoding import Engine

    first, others = (served.drafters[0], served.drafters[1:]) if served.drafters else (None, ())
    if first is None and num_speculative_tokens is not None:
        raise ValueError(f"-k {num_speculative_tokens} but nothing drafts: name a speculator, or a --method")
    return Engine.from_pretrained(
        served.verifier, first, num_speculative_tokens=num_speculative_tokens, other_methods=others, **options
    )


def serve_until_stopped(verb: str, engine: Engine, config: ServeConfig, served: Served) -> Result:
    from speculators.local_server.app import LocalServer

    server = LocalServer(engine, config, model=served.verifier)
    drafts = ", ".join(f"{name} (K <= {most})" for name, most in engine.drafters.most_tokens.items())
    say(f"{served.verifier}, drafted by {drafts or 'nothing'}")
    if config.playground:
        say(f"open {server.url}/" + (f"#token={config.api_key}" if config.api_key is not None else ""), "bold")
    else:
        say(f"OpenAI's interface at {server.url}/v1; stop it with Ctrl-C", "bold")
    server.run()
    stats = engine.stats
    record = {
        "verb": verb,
        "url": server.url,
        "verifier": served.verifier,
        "num_tokens": stats.num_tokens,
        "acceptance_length": stats.acceptance_length,
    }
    return Result(record, sentence=f"{stats.num_tokens} tokens served, acceptance length {stats.acceptance_length:.2f}")
