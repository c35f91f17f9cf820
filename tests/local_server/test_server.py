"""The local server as strangers, our own commands and Prometheus see it: keys, limits, hang-ups, counts, its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import httpx
import pytest

import speculators as sp
from speculators import assets
from speculators.cli.app import main
from speculators.decoding import DecodeStats, Engine, SamplingParams
from speculators.evaluation.server_check import server_findings
from speculators.evaluation.server_client import MeasuredServer, parse_metrics
from speculators.local_server.app import LocalServer
from speculators.local_server.metrics import Counts, prometheus_text
from speculators.local_server.protocol import ServeConfig

TINY = str(assets.tiny_verifier_path())
LISTED = "1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3,"
LONG = {"prompt": LISTED, "temperature": 0, "max_tokens": 450, "ignore_eos": True}


def metric(http: httpx.Client, line: str) -> int:
    text = http.get("/metrics").text
    return int(next(row for row in text.splitlines() if row.startswith(line)).rpartition(" ")[2])


def num_aborted(http: httpx.Client) -> int:
    return metric(http, 'vllm:request_success_total{engine="0",model_name="tiny",finished_reason="abort"}')


def until(holds, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


# -- strangers


@pytest.mark.parametrize(
    "header",
    [
        {"host": "evil.example"},
        {"origin": "http://evil.example"},
        {"host": "10.0.0.1"},
        {"host": "["},
        {"origin": "http://["},
    ],
)
def test_without_a_key_it_answers_to_names_of_this_machine_only(http, header):
    answer = http.get("/v1/models", headers=header)
    assert answer.status_code == 403 and "is no name of this machine" in answer.json()["error"]["message"]
    assert http.get("/v1/models", headers={"host": "localhost:1", "origin": "http://[::1]:9"}).is_success


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ({"content": b'{"prompt": "a"}', "headers": {"content-type": "text/plain"}}, 415, "must be application/json"),
        ({"json": {"prompt": "a" * 20_000}}, 413, "longer than 20000 bytes"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "the body is no JSON"),
        ({"content": b"[" * 15_000, "headers": {"content-type": "application/json"}}, 400, "the body is no JSON"),
        ({"content": b"\xff\xfe{", "headers": {"content-type": "application/json; charset=x"}}, 400, "no JSON"),
        ({"content": rb'{"prompt": "\ud83d"}', "headers": {"content-type": "application/json"}}, 400, "no JSON"),
        ({"json": [1]}, 400, "valid dictionary"),
        ({"json": {}}, 400, "prompt is required"),
        ({"json": {"prompt": "a", "temperature": 1e999}}, 400, "temperature"),
    ],
)
def test_bodies_are_bounded_and_json(http, sent, status, message):
    if "json" in sent and "temperature" in sent["json"]:
        sent = {"content": json.dumps(sent["json"]).encode(), "headers": {"content-type": "application/json"}}
    answer = http.post("/v1/completions", **sent)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_unknown_paths_and_verbs_are_answered_in_openais_form(http):
    assert http.get("/v2/models").json()["error"]["type"] == "not_found_error"
    refusal = http.get("/v1/completions")
    assert refusal.status_code == 405 and refusal.json()["error"]["code"] == 405
    assert http.get("/docs").status_code == http.get("/openapi.json").status_code == 404


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "lets other machines in, and no key is asked of them"),
        ({"host": "example.org"}, "lets other machines in"),
        ({"port": 70000}, "port=70000"),
        ({"api_key": " "}, "api_key"),
        ({"max_waiting": -1}, "max_waiting=-1"),
    ],
)
def test_settings_that_would_let_strangers_in_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**settings)
    assert ServeConfig(host="0.0.0.0", api_key="k").api_key == "k" and ServeConfig(host="::1").is_loopback


@pytest.fixture(scope="module")
def second(plain: Engine) -> Engine:
    """An engine that no server holds."""
    return Engine(sp.load_verifier(TINY), tokenizer=plain.tokenizer, max_length=512)


def test_a_key_is_asked_of_all_but_the_health_check(second):
    with LocalServer(second, ServeConfig(port=0, api_key="secret", playground=True)) as guarded:
        for given in ({}, {"authorization": "Bearer secres"}, {"authorization": "secret"}):
            for path in ("/v1/models", "/metrics"):
                answer = httpx.get(guarded.url + path, headers=given)
                assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
            assert httpx.post(f"{guarded.url}/v1/completions", headers=given, json={"prompt": "a"}).status_code == 401
        key = {"authorization": "Bearer secret", "host": "far.example"}
        assert httpx.get(f"{guarded.url}/v1/models", headers=key).is_success
        assert httpx.get(f"{guarded.url}/health").is_success
        assert "secret" not in httpx.get(guarded.url).text
        metrics = httpx.get(f"{guarded.url}/metrics", headers=key).text
        assert not parse_metrics(metrics).speculates  # nothing drafts, and a client can see it
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{guarded.url}/health")


# -- too many, and gone


def test_what_waits_is_bounded(http, server, monkeypatch):
    held, submit, submitted = threading.Event(), server.api.thread.submit, []
    monkeypatch.setattr(server.api.thread, "submit", lambda *args: (submitted.append(args), submit(*args))[1])
    server.api.thread.run(held.wait)
    with ThreadPoolExecutor(14) as pool:
        body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
        answers = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60) for _ in range(14)]
        until(lambda: len(submitted) == 14)
        held.set()
        answers = [answer.result() for answer in answers]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert sorted(answer.status_code for answer in answers) == [200] * 12 + [503] * 2  # 4 rows and 8 that wait
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert refused[0].json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize(("stream", "has_begun"), [(True, True), (True, False), (False, False)])
def test_a_client_that_hangs_up_ends_its_request(http, server, stream, has_begun):
    before = num_aborted(http)
    held = threading.Event()
    if has_begun:
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as answer:
            next(answer.iter_lines())
            server.api.thread.run(held.wait)  # so that it does not end by itself before we hang up
    else:
        server.api.thread.run(held.wait)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": stream}, timeout=0.5)
    time.sleep(0.2)
    held.set()
    until(lambda: metric(http, "vllm:num_requests_running") == 0)
    assert (
        metric(http, 'vllm:request_success_total{engine="0",model_name="tiny",finished_reason="abort"}') == before + 1
    )


def test_no_number_of_one_request_ends_those_of_others(http):
    asked = {"prompt": LISTED, "max_tokens": 4, "temperature": 1, "seed": 3}
    expected = http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    large = http.post("/v1/completions", json={**asked, "top_k": 2**70})
    assert large.json()["choices"][0]["text"] == expected  # more than there are: all tokens
    small = http.post("/v1/completions", json={**asked, "top_p": 1e-60}).json()["choices"][0]["text"]
    assert small == http.post("/v1/completions", json={**asked, "temperature": 0}).json()["choices"][0]["text"]


def test_an_error_of_the_engine_ends_the_requests_that_run_and_no_others(http, engine, monkeypatch):
    proposer = engine.drafters.methods[0].proposer

    def fail(*args):
        raise RuntimeError("the drafter broke")

    monkeypatch.setattr(proposer, "propose", fail)
    answer = http.post("/v1/completions", json={**LONG, "max_tokens": 8})
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "the drafter broke"
    stream = http.post("/v1/completions", json={**LONG, "max_tokens": 8, "stream": True})
    assert stream.status_code == 200 and '"message": "the drafter broke"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    monkeypatch.undo()
    assert http.get("/health").is_success
    assert http.post("/v1/completions", json={**LONG, "max_tokens": 8}).is_success


def test_a_stopped_server_ends_the_answers_under_way_and_lets_nobody_in(second, plain):
    server = LocalServer(second, ServeConfig(port=0))
    body = {**LONG, "max_tokens": 60, "stream": True}
    with server, httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.stop()
        rest = [line for line in lines if line]
    pieces = [json.loads(line.removeprefix("data: ")) for line in [first, *rest[:-1]]]
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert rest[-1] == "data: [DONE]"
    assert text == plain.generate([LISTED], SamplingParams(max_tokens=60, ignore_eos=True))[0].text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


# -- our own commands


def test_counts_have_vllms_names_and_are_the_engines(http, server, plain):
    with closing(MeasuredServer(server.url, timeout_s=60, max_retries=0, max_clients=2)) as measured:
        prompts = [plain.tokenizer(LISTED)["input_ids"], plain.tokenizer("5, 6, 5, 6, 5,")["input_ids"]]
        measurement, counted = measured.measure(prompts, SamplingParams(max_tokens=24))
    expected = plain.generate(prompts, SamplingParams(max_tokens=24))
    assert list(map(list, measurement.token_ids)) == [output.token_ids for output in expected]
    assert counted.num_generated == sum(len(output.token_ids) for output in expected)
    assert counted.speculates and 0 < counted.num_accepted <= counted.num_drafted
    assert len(counted.accepted_per_position) == 6 and sum(counted.accepted_per_position) == counted.num_accepted


def test_positions_are_counted_up_to_the_number_of_drafts_and_deeper_once_they_were_drafted():
    none = Counts(DecodeStats(), 0, Counter(), 0, 0)
    deep = replace(none, stats=DecodeStats(Counter({(5, 5, 4): 2, (3, 3, 0): 1}), num_tokens=11))
    before, after = (parse_metrics(prometheus_text(counts, 'a"b', 3)) for counts in (none, deep))
    assert before.accepted_per_position == (0, 0, 0) and before.speculates
    assert after.accepted_per_position == (2, 2, 2, 2, 0)
    counted = after.since(before)
    assert counted.accepted_per_position == (2, 2, 2, 2, 0) and not counted.went_backwards
    assert (counted.num_drafts, counted.num_drafted, counted.num_accepted, counted.num_generated) == (3, 13, 8, 11)


def test_check_and_regenerate_take_it_for_a_server(http, server, tmp_path):
    http.post("/v1/completions", json={**LONG, "max_tokens": 40})
    assert list(server_findings(server.url, "some/drafter", TINY)) == []
    assert [f.code for f in server_findings(server.url, "d", assets_of_another(tmp_path))][:1] == ["server-other-model"]
    rows = [{"conversations": [{"role": "user", "content": f"Say {n}."}]} for n in (3, 4)]
    written = []
    for name, options in (("served", {"endpoints": f"{server.url}/v1"}), ("here", {})):
        sp.regenerate(TINY, rows, output=tmp_path / f"{name}.jsonl", max_tokens=12, temperature=0.0, **options)
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        written.append([(row["input_ids"], row["loss_mask"]) for row in map(json.loads, lines)])
    assert written[0] == written[1] and len(written[0]) == 2


def assets_of_another(folder) -> str:
    """A copy of the verifier's tokenizer under another name."""
    other = folder / "another-model"
    other.mkdir()
    for file in assets.tiny_verifier_path().iterdir():
        if file.suffix in (".json", ".jinja"):
            (other / file.name).write_bytes(file.read_bytes())
    return str(other)


# -- the commands


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve-local"], "name a speculator, or a verifier"),
        (["serve-local", TINY, "--verifier", TINY], "is no speculator, and --verifier"),
        (["serve-local", TINY, "-k", "3"], "nothing drafts"),
        (["serve-local", TINY, "--host", "0.0.0.0"], "no key is asked of them"),
        (["serve-local", TINY, "--api-key-env", "NO_SUCH_KEY"], "this environment variable is not set"),
        (["serve-local", TINY, "--api-key", ""], "api_key must be text in ASCII that is not blank"),
        (["serve-local", TINY, "--api-key", "k", "--api-key-env", "HOME"], "--api-key and --api-key-env"),
        (["playground", TINY, "--method", "ngrm"], "ngram"),
    ],
)
def test_a_command_that_cannot_serve_says_why(words, said, capsys):
    assert main(words) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "speculators.local_server.app", None)
    assert main(["serve-local", TINY]) == 2
    assert "pip install 'speculators[serve-local]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--host", "0.0.0.0"]])
def test_the_playground_opens_on_the_embedded_verifier(words, capsys, monkeypatch):
    seen = {}

    def ask_and_stop(server: LocalServer) -> None:
        at = f"http://127.0.0.1:{server.url.rpartition(':')[2]}"
        until(lambda: answers(f"{at}/health"))
        seen.update({path: httpx.get(at + path) for path in ("/", "/v1/models")})
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C

    def run_meanwhile(server: LocalServer) -> None:
        thread = threading.Thread(target=ask_and_stop, args=(server,))
        thread.start()
        run(server)
        thread.join()

    run = LocalServer.run
    monkeypatch.setattr(LocalServer, "run", run_meanwhile)
    assert main(["playground", "--port", "0", *words]) == 0
    said = capsys.readouterr()
    assert seen["/"].is_success and "default-src 'none'" in seen["/"].headers["content-security-policy"]
    assert seen["/v1/models"].status_code == (401 if words else 200)
    assert ("#token=" in said.err) == bool(words)
    assert json.loads(said.out.splitlines()[-1])["verb"] == "playground"


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.ConnectError:
        return False
