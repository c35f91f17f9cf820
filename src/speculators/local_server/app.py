"""The local server: OpenAI's interface over one engine of this process, and the page of the playground.

    GET  /v1/models  /health  /metrics  /         POST /v1/completions  /v1/chat/completions  /tokenize

Whoever reaches the port is not trusted: bodies are bounded and must be JSON, what waits is bounded, an address that
other machines reach asks for a key, and one that they do not answers only to its own names, so that a web page open in
a browser cannot reach it under a name of its own.
"""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from typing_extensions import Self

from speculators.decoding.chat import openai_messages, refuse_other_than_variables
from speculators.decoding.engine import Engine
from speculators.decoding.settings import SamplingParams
from speculators.local_server.answers import DONE, Answers, Asked, event_of, limit_of, unless_disconnected
from speculators.local_server.engine_thread import Call, Delta, EngineThread, ServerBusyError
from speculators.local_server.metrics import prometheus_text
from speculators.local_server.protocol import (
    ApiError,
    ChatBody,
    CompletionBody,
    ServeConfig,
    TokenizeBody,
    parsed,
    refuse_stranger,
)
from speculators.utils.chat_template import chat_prompt, chat_template_of


class Api:
    """Answers the requests to one server. Raises `ValueError` for an `engine` without a tokenizer."""

    def __init__(self, engine: Engine, config: ServeConfig, model: str):
        if engine.tokenizer is None:
            raise ValueError("the local server speaks text and the engine has no tokenizer; give it one (tokenizer=)")
        self.engine, self.config, self.root = engine, config, model
        self.name = config.model_name or model
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        """Of the connections' thread; the engine's is the engine's thread's."""
        self.thread = EngineThread(engine, max_waiting=config.max_waiting)
        self.most_tokens = engine.drafters.most_tokens

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._refuse_other_model(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "speculators",
            "root": self.root,
            "max_model_len": self.engine.max_length,
            "speculative_methods": self.most_tokens,
        }

    async def health(self) -> PlainTextResponse:
        return PlainTextResponse("", 200 if self.thread.is_alive else 503)

    async def metrics(self) -> PlainTextResponse:
        counts = await asyncio.wrap_future(self.thread.counts())
        text = prometheus_text(counts, self.name, next(iter(self.most_tokens.values()), 0))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, request: Request) -> dict[str, Any]:
        body = parsed(TokenizeBody, await self._json(request))
        self._refuse_other_model(body.model)
        tokens = self.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"]
        return {"count": len(tokens), "max_model_len": self.engine.max_length, "tokens": tokens}

    async def completions(self, request: Request) -> Any:
        body = parsed(CompletionBody, await self._json(request))

        def tokens() -> list[list[int]]:
            tokenizer: Any = self.engine.tokenizer
            special = body.add_special_tokens
            return [
                p if isinstance(p, list) else tokenizer(p, add_special_tokens=special).input_ids for p in body.prompts()
            ]

        return await self._answer(request, body, tokens, body.logprobs)

    async def chat(self, request: Request) -> Any:
        body = parsed(ChatBody, await self._json(request))

        def tokens() -> list[list[int]]:
            tokenizer: Any = self.engine.tokenizer
            given = [message.model_dump(exclude_unset=True) for message in body.messages]
            messages, options = openai_messages(given, chat_template_of(tokenizer)), body.chat_template_kwargs
            refuse_other_than_variables(options or {})
            return [chat_prompt(tokenizer, messages, template_kwargs=options)]

        return await self._answer(request, body, tokens, (body.top_logprobs or 0) if body.logprobs else None)

    async def _answer(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        tokens: Callable[[], list[list[int]]],
        num_logprobs: int | None,
    ) -> Any:
        self._refuse_other_model(body.model)
        answers = Answers(body, self.name, self.tokenizer)
        asked = self._asked()

        def prepare() -> tuple[list[list[int]], SamplingParams]:
            prompts = tokens()
            most = limit_of(body, prompts, self.engine.max_length, self.config.max_tokens)
            asked.params = body.sampling(most, num_logprobs)
            return prompts, asked.params

        try:
            await asyncio.wrap_future(self.thread.submit(asked.call, prepare))
        except BaseException as error:
            self.thread.cancel(asked.call)
            if isinstance(error, ServerBusyError):
                raise ApiError(503, str(error), headers={"Retry-After": "1"}) from error
            if isinstance(error, ValueError):
                raise ApiError(400, str(error)) from error
            raise
        if body.stream:
            return StreamingResponse(self._events(asked, answers), media_type="text/event-stream")
        try:
            return await unless_disconnected(request, self._whole(asked, answers))
        finally:
            self.thread.cancel(asked.call)

    def _asked(self) -> Asked:
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(item: Delta | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, item)

        return Asked(Call(sink), queue)

    async def _whole(self, asked: Asked, answers: Answers) -> dict[str, Any]:
        async for delta in asked.deltas():
            answers.note(delta, asked.params)
        return answers.whole(asked.call, asked.in_order())

    async def _events(self, asked: Asked, answers: Answers) -> AsyncIterator[str]:
        """Server-sent events. An error after the first of them is an event too: the status is sent already."""
        begun: set[int] = set()
        try:
            async for delta in asked.deltas():
                is_first = delta.choice not in begun
                begun.add(delta.choice)
                if is_first and answers.is_chat:
                    yield event_of(answers.first_chunk(delta.choice))
                chunk = answers.chunk(asked.call, delta, asked.params, is_first=is_first)
                if chunk is not None:
                    yield event_of(chunk)
            if answers.body.includes_usage:
                yield event_of(answers.usage_chunk(asked.call, asked.in_order()))
            yield DONE
        except ApiError as error:
            yield event_of(error.body)
            yield DONE
        finally:
            self.thread.cancel(asked.call)  # the client is gone, or all has ended

    # -- what is refused

    async def guard(self, request: Request) -> None:
        refuse_stranger(self.config, request.headers)

    def _refuse_other_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(404, f"the model {name!r} is not served; this server has {self.name!r}", "model")

    async def _json(self, request: Request) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site may send others without being asked for leave
            raise ApiError(415, f"content-type {kind!r}: the body must be application/json")
        received = bytearray()
        async for part in request.stream():
            received += part
            if len(received) > self.config.max_body_bytes:
                raise ApiError(413, f"the body is longer than {self.config.max_body_bytes} bytes, this server's limit")
        try:
            values = json.loads(received)
            json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text
            return values
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {error}") from error


PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""The page loads nothing from anywhere, and no other page may frame it."""


def make_app(api: Api) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.thread.start()
        yield
        await asyncio.to_thread(api.thread.close, api.config.shutdown_s)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    guarded: dict[str, Any] = {"dependencies": [Depends(api.guard)], "response_model": None}
    app.get("/v1/models", **guarded)(api.models)
    app.get("/v1/models/{name:path}", **guarded)(api.model)
    app.get("/metrics", **guarded)(api.metrics)
    app.post("/tokenize", **guarded)(api.tokenize)
    app.post("/v1/completions", **guarded)(api.completions)
    app.post("/v1/chat/completions", **guarded)(api.chat)
    app.get("/health", response_model=None)(api.health)
    if api.config.playground:
        page = (files("speculators.local_server") / "playground.html").read_text(encoding="utf-8")
        app.get("/", response_class=HTMLResponse)(lambda: HTMLResponse(page, headers=PAGE_HEADERS))

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        refusal = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(refusal.body, error.status_code, error.headers)

    return app


class LocalServer:
    """Serves an engine: `with LocalServer(engine) as server: ...` answers at `server.url`, from threads of its own;
    `run()` serves in the calling thread until it is stopped. `model`: the verifier's name or directory.

    Raises ValueError for an engine without a tokenizer, OSError for a port that is taken."""

    def __init__(self, engine: Engine, config: ServeConfig | None = None, *, model: str = "verifier"):
        self.config = config or ServeConfig()
        self.api = Api(engine, self.config, model)
        family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self.config.host, self.config.port))
        except OSError:
            self._socket.close()
            raise
        host = f"[{self.config.host}]" if family == socket.AF_INET6 else self.config.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(self.api),
                http="h11",
                ws="none",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=self.config.shutdown_s,
            )
        )
        self._thread = threading.Thread(target=self.run, name="speculators-server", daemon=True)

    def run(self) -> None:
        """Serves until `stop`, SIGINT or SIGTERM: then nobody new is let in, and answers under way may end."""
        with self._socket, suppress(KeyboardInterrupt):  # uvicorn raises it again once all has ended
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True

    def __enter__(self) -> Self:
        self._socket.listen()  # from here on connections wait until they are served
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._thread.join()
