"""OpenAI's client library talks to the local server; every text is that of our own engine decoding plainly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from speculators.decoding import Engine, SamplingParams
from speculators.decoding.chat import openai_messages
from speculators.decoding.request import RequestOutput, TokenLogprobs
from speculators.local_server.answers import Answers
from speculators.local_server.app import LocalServer
from speculators.local_server.engine_thread import Call
from speculators.local_server.protocol import ChatBody
from speculators.utils.chat_template import chat_prompt

QUESTION = "Write the numbers from one to ten, and again from one to ten."
MESSAGES = [{"role": "user", "content": QUESTION}]
LISTED = "1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3,"
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TRANSPORT = {"messages", "model", "prompt", "stream", "timeout", "extra_headers", "extra_query", "extra_body"}


@pytest.fixture
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="not asked for", max_retries=0) as client:
        yield client


def answer_of(plain: Engine, **sampling) -> str:
    return plain.chat(QUESTION, **sampling).text


def test_the_model_is_listed_with_its_methods(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 512
    assert model.speculative_methods == {"ngram": 6, "suffix": 6}
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_is_answered_as_the_engine_answers_it(client, plain):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, temperature=0)
    assert answer.choices[0].message.content == answer_of(plain, max_tokens=20)
    assert answer.choices[0].finish_reason == "length"
    tokens = len(chat_prompt(plain.tokenizer, QUESTION))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 20)


def test_pieces_of_a_stream_make_up_the_answer_and_usage_comes_last(client, plain):
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, end = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer_of(plain, max_tokens=20)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert end.choices == [] and end.usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks)


def test_characters_of_several_tokens_arrive_whole(client, plain):
    prompt = "Übung: 你好 🙂 déjà vu. 你好 🙂 déjà vu. 你好"
    stream = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in stream)
    expected = plain.generate([prompt], SamplingParams(max_tokens=20))[0].text
    assert text == expected
    biased = {str(i): 100 for i in plain.tokenizer("🙂", add_special_tokens=False)["input_ids"][:1]}
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=3, temperature=0, stream=True, logit_bias=biased
    )
    params = SamplingParams(max_tokens=3, logit_bias={int(i): 100.0 for i in biased})
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.generate(["x"], params)[0].text


def test_prompts_of_a_completion_are_texts_or_tokens_and_each_has_its_samples(client, plain):
    ids = plain.tokenizer(LISTED)["input_ids"]
    for prompt in (LISTED, ids, [LISTED, LISTED], [ids, ids]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0.8, seed=5, n=2)
        num_prompts = 2 if isinstance(prompt[0], list | str) and not isinstance(prompt, str) else 1
        assert [choice.index for choice in answer.choices] == list(range(2 * num_prompts))
        expected = plain.generate([LISTED], SamplingParams(max_tokens=8, temperature=0.8, seed=5, n=2))[0]
        texts = [output.text for output in expected.outputs]
        assert [choice.text for choice in answer.choices] == texts * num_prompts
        assert answer.usage.completion_tokens == sum(len(o.token_ids) for o in expected.outputs) * num_prompts


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.02, "seed": 11},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"stop": ["3,"], "min_tokens": 2},
        {"logit_bias": {"5": -20.0}, "bad_words": ["4"], "stop_token_ids": [7], "ignore_eos": True},
    ],
)
def test_sampling_settings_mean_what_they_mean_in_the_engine(client, plain, sampling):
    settings = {"temperature": 0.0, **sampling}
    ours = dict(settings)
    if "logit_bias" in ours:
        ours["logit_bias"] = {int(i): bias for i, bias in ours["logit_bias"].items()}
    expected = plain.generate([LISTED], SamplingParams(max_tokens=16, **ours))[0]
    names = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "stop", "logit_bias")
    openai_own = {name: value for name, value in settings.items() if name in names}
    extra = {name: value for name, value in settings.items() if name not in names} | {"return_token_ids": True}
    answer = client.completions.create(model="tiny", prompt=LISTED, max_tokens=16, **openai_own, extra_body=extra)
    choice = answer.choices[0]
    assert (choice.text, choice.token_ids) == (expected.text, expected.token_ids)
    assert (choice.finish_reason, choice.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert choice.prompt_token_ids == expected.prompt_token_ids


def test_log_probabilities_are_the_engines(client, plain):
    expected = plain.generate([LISTED], SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=1))[0]
    whole = client.completions.create(
        model="tiny", prompt=LISTED, max_tokens=5, temperature=0, logprobs=2, extra_body={"prompt_logprobs": 1}
    ).choices[0]
    tokens = [plain.tokenizer.decode([i]) for i in expected.token_ids]
    assert whole.logprobs.tokens == tokens and whole.logprobs.text_offset[1] == len(tokens[0])
    own = [position.logprob for position in expected.logprobs]
    assert whole.logprobs.token_logprobs == pytest.approx(own, abs=1e-4)
    assert whole.prompt_logprobs[0] is None and len(whole.prompt_logprobs) == len(expected.prompt_token_ids)
    second = whole.prompt_logprobs[1][str(expected.prompt_token_ids[1])]
    assert second["logprob"] == pytest.approx(expected.prompt_logprobs[1].logprob, abs=1e-4)
    chat = plain.chat(QUESTION, max_tokens=4, logprobs=3)
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    entries = [entry for chunk in stream for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx([p.logprob for p in chat.logprobs], abs=1e-4)
    assert all(len(entry.top_logprobs) == 3 and bytes(entry.bytes).decode() == entry.token for entry in entries)


SAID = [
    {"num_speculative_tokens": 0},
    {"num_speculative_tokens": 6},
    {},
    {"speculative_method": "suffix", "num_speculative_tokens": 2},
    {"speculative_method": "none"},
    {"num_speculative_tokens": 1},
]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.7, "seed": 4}])
def test_requests_at_once_with_their_own_number_and_method_get_the_text_of_plain_decoding(client, plain, sampling):
    expected = plain.generate([LISTED], SamplingParams(max_tokens=24, **sampling))[0].text

    def ask(extra: dict) -> tuple[str, dict]:
        body = {**extra, "return_token_origins": True}
        choice = client.completions.create(
            model="tiny", prompt=LISTED, max_tokens=24, extra_body=body, **sampling
        ).choices[0]
        assert "".join(text for text, _ in choice.token_origins) == choice.text
        return choice.text, choice.spec_decode

    with ThreadPoolExecutor(len(SAID)) as pool:
        answers = list(pool.map(ask, SAID))
    assert [text for text, _ in answers] == [expected] * len(SAID)
    deepest = [len(counts["drafted_per_position"]) for _, counts in answers]
    assert deepest[0] == deepest[4] == 0 and deepest[1] == deepest[2] == 6
    assert deepest[5] == 1 and deepest[3] <= 2
    assert answers[1][1]["num_accepted_tokens"] > 0


def test_a_stream_says_who_wrote_each_piece(client, plain):
    stream = client.completions.create(
        model="tiny",
        prompt=LISTED,
        max_tokens=32,
        temperature=0,
        stream=True,
        extra_body={"return_token_origins": True},
    )
    pieces, rounds, end = [], [], None
    for chunk in stream:
        choice = chunk.choices[0]
        assert "".join(text for text, _ in choice.token_origins) == choice.text
        pieces += choice.token_origins
        rounds.append(choice.round)
        end = choice.spec_decode if choice.finish_reason else end
    assert "".join(text for text, _ in pieces) == plain.generate([LISTED], SamplingParams(max_tokens=32))[0].text
    drafts = [who for _, who in pieces if who.startswith("draft ")]
    assert "draft 1" in drafts and {who for _, who in pieces} <= {*drafts, "verifier", "recovered", "bonus"}
    assert sum(r["num_tokens"] for r in rounds) == 32
    assert [r["time_s"] for r in rounds] == sorted(r["time_s"] for r in rounds)
    assert end["num_rounds"] == len(rounds) - 1 and end["num_accepted_tokens"] >= sum(r["num_accepted"] for r in rounds)


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "the model 'gpt-4' is not served; this server has 'tiny'"),
        ({"temperature": -1}, 400, "temperature=-1.0 must be 0"),
        ({"top_p": 0}, 400, "top_p=0.0 must be in (0, 1]"),
        ({"max_tokens": 600}, 400, "max_tokens=600 with a prompt of"),
        ({"max_tokens": 0}, 400, "max_tokens: must be greater than or equal to 1, got 0"),
        ({"logit_bias": {"5": 101}}, 400, "must be in [-100, 100]"),
        ({"logit_bias": {"x": 1}}, 400, "must map token ids to numbers"),
        ({"n": 50, "temperature": 1}, 400, "50 samples; this server takes 12 at once"),
        ({"n": 2, "temperature": 0}, 400, "n=2 at temperature 0 gives equal samples"),
        ({"extra_body": {"num_speculative_tokens": 7}}, 400, "this engine's 'ngram' drafts at most 6"),
        ({"extra_body": {"speculative_method": "eagle"}}, 400, "is none of this engine's: ['none', 'ngram', 'suffix']"),
        ({"extra_body": {"guided_json": {}}}, 400, "guided_json"),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"prompt": [99999999]}, 400, "outside the verifier's vocabulary"),
        ({"prompt": ["a"] * 13}, 400, "13 prompts with n=1 are 13 samples"),
        ({"stream_options": {"include_usage": True}}, 400, "only with stream=true"),
    ],
)
def test_what_is_wrong_is_named_with_its_rule_as_openai_names_errors(client, request_, status, message):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4, **request_}
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(**body)
    assert raised.value.status_code == status and message in raised.value.message
    assert raised.value.body["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a content part of type 'image_url'"),
        ({"response_format": {"type": "json_object"}}, "answers are free text here"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported: tools are not called"),
        (
            {"messages": [*MESSAGES, CALLED]},
            "messages have tool_calls, which this model's chat template does not render",
        ),
        ({"top_logprobs": 3}, "only with logprobs=true"),
        ({"messages": [{"role": "user"}]}, "a message of the role 'user' needs content"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "'chat_template' is no variable"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "'tokenize' is no variable of a template"),
        ({"stop": ["x"] * 65}, "stop has 65 texts; at most 64"),
    ],
)
def test_a_chat_that_cannot_be_answered_as_asked_is_refused(client, request_, message):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **request_})
    assert message in raised.value.message


def test_infinite_log_probabilities_are_numbers_in_json():
    position = TokenLogprobs(-math.inf, {0: -math.inf})
    answers = Answers(ChatBody(messages=[{"role": "user", "content": "a"}]), "tiny", Letters())
    call, output = Call(print, prompts=[[0]]), RequestOutput([0], [0], "a", "length", logprobs=[position])
    (entry,) = answers.whole(call, [output])["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


class Letters:
    def decode(self, token_ids, skip_special_tokens=True):
        return "a" * len(token_ids)


def test_fields_that_change_no_text_are_ignored_and_null_is_the_default(client, plain):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        max_tokens=6,
        temperature=0,
        top_p=None,
        user="somebody",
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == answer_of(plain, max_tokens=6)


TAKEN = {
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 2,
    "seed": 3,
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "user": "somebody",
}
TAKEN_IN_CHATS = {
    "max_completion_tokens": 3,
    "logprobs": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": False,
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "a",
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "implicit"},
}
NEEDS_MORE = {"top_logprobs": 2, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_setting_of_the_client_is_followed_or_refused_by_its_name(client, kind):
    create = client.chat.completions.create if kind == "chat" else client.completions.create
    asked = {"model": "tiny", **({"messages": MESSAGES} if kind == "chat" else {"prompt": LISTED})}
    taken = {**TAKEN, **(TAKEN_IN_CHATS if kind == "chat" else {"best_of": 1, "logprobs": 2, "echo": False})}
    known = set(inspect.signature(create).parameters) - TRANSPORT
    assert {"seed", "stop", "n", "logprobs", "stream_options"} <= known
    for name in sorted(known):
        if name in taken:
            assert create(**{**asked, "max_tokens": 2, name: taken[name]}).choices, name
            continue
        with pytest.raises(openai.BadRequestError) as raised:
            create(**asked, **{name: NEEDS_MORE.get(name, "x")})
        assert raised.value.param == name and name in raised.value.message


def test_tool_calls_reach_the_template_as_objects_and_parts_as_texts():
    template = "{% for message in messages %}{{ message.tool_calls }}{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    result = {"role": "tool", "tool_call_id": "1", "content": parts}
    called, answered, plain = openai_messages([CALLED, result, {**CALLED, "tool_calls": []}], template)
    assert called["tool_calls"] == [{**CALL, "function": {"name": "add", "arguments": {"a": 1}}}]
    assert called["content"] == "" and answered == {**result, "content": "a\nb"} and "tool_calls" not in plain
    for arguments in ("{", "[1]", "[" * 100_000):
        call = {**CALL, "function": {"name": "add", "arguments": arguments}}
        with pytest.raises(ValueError, match="are no JSON object"):
            openai_messages([{**CALLED, "tool_calls": [call]}], template)
    with pytest.raises(ValueError, match="is no call of a function"):
        openai_messages([{**CALLED, "tool_calls": ["add"]}], template)
