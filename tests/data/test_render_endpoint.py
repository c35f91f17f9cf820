"""Rows compared with what a server renders: the same template passes, of another one the first difference is shown."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from chats import CHATML, chat, family_tokenizer, make_tokenizer, write_jsonl

from speculators.data_generation import (
    InvalidResponseError,
    RenderError,
    ServerUnavailableError,
    prepare_data,
    render_conversation,
    tokenizing,
    vllm_client,
)
from speculators.utils.chat_template import ChatRenderer

CHATS = [chat("hi", "hello"), chat("a", "b", "c", "d"), {"input_ids": [1, 2], "loss_mask": [0, 1]}]
TOOLS = [
    {"role": "user", "content": "2+3?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "Add.",
        "tool_calls": [{"id": "abcdefghi", "function": {"name": "add", "arguments": '{"a": 2}'}}],
    },
    {"role": "tool", "content": "5", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Five.", "weight": 1},
]


def client_of(reply) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(reply), base_url="http://server/v1/")


@pytest.fixture
def serve(monkeypatch):
    """Has the given tokenizer render in place of a server, as vLLM does; the requests that it got."""
    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.01)

    def start(tokenizer, faults: tuple[int, ...] = ()) -> list[dict[str, Any]]:
        requests: list[dict[str, Any]] = []
        codes = list(faults)

        def reply(request: httpx.Request) -> httpx.Response:
            assert request.url.path == "/v1/chat/completions/render"
            if codes:
                return httpx.Response(codes.pop(0), text="injected")
            asked = json.loads(request.content)
            requests.append(json.loads(request.content))
            for message in asked["messages"]:
                for call in message.get("tool_calls", ()):
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            renderer = ChatRenderer(tokenizer, asked.get("chat_template_kwargs"))
            ids = renderer.token_ids(
                asked["messages"], asked.get("tools"), add_generation_prompt=asked["add_generation_prompt"]
            )
            return httpx.Response(200, json={"token_ids": ids})

        monkeypatch.setattr(tokenizing, "make_render_client", lambda endpoint: client_of(reply))
        return requests

    return start


def prepared_by(model_dir, tmp_path, rows, **options):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    return prepare_data(
        model_dir, data, output=tmp_path / "out", seq_length=400, render_endpoint="http://server", **options
    )


def test_the_same_rendering_is_counted_and_transient_failures_are_tried_again(serve, model_dir, tokenizer, tmp_path):
    requests = serve(tokenizer, faults=(503, 429))
    prepared = prepared_by(model_dir, tmp_path, CHATS)
    assert prepared.manifest.num_rendered_elsewhere == 2  # rows of tokens are rendered nowhere
    assert len(requests) == 4 and [r["add_generation_prompt"] for r in requests] == [True, False] * 2


@pytest.mark.parametrize("family", ["qwen3", "glm45", "gpt_oss", "command_r", "mistral_v3"])
def test_tools_and_reasoning_are_sent_as_openai_writes_them(serve, model_dir, tmp_path, family):
    requests = serve(family_tokenizer(family))
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    prepared = prepared_by(
        model_dir,
        tmp_path,
        [{"messages": TOOLS, "tools": [add]}],
        tokenizer=family_tokenizer(family),
        chat_template_kwargs={"template_date": None},
        drop_reasoning=True,
    )
    assert prepared.manifest.num_rendered_elsewhere == 1
    sent = requests[1]["messages"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2}'}
    assert "weight" not in sent[3] and "chat_template_kwargs" not in requests[1]


@pytest.mark.parametrize(
    ("template", "difference"),
    [
        (CHATML.replace("assistant\n", "assistant:"), "the answer begins at token 11 here, at 10 there"),
        (
            "{{ bos }}system " + CHATML,
            r"token 0 begins '<\|im_start\|>user.*' here, 'system <\|im_start\|>user.*' there",
        ),
        (CHATML.replace("{% if add", "{% if false and add"), "the answer begins at token 11 here, at 7 there"),
    ],
)
def test_another_rendering_is_an_error_that_shows_where(serve, model_dir, tmp_path, template, difference):
    serve(make_tokenizer(template))
    with pytest.raises(ValueError, match=rf"renders 1 of 1 conversations otherwise.*row 0.*{difference}"):
        prepared_by(model_dir, tmp_path, CHATS[:1])
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_render_is_named(serve, model_dir, tokenizer, tmp_path):
    serve(tokenizer, faults=(403,))
    with pytest.raises(ValueError, match="403: injected"):
        prepared_by(model_dir, tmp_path, CHATS[:1])
    serve(tokenizer, faults=(500,) * 4)
    with pytest.raises(ServerUnavailableError, match="500: injected: 4 attempts"):
        prepared_by(model_dir, tmp_path, CHATS[:1])


@pytest.mark.parametrize(
    ("code", "body", "error"),
    [
        (400, {}, InvalidResponseError),
        (404, {}, InvalidResponseError),
        (408, {}, RenderError),
        (429, {}, RenderError),
        (500, {}, RenderError),
        (200, {}, RenderError),
        (200, {"token_ids": ["a"]}, RenderError),
    ],
)
def test_errors_of_rendering_say_whether_another_attempt_helps(code, body, error):
    with client_of(lambda request: httpx.Response(code, json=body)) as client, pytest.raises(error):
        render_conversation(client, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
