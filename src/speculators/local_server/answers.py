"""The answers of the local server in OpenAI's form: whole ones, and chunks of streams.

Beside OpenAI's fields, as in vLLM: `stop_reason`, `token_ids` and `prompt_token_ids` (`return_token_ids`),
`prompt_logprobs`. Ours, with `return_token_origins`, in each choice:

    token_origins   [[text, who], ...]: the text in pieces; who: "draft 1", "draft 2", ... (an accepted draft by its
                    position in the round), "recovered", "bonus", or "verifier" where nothing was drafted
    round           of a chunk: num_tokens, num_accepted, draft_depth, and time_s when they came out of the engine
    spec_decode     at the end: rounds, drafts and accepted ones, as `DecodeStats` counts them
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from transformers import PreTrainedTokenizerBase

from speculators.decoding.request import AuthoredText, RequestOutput, StreamEvent, TokenLogprobs
from speculators.decoding.settings import SamplingParams
from speculators.decoding.stats import DecodeStats
from speculators.local_server.engine_thread import Call, Delta, ServerClosingError
from speculators.local_server.protocol import ApiError, Body, ChatBody, CompletionBody


@dataclass
class Asked:
    """One request on its way through the engine."""

    call: Call
    queue: asyncio.Queue[Delta | Exception]
    params: SamplingParams = field(default_factory=SamplingParams)
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    """Of the choices that have ended."""

    @property
    def num_choices(self) -> int:
        return len(self.call.prompts) * self.params.n

    async def deltas(self) -> AsyncIterator[Delta]:
        """Until all choices have ended. Raises `ApiError` where the engine fails or stops."""
        while len(self.outputs) < self.num_choices:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise ApiError(503 if isinstance(item, ServerClosingError) else 500, str(item)) from item
            if item.event.finish_reason is not None:
                self.outputs[item.choice] = item.output
            yield item

    def in_order(self) -> list[RequestOutput]:
        return [self.outputs[choice] for choice in sorted(self.outputs)]


class Answers:
    """Writes the answers to one request."""

    def __init__(self, body: Body, model_name: str, tokenizer: PreTrainedTokenizerBase):
        self.body, self.model_name, self.tokenizer = body, model_name, tokenizer
        self.is_chat = isinstance(body, ChatBody)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._texts: dict[int, AuthoredText] = {}
        self._origins: dict[int, list[tuple[str, str]]] = {}
        self._num_written: dict[int, int] = {}
        """Characters of token texts so far, for `text_offset`."""

    # -- a whole answer

    def note(self, delta: Delta, params: SamplingParams) -> None:
        """Keeps who wrote what, for an answer that is given whole."""
        if self.body.return_token_origins:
            self._origins.setdefault(delta.choice, []).extend(self._pieces(delta, params))

    def whole(self, call: Call, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """`outputs`: of all choices in order. Raises `ApiError` where one ended without its text."""
        return {
            "id": self.id,
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model_name,
            "choices": [self._choice(call, index, output) for index, output in enumerate(outputs)],
            "usage": usage_of(call, outputs),
        }

    def _choice(self, call: Call, index: int, output: RequestOutput) -> dict[str, Any]:
        refuse_failed(output)
        choice: dict[str, Any] = {"index": index}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
        else:
            choice["text"] = output.text
        choice["logprobs"] = self._logprobs(index, output.token_ids, output.logprobs)
        choice |= self._end_of(output)
        prompt = call.prompts[index // self.body.n]
        if self.body.return_token_ids:
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": prompt}
        if output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt, output.prompt_logprobs)
        if self.body.return_token_origins:
            choice["token_origins"] = self._origins.get(index, [])
        return choice

    # -- a stream

    def first_chunk(self, choice: int) -> dict[str, Any]:
        """Of a chat: says whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, call: Call, delta: Delta, params: SamplingParams, *, is_first: bool) -> dict[str, Any] | None:
        """None where nothing became readable and nothing else was asked for. Raises `ApiError` where the choice ended
        without its text."""
        event = delta.event
        refuse_failed(event)
        is_end = event.finish_reason is not None
        asks_more = self.body.return_token_ids or self.body.return_token_origins or event.logprobs is not None
        if not (event.text or is_end or (asks_more and event.token_ids)):
            return None
        choice: dict[str, Any] = {"index": delta.choice}
        if self.is_chat:
            choice["delta"] = {"content": event.text}
        else:
            choice["text"] = event.text
        choice["logprobs"] = self._logprobs(delta.choice, event.token_ids, event.logprobs)
        choice |= self._end_of(delta.output) if is_end else {"finish_reason": None}
        prompt = call.prompts[delta.choice // self.body.n]
        if self.body.return_token_ids:
            choice |= {"token_ids": event.token_ids, **({"prompt_token_ids": prompt} if is_first else {})}
        if event.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt, event.prompt_logprobs)
        if self.body.return_token_origins:
            choice["token_origins"] = self._pieces(delta, params)
            choice["round"] = {
                "num_tokens": len(event.token_ids),
                "num_accepted": event.num_accepted,
                "draft_depth": event.draft_depth,
                "time_s": delta.time_s,
            }
        return self._chunk([choice])

    def usage_chunk(self, call: Call, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage_of(call, outputs)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
            **({"usage": None} if self.body.includes_usage else {}),
        }

    # -- parts

    def _end_of(self, output: RequestOutput) -> dict[str, Any]:
        end = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
        return end | ({"spec_decode": counts_of(output.stats)} if self.body.return_token_origins else {})

    def _pieces(self, delta: Delta, params: SamplingParams) -> list[tuple[str, str]]:
        text = self._texts.setdefault(delta.choice, AuthoredText(self.tokenizer, params))
        return text.pieces(delta.event)

    def _logprobs(
        self, choice: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        tokens = [self._token(token_id) for token_id in token_ids]
        if self.is_chat:
            positions = zip(tokens, logprobs, strict=True)
            return {"content": [self._position(token, position) for token, position in positions], "refusal": None}
        start, offsets = self._num_written.get(choice, 0), []
        for token in tokens:
            offsets.append(start)
            start += len(token)
        self._num_written[choice] = start
        return {
            "tokens": tokens,
            "token_logprobs": [finite(position.logprob) for position in logprobs],
            "top_logprobs": [{self._token(i): finite(p) for i, p in position.top.items()} for position in logprobs],
            "text_offset": offsets,
        }

    def _position(self, token: str, position: TokenLogprobs) -> dict[str, Any]:
        top = [entry_of(self._token(token_id), value) for token_id, value in position.top.items()]
        return {**entry_of(token, position.logprob), "top_logprobs": top}

    def _prompt_logprobs(
        self, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> list[dict[str, Any] | None]:
        """Token id -> log-probability and text, of each token and of the likeliest; nothing precedes the first one."""
        return [
            None
            if position is None
            else {
                str(i): {"logprob": finite(value), "decoded_token": self._token(i)}
                for i, value in {**position.top, token_id: position.logprob}.items()
            }
            for token_id, position in zip(prompt, logprobs, strict=True)
        ]

    def _token(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))


def entry_of(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": finite(logprob), "bytes": list(token.encode())}


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot be drawn has vLLM's number for it."""
    return max(logprob, -9999.0)


def refuse_failed(ended: RequestOutput | StreamEvent) -> None:
    if ended.error is not None:
        raise ApiError(500, ended.error)
    if ended.finish_reason == "cancelled":
        raise ApiError(503, "the request was ended by the server")


def usage_of(call: Call, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    num_prompt, num_answer = sum(map(len, call.prompts)), sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "completion_tokens_details": {"accepted_prediction_tokens": sum(o.stats.num_accepted for o in outputs)},
    }


def counts_of(stats: DecodeStats) -> dict[str, Any]:
    return {
        "num_rounds": stats.num_rounds,
        "num_drafts": stats.num_drafts,
        "num_draft_tokens": stats.num_drafted,
        "num_accepted_tokens": stats.num_accepted,
        "drafted_per_position": stats.drafted_per_position,
        "accepted_per_position": stats.accepted_per_position,
        "acceptance_length": stats.acceptance_length,
    }


def limit_of(
    body: CompletionBody | ChatBody, prompts: Sequence[Sequence[int]], max_length: int, most: int | None
) -> int:
    """The tokens that an answer may have. Raises ValueError where prompt and answer do not fit together."""
    longest = max(map(len, prompts))
    asked = (body.max_completion_tokens if isinstance(body, ChatBody) else None) or body.max_tokens
    if asked is not None and most is not None and asked > most:
        raise ValueError(f"max_tokens={asked} must be at most {most}, this server's limit")
    if longest >= max_length:
        raise ValueError(f"the prompt has {longest} tokens; prompt and answer together have at most {max_length}")
    if asked is not None and longest + asked > max_length:
        raise ValueError(f"max_tokens={asked} with a prompt of {longest} tokens: together at most {max_length}")
    return min(most or max_length, max_length - longest) if asked is None else asked


DONE = "data: [DONE]\n\n"


def event_of(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


async def unless_disconnected(request: Request, answer: Any) -> Any:
    """The answer; raises `ApiError` (which nobody reads) once the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "the client closed the connection")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
