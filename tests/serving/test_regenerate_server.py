"""Answers from servers with OpenAI's interface: bounded, retried, failed over, with the tokens that a server gives."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time

import httpx
import pytest
from fakes import FakeServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speculators import api
from speculators.cli.app import main, run
from speculators.data_generation import ServerUnavailableError
from speculators.data_generation.endpoints import Endpoint

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
ROWS = [{"id": f"c{i}", "turns": [f"question {i} {turn}" for turn in range(1 + i % 3)]} for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """What regeneration from servers reads of a verifier: tokenizer, template, config. A letter is its code."""
    path = tmp_path_factory.mktemp("models") / "letters"
    vocab = {"<|im_end|>": 0, "<|im_start|>": 1, **{chr(code): code for code in range(32, 127)}, "\u0120": 127}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML).save_pretrained(
        path
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128, "eos_token_id": 0}))
    return str(path)


@pytest.fixture
def start_server(start_fake, model):
    def start(*flags: str, answers: str = "tokens", name: str = "fake", port: int = 0) -> FakeServer:
        return start_fake("--model", model, "--answers", answers, "--length", "400", *flags, name=name, port=port)

    return start


@pytest.fixture
def answered(model, tmp_path, fast_retries):
    """Answers rows with servers; returns the report and the rows that were written."""

    def regenerate(*servers: FakeServer, name: str = "out", rows=None, **settings):
        output = tmp_path / f"{name}.jsonl"
        settings = {"temperature": 1.0, "batch_size": 4, **settings}
        report = api.regenerate(
            model, ROWS if rows is None else rows, output=output, endpoints=[s.endpoint for s in servers], **settings
        )
        return report, [json.loads(line) for line in output.read_text().splitlines()]

    return regenerate


def content(rows: list[dict]) -> list[tuple]:
    return [(row["id"], row["input_ids"], row["loss_mask"]) for row in rows]


def test_the_servers_tokens_are_kept_in_the_order_of_the_source(start_server, answered):
    report, rows = answered(start_server("--delay", "0.01"))
    assert (report.num_conversations, report.num_rows, report.num_failed, report.num_from_text) == (12, 24, 0, 0)
    assert [row["id"] for row in rows] == [f"c{i}_gen{turn}" for i in range(12) for turn in range(1 + i % 3)]
    first = rows[0]
    num_prompt = first["loss_mask"].index(1)
    assert "".join(map(chr, first["input_ids"][num_prompt:-1])) + "<|im_end|>" == first["text"]
    assert first["input_ids"][-1] == 0 and first["metadata"]["finish_reason"] == "stop"
    assert (
        rows[2]["text"] in rows[4]["text"] or rows[1]["input_ids"] == rows[2]["input_ids"][: len(rows[1]["input_ids"])]
    )


def test_at_most_so_many_conversations_are_asked_at_once(start_server, answered, tmp_path):
    server = start_server("--delay", "0.1")
    answered(server, batch_size=3)
    assert 1 < int((server.folder / "in_flight.txt").read_text()) <= 3  # a loaded machine may not get to three


def test_errors_and_busy_servers_are_tried_again(start_server, answered):
    _, expected = answered(start_server(name="calm"))
    server = start_server()
    server.inject("500", "503", "drop", "429", "500")
    report, rows = answered(server, name="again")
    assert report.num_failed == 0 and content(rows) == content(expected)


def test_a_busy_server_is_left_alone_as_long_as_it_says(start_server, answered):
    server = start_server()
    server.inject("429 1")
    begun_s = time.monotonic()
    report, _ = answered(server, rows=ROWS[:1])
    assert time.monotonic() - begun_s > 1 and report.num_failed == 0
    assert server.log == ["429 1", "ok"]


def test_a_server_that_dies_gives_its_conversations_to_another(start_server, answered):
    _, expected = answered(start_server(name="calm"))
    dying, other = start_server(name="dying"), start_server(name="other")
    dying.inject("", "", "die")
    report, rows = answered(dying, other, name="failed_over")
    assert report.num_failed == 0 and content(rows) == content(expected)
    assert dying.log.count("die") == 1
    # an answer that was under way when the server died is asked for again
    assert 24 - dying.log.count("ok") <= len(other.log) <= 24


def test_a_server_that_is_not_there_at_the_start_is_left_out(start_server, answered, caplog):
    gone, there = start_server(name="gone"), start_server(name="there")
    gone.end()
    report, _ = answered(gone, there)
    assert report.num_failed == 0 and "going on without this server" in caplog.text
    with pytest.raises(ServerUnavailableError, match=r"no answer from .*2 attempts"):
        answered(gone, name="none", max_retries=1)


def test_a_server_killed_and_started_again_loses_nothing(start_server, answered):
    _, expected = answered(start_server(name="calm"))
    server = start_server()
    server.inject(*[""] * 7, "die")
    restart = server.when_it_dies(lambda: start_server(port=server.port))
    report, rows = answered(server, name="restarted", max_retries=12)
    restart.join()
    assert report.num_failed == 0 and content(rows) == content(expected)


def test_a_server_without_token_ids_gives_text_that_is_tokenised_here(start_server, answered):
    _, expected = answered(start_server(name="tokens"))
    report, rows = answered(start_server(answers="text"), name="text")
    assert content(rows) == content(expected)
    assert report.num_from_text == 24 and all(row["metadata"]["tokenised_from_text"] for row in rows)


def test_a_server_that_takes_only_messages_is_asked_with_them(start_server, answered):
    _, expected = answered(start_server(name="tokens"))
    report, rows = answered(start_server(answers="chat"), name="chat")
    assert content(rows) == content(expected)
    assert report.num_from_text == 24 and report.num_failed == 0


def test_a_refusal_that_arrives_after_another_thread_found_the_form_is_no_failure():
    """Two requests were on their way when the server's form was not known: the later refusal counted as an answer."""
    both, found, num_refused = threading.Barrier(2, timeout=5), threading.Event(), itertools.count()

    def handle(request):
        if "return_token_ids" not in json.loads(request.content):
            return httpx.Response(200, json={"answered": True})
        both.wait()
        if next(num_refused) == 0:
            assert found.wait(5)
        return httpx.Response(400, json={})

    client = httpx.Client(base_url="http://server/v1/", transport=httpx.MockTransport(handle))
    endpoint, bodies = Endpoint("server", client), []

    def ask():
        bodies.append(endpoint.complete({"completions": {"prompt": [1]}}, {"return_token_ids": True}))
        found.set()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [{"answered": True}] * 2


def test_servers_of_different_models_are_refused(start_fake, start_server, answered):
    other = start_fake("--model", "/models/other", name="other")
    with pytest.raises(ValueError, match="the endpoints serve different models"):
        answered(start_server(), other)
    with pytest.raises(ValueError, match="a server drafts by itself"):
        answered(other, drafter="ngram")


def test_the_command_asks_servers_with_a_key_and_says_what_it_cannot_use(start_server, model, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    server = start_server("--authorization", "Bearer secret")
    words = ["regenerate-responses", "--model", model, "--data", str(data), "--output", str(tmp_path / "out.jsonl")]
    words += ["--endpoint", server.endpoint, "--temperature", "1", "--limit", "3", "--max-retries", "0"]
    assert main([*words, "--api-key-env", "NOT_SET_ANYWHERE"]) == 2
    with pytest.raises(ValueError, match=r"3 failed, the first by .* answered 401"):
        run(words)
    monkeypatch.setenv("KEY_OF_THE_TEST", "secret")
    assert run([*words, "--api-key-env", "KEY_OF_THE_TEST"])["num_conversations"] == 3
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("out.*"))


NUM_KILLS = int(os.environ.get("SPECULATORS_NUM_KILLS", "2"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_runs_end_in_what_an_uninterrupted_one_writes(start_server, answered, tmp_path):
    server = start_server("--delay", "0.01")
    answered(server, name="whole")
    whole, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    rng, num_done = random.Random(0), []
    for _ in range(NUM_KILLS):
        out.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                answered(server)
            finally:
                os._exit(0)
        num_bytes = rng.randint(0, len(whole) * 3 // 4)
        while not (out.exists() and out.stat().st_size >= num_bytes):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.truncate(out, rng.randint(0, out.stat().st_size))
        report, _ = answered(server, resume=True)
        num_done.append(report.num_already_done)
        assert out.read_bytes() == whole
    assert all(number < len(ROWS) for number in num_done) and any(num_done), num_done
