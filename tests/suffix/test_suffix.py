"""Suffix decoding: counts against brute force, order against its definition, drafts against arctic-inference."""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace

import pytest
import torch

from speculators.decoding.proposers.suffix import ReferenceSuffixCache, SuffixProposer, make_cache
from speculators.decoding.proposers.suffix_index import Limits, SuffixIndex
from speculators.interfaces import Committed, DraftSampling


def brute_count(texts: dict[int, list[int]], string: list[int]) -> int:
    n = len(string)
    return sum(text[i : i + n] == string for text in texts.values() for i in range(len(text) - n + 1))


def every_string(index: SuffixIndex) -> dict[tuple[int, ...], list[int]]:
    """Explicit nodes with children: string -> tokens of the children in order."""
    found, stack = {}, [((), index.root)]
    while stack:
        string, node = stack.pop()
        order, child = [], node.head
        while child is not None:
            order.append(child.token)
            if child.children is not None:
                stack.append(((*string, child.token), child))
            child = child.right
        found[string] = order
    return found


@pytest.mark.parametrize("seed", range(8))
def test_counts_equal_brute_force_while_texts_grow_and_leave(seed):
    rng = random.Random(seed)
    depth, num_tokens = rng.choice([1, 2, 4, 6]), rng.choice([1, 2, 3])
    index, texts = SuffixIndex(depth), {}
    for step in range(120):
        if texts and rng.random() < 0.1:
            gone = rng.choice(list(texts))
            index.remove(gone)
            del texts[gone]
        else:
            which = rng.randrange(4) if rng.random() < 0.8 else step
            new = [rng.randrange(num_tokens) for _ in range(rng.randrange(1, 4))]
            index.extend(which, new)
            texts.setdefault(which, []).extend(new)
        for _ in range(6):
            source = rng.choice(list(texts.values())) if texts else [0]
            start = rng.randrange(len(source))
            string = source[start : start + rng.randrange(1, depth + 1)]
            if rng.random() < 0.3:
                string = [*string[:-1], rng.randrange(num_tokens)]
            assert index.count(string) == brute_count(texts, string)


@pytest.mark.parametrize("seed", range(4))
def test_children_are_ordered_by_count_and_move_as_the_rule_says(seed):
    """One growing text: replay the events at each string and move tokens as the rule says."""
    rng = random.Random(seed)
    index, text, orders, counts = SuffixIndex(4), [], {}, {}
    for _ in range(200):
        token = rng.randrange(4)
        index.extend(0, [token])
        text.append(token)
        for n in range(min(4, len(text))):
            string = tuple(text[len(text) - 1 - n : len(text) - 1])
            order, count = orders.setdefault(string, []), counts.setdefault(string, {})
            count[token] = count.get(token, 0) + 1
            if count[token] == 1:
                order.append(token)
            else:
                led = next(other for other in order if count[other] == count[token] - 1 or other == token) == token
                order.remove(token)
                equals = [i for i, other in enumerate(order) if count[other] >= count[token] + led]
                order.insert(equals[-1] + 1 if equals else 0, token)
    for string, order in every_string(index).items():
        assert order == (orders[string] if len(string) < 4 else [])


def test_a_pattern_seen_once_before_has_probability_one_half():
    index = SuffixIndex(8)
    index.extend(0, [1, 2, 3, 9, 1, 2])
    limits = Limits(max_spec_factor=1.0, min_token_prob=0.1)
    draft = index.speculate([1, 2, 3, 9, 1, 2], 8, limits)
    assert (draft.token_ids, draft.probs, draft.match_len) == ([3, 9], [0.5, 0.5], 2)
    assert index.speculate_at_end(0, 6, 8, limits) == draft
    assert index.speculate([7, 8], 8, limits).token_ids == []
    assert index.speculate([9, 1, 2], 1, limits).token_ids == [3]
    assert index.speculate([9, 1, 2], 8, Limits(max_spec_factor=1.0, min_token_prob=0.6)).token_ids == []


def every_match(index: SuffixIndex, context: list[int], most: int, limits: Limits):
    """By the definition: the continuation of each match, the best sum of probabilities, longer ones first."""
    best, best_score = ([], 0), 0.0
    for length in range(1, len(context)):
        string, probs, prob = list(context[-length:]), [], 1.0
        if index.count(string) == 0:
            break
        while len(probs) < limits.num_tokens(length, most) and len(string) < index.max_depth:
            followers = {t: index.count([*string, t]) for t in range(20)}
            token = max(followers, key=followers.get)
            prob *= followers[token] / index.count(string)
            if followers[token] == 0 or prob < limits.min_token_prob:
                break
            string.append(token)
            probs.append(prob)
        if sum(probs) >= best_score - 1e-6:
            best, best_score = (string[length:], length), max(sum(probs), best_score)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_drafts_equal_the_definition_searched_or_read_off_the_end(seed):
    """Texts in which every string has one likeliest follower: ties would be broken by history."""
    rng = random.Random(seed)
    index = SuffixIndex(rng.choice([4, 8]))
    loop = [rng.randrange(20) for _ in range(7)]
    for _ in range(40):
        index.extend(0, loop if rng.random() < 0.9 else [rng.randrange(20)])
        context = index.sequences[0].tokens[-index.max_depth :]
        limits = Limits(rng.choice([0.5, 1.0, 2.0]), 0.35)
        draft = index.speculate(context, 6, limits)
        assert (index.speculate_at_end(0, len(context), 6, limits)) == draft
        if draft.token_ids:
            token_ids, match_len = every_match(index, context, 6, limits)
            assert (len(draft.token_ids), draft.match_len) == (len(token_ids), match_len)


class Counting(dict):
    """Children that count how often they are looked up."""

    lookups = 0

    def get(self, *key):
        Counting.lookups += 1
        return super().get(*key)


def test_the_work_of_a_draft_does_not_grow_with_the_text():
    work = []
    for length in (500, 8000):
        rng = random.Random(0)
        index = SuffixIndex(24)
        index.extend(0, [rng.randrange(50) for _ in range(length)])
        index.root.children = Counting(index.root.children)
        Counting.lookups = 0
        for _ in range(50):
            index.extend(0, [rng.randrange(50)])
            index.speculate_at_end(0, 24, 8, Limits(1.0, 0.1))
        work.append(Counting.lookups)
        assert len(index.sequences[0].open_nodes) < 24
    assert work == [50, 50]  # one a token, for the root's child; drafts look nothing up there


def test_a_reset_proposer_drafts_as_a_new_one():
    config = SimpleNamespace(
        suffix_decoding_max_tree_depth=8,
        suffix_decoding_max_cached_requests=10,
        suffix_decoding_max_spec_factor=1.0,
        suffix_decoding_min_token_prob=0.1,
    )
    proposer = SuffixProposer(config, max_batch_size=1, backend="reference")
    sampling, prompt = DraftSampling(torch.zeros(1)), committed([([4, 5, 6], 3)])
    assert proposer.propose(prompt, 4, sampling).token_ids_BK.shape[1] == 0
    proposer.propose(committed([([7, 8, 9], 6)]), 4, sampling)
    again = committed([([4, 5, 6, 7], 4)])
    assert proposer.propose(again, 4, sampling).token_ids_BK.tolist() == [[8, 9]]  # what the first request said
    proposer.reset()
    assert proposer.propose(again, 4, sampling).token_ids_BK.shape[1] == 0


def test_responses_are_evicted_first_in_first_out_and_requests_are_checked():
    cache = ReferenceSuffixCache(8, 2)
    for request in ("a", "b", "c"):
        cache.start_request(request, [0])
    assert cache.cached_requests == ["b", "c"]
    cache.add_active_response("c", [5, 6, 7])
    cache.stop_request("c")
    cache.start_request("d", [1])
    assert cache.cached_requests == ["c", "d"]
    limits = {"max_spec_tokens": 4, "max_spec_factor": 4.0, "min_token_prob": 0.1}
    assert cache.speculate("d", [9, 5], **limits).token_ids == [6, 7]  # from the past response
    cache.evict_cached_response("c")
    assert cache.speculate("d", [9, 5], **limits).token_ids == []
    with pytest.raises(ValueError, match="'c' is not active"):
        cache.add_active_response("c", [1])
    with pytest.raises(ValueError, match="'d' is already active"):
        cache.start_request("d", [1])
    with pytest.raises(ValueError, match="'c' is not cached"):
        cache.evict_cached_response("c")
    none_cached = ReferenceSuffixCache(8, 0)
    none_cached.start_request("a", [1])
    assert none_cached.cached_requests == []


def test_a_requests_own_text_wins_over_equally_good_past_responses():
    cache = ReferenceSuffixCache(8, 10)
    for request, response in (("a", [1, 2, 5]), ("b", [1, 2])):
        cache.start_request(request, [])
        cache.add_active_response(request, response)
        cache.stop_request(request)
    cache.start_request("c", [1, 2, 4, 1, 2])  # 4 follows one of two 2s here, as 5 does there
    limits = {"max_spec_factor": 1.0, "min_token_prob": 0.1}
    draft = cache.speculate("c", [1, 2], max_spec_tokens=1, **limits)
    assert (draft.token_ids, draft.score) == ([4], 0.5)
    cache.start_request("d", [8, 2])
    assert cache.speculate("d", [8, 2], max_spec_tokens=1, **limits).token_ids == [5]


def committed(rows: list[tuple[list[int], int]]) -> Committed:
    width = max(len(tokens) for tokens, _ in rows)
    return Committed(
        torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows]),
        None,
        torch.tensor([len(tokens) for tokens, _ in rows]),
        torch.tensor([total for _, total in rows]),
    )


def test_the_proposer_follows_requests_through_rows():
    config = SimpleNamespace(
        suffix_decoding_max_tree_depth=8,
        suffix_decoding_max_cached_requests=10,
        suffix_decoding_max_spec_factor=1.0,
        suffix_decoding_min_token_prob=0.1,
    )
    proposer = SuffixProposer(config, max_batch_size=2, backend="reference")
    sampling = DraftSampling(torch.zeros(2))
    first = proposer.propose(committed([([1, 2, 3, 1, 2], 5), ([7, 8], 2)]), 4, sampling)
    assert first.token_ids_BK.tolist() == [[3, 1], [-1, -1]]
    second = proposer.propose(committed([([3], 6), ([], 2)]), 4, sampling)
    assert second.token_ids_BK[0].tolist() == [1, 2, 3]
    assert (second.token_ids_BK[1] == -1).all()
    # row 1 gets a new request whose text continues like row 0's response did: 2 -> 3
    third = proposer.propose(committed([([], 6), ([9, 9, 4, 2], 4)]), 4, sampling)
    assert third.token_ids_BK[1].tolist() == [3]
    assert proposer.cache.active_requests == [0, 2]


@pytest.mark.skipif(
    importlib.util.find_spec("arctic_inference") is None,
    reason="no arctic-inference: scripts/install_arctic_inference.sh",
)
@pytest.mark.parametrize("seed", range(30))
def test_drafts_equal_arctic_inference(seed):
    rng = random.Random(seed)
    depth, cached = rng.choice([2, 4, 8, 24]), rng.choice([0, 1, 3, -1])
    num_tokens = rng.choice([2, 3, 5, 20])
    ours, theirs = (make_cache(depth, cached, backend) for backend in ("reference", "arctic"))
    active: dict[int, list[int]] = {}
    for step in range(250):
        action = rng.random()
        if not active or (action < 0.1 and len(active) < 4):
            prompt = [rng.randrange(num_tokens) for _ in range(rng.randrange(0, 30))]
            for cache in (ours, theirs):
                cache.start_request(step, prompt)
            active[step] = prompt
        elif action < 0.15:
            gone = rng.choice(list(active))
            del active[gone]
            for cache in (ours, theirs):
                cache.stop_request(gone)
        else:
            request = rng.choice(list(active))
            new = [rng.randrange(num_tokens) for _ in range(rng.randrange(1, 4))]
            for cache in (ours, theirs):
                cache.add_active_response(request, new)
            active[request] = active[request] + new
            limits = {
                "max_spec_tokens": rng.randrange(1, 12),
                "max_spec_factor": rng.choice([0.5, 1.0, 2.5]),
                "max_spec_offset": rng.choice([0.0, 1.0, -1.0]),
                "min_token_prob": rng.choice([0.0, 0.1, 0.3, 0.6]),
            }
            mine, other = (cache.speculate(request, active[request][-depth:], **limits) for cache in (ours, theirs))
            assert mine.token_ids == list(other.token_ids), (step, limits)
            assert mine.parents == list(other.parents)
            assert mine.match_len == other.match_len
            assert mine.probs == pytest.approx(list(other.probs), abs=1e-6)
            assert mine.score == pytest.approx(other.score, abs=1e-5)
