"""A server's counters read as our statistics, and its house table: hand-worked counts, faults, a server that dies."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter

import pytest

from speculators import assets
from speculators.cli.app import main, run
from speculators.decoding.stats import DecodeStats
from speculators.evaluation.server_client import ServerCounters, parse_metrics, stats_of

pytestmark = pytest.mark.usefixtures("fast_retries")

VERIFIER, DATA = str(assets.tiny_verifier_path()), str(assets.prompts_path("heldout"))
TEXT = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="/a\\"}b"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="/a"} 2.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="/a"} 3.6e+01
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="2"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 4.0
vllm:generation_tokens_total{engine="0"} 30.0
vllm:e2e_latency_quantile{engine="0"} NaN
python_gc_objects_collected_total{generation="0"} 7.0
"""


def test_metrics_are_parsed_and_engines_added_up():
    counters = parse_metrics(TEXT)
    assert counters == ServerCounters(12, 36, 15, (8, 4, 3), 30, 0, True)
    assert not parse_metrics("vllm:generation_tokens_total 3.0").speculates


def test_differences_and_restarts():
    early, late = parse_metrics(TEXT), parse_metrics(TEXT.replace("30.0", "41.0"))
    assert late.since(early).num_generated == 11
    assert not late.since(early).went_backwards
    assert early.since(late).went_backwards


def test_counts_become_the_rounds_they_came_from():
    """12 rounds of 3 drafts: 4 accept none, 4 one, 1 two, 3 all; 2 first tokens, 15 + 12, and 3 without a draft."""
    stats = stats_of(parse_metrics(TEXT), num_tokens=32, num_requests=2)
    expected: Counter[tuple[int, int, int]] = Counter(
        {(3, 3, 0): 4, (3, 3, 1): 4, (3, 3, 2): 1, (3, 3, 3): 3, (0, 0, 0): 3}
    )
    assert stats.rounds == expected
    assert stats.acceptance_length == 1 + 15 / 15
    assert stats.acceptance_rate == 15 / 36
    assert stats.conditional_rates == [8 / 12, 4 / 8, 3 / 4]
    always_drafting = stats_of(parse_metrics(TEXT), num_tokens=28, num_requests=2)  # an answer was cut
    assert always_drafting.acceptance_length == 1 + 15 / 12


def test_drafts_of_different_lengths_keep_their_sum():
    counted = ServerCounters(5, 12, 4, (3, 1), 11, 0)
    stats = stats_of(counted, num_tokens=11, num_requests=2)
    assert (stats.num_drafts, stats.num_drafted, stats.num_accepted) == (5, 12, 4)
    assert stats_of(ServerCounters(0, 0, 0, (0, 0), 4, 0), 4, 1).acceptance_length == 1.0


def evaluate(server, *flags: str) -> dict:
    return run(["evaluate", "--server", server.endpoint, "--data", DATA, "--verifier", VERIFIER, *flags])


def rounds_of_the_fake(num_tokens: int) -> DecodeStats:
    """The fake accepts 3, 0, 1, 3, 0, 1, ... of 3 drafts until it has enough tokens."""
    stats, emitted = DecodeStats(), 1
    while emitted < num_tokens:
        accepted = (3, 0, 1)[stats.num_rounds % 3]
        stats.record(3, 3, accepted)
        emitted += accepted + 1
    return stats


@pytest.mark.parametrize("clients", ["1", "1,4"])
def test_the_results_table_of_a_server_beside_a_plain_one(start_fake, clients, tmp_path, capsys):
    server, plain = start_fake("--drafts"), start_fake("--plain", name="plain")
    report = tmp_path / "report.json"
    result = evaluate(
        server,
        "--baseline-server",
        plain.endpoint,
        "--num-prompts",
        "6",
        "--max-tokens",
        "20",
        "--concurrency",
        clients,
        "--method",
        "eagle3",
        "--lossless",
        "--output",
        str(report),
    )
    expected = rounds_of_the_fake(20)
    assert [row["num_clients"] for row in result["rows"]] == [int(number) for number in clients.split(",")]
    for row in result["rows"]:
        assert (row["method"], row["num_speculative_tokens"], row["num_prompts"]) == ("eagle3", 3, 6)
        assert row["num_tokens"] == 6 * 20
        assert row["acceptance_length"]["value"] == pytest.approx(expected.acceptance_length)
        assert row["acceptance_rate"] == pytest.approx(expected.acceptance_rate)
        assert row["conditional_acceptance"] == pytest.approx(expected.conditional_rates)
        assert row["speedup"]["value"] == pytest.approx(row["tokens_per_s"] / row["plain_tokens_per_s"])
        assert row["num_identical"] == 6
        assert all("cannot be true" in warning for warning in row["warnings"])  # the fakes' speeds mean nothing
    assert json.loads(report.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert "6/6" in capsys.readouterr().out


def test_without_a_plain_server_its_absence_is_said(start_fake, capsys):
    server = start_fake("--drafts")
    [row] = evaluate(server, "--num-prompts", "2", "--max-tokens", "8")["rows"]
    assert (row["speedup"], row["plain_tokens_per_s"], row["num_identical"]) == (None, None, None)
    captured = capsys.readouterr()
    assert "no plain server was given" in captured.err
    assert " - " in captured.out


def test_roles_and_flags_that_cannot_be_are_refused(start_fake):
    server, plain = start_fake("--drafts"), start_fake("--plain", name="plain")
    with pytest.raises(ValueError, match="drafts nothing"):
        evaluate(plain)
    with pytest.raises(ValueError, match="drafts too"):
        evaluate(server, "--baseline-server", server.endpoint)
    for flags, message in (
        (["--dtype", "float32"], "--dtype does not go with --server"),
        (["--concurrency", "two"], "--concurrency two"),
        (["--lossless"], "needs --baseline-server"),
        (["--method", "eagle3", "--method", "ngram"], "give it once"),
    ):
        with pytest.raises(Exception, match=message):
            evaluate(server, *flags)
    with pytest.raises(Exception, match="--concurrency needs --server"):
        run(["evaluate", "--verifier", VERIFIER, "--data", DATA, "--method", "none", "--concurrency", "2"])
    with pytest.raises(Exception, match="or --server"):
        run(["evaluate", "--data", DATA])
    elsewhere = start_fake("--drafts", "--model", "/on/the/servers/disk", name="elsewhere")
    with pytest.raises(ValueError, match="'/on/the/servers/disk': name the verifier with --verifier"):
        run(["evaluate", "--server", elsewhere.endpoint, "--data", DATA])


def test_a_server_that_dies_leaves_what_was_measured_and_an_exit_code(start_fake, tmp_path, capsys):
    server = start_fake("--drafts")
    server.inject(*[""] * 5, "die")  # two of them warm up
    report = tmp_path / "partial.json"
    code = main(
        [
            "evaluate",
            "--server",
            server.endpoint,
            "--data",
            DATA,
            "--verifier",
            VERIFIER,
            "--num-prompts",
            "8",
            "--max-tokens",
            "20",
            "--output",
            str(report),
        ]
    )
    captured = capsys.readouterr()
    assert code == 1
    assert "ended early: no answer from" in captured.err
    assert "3 prompts of this level were measured" in captured.err
    printed = json.loads(captured.out.splitlines()[-1])
    saved = json.loads(report.read_text())
    assert printed["rows"] == saved["rows"]
    assert saved["rows"][0]["num_prompts"] == 3
    assert saved["interrupted"].startswith("no answer from")
    expected = rounds_of_the_fake(20).acceptance_length
    assert saved["rows"][0]["acceptance_length"]["value"] == pytest.approx(expected)


def test_a_server_restarted_under_a_prompt_is_asked_that_prompt_again(start_fake, monkeypatch):
    from speculators.data_generation import vllm_client

    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.05)
    server = start_fake("--drafts")
    server.inject(*[""] * 5, "die")
    restart = server.when_it_dies(lambda: start_fake("--drafts", port=server.port))
    flags = ["--num-prompts", "6", "--max-tokens", "20", "--max-retries", "8"]
    [row] = evaluate(server, *flags)["rows"]
    restart.join()
    assert row["num_prompts"] == 6
    assert row["acceptance_length"]["value"] == pytest.approx(rounds_of_the_fake(20).acceptance_length)
    assert any("restarted 1 times" in warning for warning in row["warnings"])


def test_somebody_elses_requests_are_noticed(start_fake):
    import httpx

    server = start_fake("--drafts")
    stop = threading.Event()

    def other() -> None:
        while not stop.is_set():
            httpx.post(f"{server.endpoint}/completions", json={"prompt": [1], "max_tokens": 50})
            time.sleep(0.001)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        [row] = evaluate(server, "--num-prompts", "6", "--max-tokens", "20")["rows"]
    finally:
        stop.set()
        thread.join()
    assert any("another client uses it" in warning for warning in row["warnings"])
