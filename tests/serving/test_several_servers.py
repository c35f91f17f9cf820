"""Verifier states from several servers: shared out among them, and one that dies costs no step."""

from __future__ import annotations

import pytest
import torch
from fake_server import states_of

from speculators.data_generation import BalancedSource, ServerUnavailableError, VllmSource
from speculators.interfaces import CaptureSpec

pytestmark = pytest.mark.usefixtures("fast_retries")
CAPTURE = CaptureSpec((2, 5), last_hidden=True)
ROWS = [torch.arange(1, 3 + row) for row in range(12)]


def balanced(servers, *, max_retries: int = 1, concurrency: int = 1) -> BalancedSource:
    connects = [
        lambda server=server: VllmSource(server.endpoint, CAPTURE, directory=server.states, max_retries=0)
        for server in servers
    ]
    return BalancedSource(connects, CAPTURE, concurrency=concurrency, max_retries=max_retries)


def assert_right(source: BalancedSource) -> None:
    for states, ids in zip(source.read(ROWS), ROWS, strict=True):
        assert torch.equal(states.token_ids_T, ids)
        assert torch.equal(states.last_hidden_TH, torch.from_numpy(states_of(ids.tolist(), 3))[:, 2])


def test_rows_are_shared_out_and_come_back_in_order(start_fake):
    servers = [start_fake(name="a"), start_fake(name="b")]
    source = balanced(servers)
    assert_right(source)
    assert sum(len(server.log) for server in servers) == len(ROWS)
    assert min(len(server.log) for server in servers) >= 3
    source.close()


def test_one_that_fails_rests_and_its_rows_go_to_the_other(start_fake):
    failing, good = start_fake(name="a"), start_fake(name="b")
    source = balanced([failing, good])
    failing.inject("500", "500")
    assert_right(source)
    assert 1 <= failing.log.count("500") <= 2 and good.log.count("ok") + failing.log.count("ok") == len(ROWS)
    source.close()


def test_all_are_asked_again_before_a_row_is_given_up(start_fake):
    servers = [start_fake(name="a"), start_fake(name="b")]
    source = balanced(servers)
    for server in servers:
        server.inject("500")
    [states] = source.read(ROWS[:1])
    assert torch.equal(states.token_ids_T, ROWS[0])
    for server in servers:
        server.inject("500", "500")
    with pytest.raises(ServerUnavailableError):
        source.read(ROWS[:1])
    source.close()
