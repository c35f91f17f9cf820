"""Prompts that begin alike, drafted for by a drafter that reads the verifier's states of every prompt token."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest

from speculators.decoding import Engine, SamplingParams

SYSTEM = [5, 9, 3, 7, 7, 1, 2, 30, 11, 4, 8, 20, 21, 22, 6, 13, 14, 2, 9, 9, 1, 0, 3, 17]
PROMPTS = [SYSTEM + tail for tail in ([5], [6, 7], [8, 1, 2], [], [9, 9], [4])]


@pytest.mark.parametrize("name", ["eagle3", "medusa"])
def test_a_shared_start_is_scored_once_and_drafts_stay_the_same(name, checkpoints, verifier, monkeypatch):
    params, config = SamplingParams(max_tokens=14), {"model": str(checkpoints[name])}
    alone = Engine(verifier, config, max_batch_size=1)
    expected = [alone.generate([prompt], params)[0] for prompt in PROMPTS]
    engine = Engine(verifier, config, max_batch_size=3)  # more prompts than rows: some find a row that is decoding
    scored, score = [], engine.verifier.score

    def counting(token_ids_BT, num_valid_B, *args, last_only=False, **kwargs):
        if last_only:
            scored.append(int(num_valid_B.sum()))
        return score(token_ids_BT, num_valid_B, *args, last_only=last_only, **kwargs)

    monkeypatch.setattr(engine.verifier, "score", counting)
    outputs = engine.generate(PROMPTS, params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    # the same rounds: the drafter saw the same states, whoever computed them
    assert reduce(add, (o.stats for o in outputs)).rounds == reduce(add, (o.stats for o in expected)).rounds
    total = sum(map(len, PROMPTS))
    assert sum(scored) <= total - 5 * (len(SYSTEM) - 1)
