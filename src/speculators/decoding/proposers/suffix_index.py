"""Counts of every short string in a set of growing token sequences: the reference index of suffix decoding.

cnt(s) = number of (sequence, start) pairs at which s, at most `max_depth` long, occurs completely. A trie would need a
node for each of them; here a string that occurs once is a *leaf* that points into its sequence and becomes a node with
children only when it occurs again. Appending a token touches one node for each suffix that has occurred before, at most
`max_depth` of them however long the text is. These nodes are kept as `open_nodes`: they match the end of the text.

Order of a node's children, which decides what is drafted: by decreasing count; a new one (count 1) goes after its
equals, a decremented one before its new equals, an incremented one before them if it led the group it leaves, else
after them. That last rule, and single precision for probabilities, are arctic-inference's: the drafts are the same.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from speculators.decoding.proposers.suffix_nodes import Node, Text


@dataclass(frozen=True)
class SuffixDraft:
    """Draft tokens with their parents (-1: the context), estimated probabilities and the match they come from."""

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    score: float = 0.0
    match_len: int = 0


@dataclass(frozen=True)
class Limits:
    """Limits how far to draft."""

    max_spec_factor: float
    min_token_prob: float
    max_spec_offset: float = 0.0
    as_tree: bool = False

    @cached_property
    def min_prob(self) -> float:
        return single(self.min_token_prob)

    def num_tokens(self, match_len: int, most: int) -> int:
        return max(0, min(int(match_len * self.max_spec_factor + self.max_spec_offset + 1e-6), most))


class SuffixIndex:
    """String counts of a set of sequences, and drafts from them."""

    def __init__(self, max_depth: int):
        self.max_depth = max_depth
        self.root = Node(0)
        self.root.children = {}
        self.sequences: dict[int, Text] = {}

    def extend(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        """Append to a sequence, which is created if it is unknown."""
        sequence = self.sequences.setdefault(sequence_id, Text())
        for token in token_ids:
            self._append(sequence, token)

    def _append(self, sequence: Text, token: int) -> None:
        sequence.tokens.append(token)
        num_tokens = len(sequence.tokens)
        # iterate over a copy: opening a leaf may append nodes of this very sequence
        ending_here, sequence.open_nodes = [*sequence.open_nodes, self.root], []
        for node in ending_here:
            assert node.children is not None
            child = node.children.get(token)
            if child is None:
                leaf = node.add_child(token)
                leaf.sequence, leaf.start = sequence, num_tokens - leaf.depth
                continue
            if child.children is None:
                self._open(child)
            node.increment(child)
            if child.depth < self.max_depth:
                sequence.open_nodes.append(child)

    def _open(self, leaf: Node) -> None:
        """At a second occurrence: move the first one down by a token, or keep it open at the end of its text."""
        leaf.children = {}
        sequence, start = leaf.sequence, leaf.start
        assert sequence is not None
        leaf.sequence = None
        if leaf.depth == self.max_depth:
            return
        if start + leaf.depth == len(sequence.tokens):
            sequence.open_nodes.append(leaf)
            return
        child = leaf.add_child(sequence.tokens[start + leaf.depth])
        child.sequence, child.start = sequence, start

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence: subtract all its occurrences."""
        sequence = self.sequences.pop(sequence_id)
        tokens = sequence.tokens
        for start in range(len(tokens)):
            node = self.root
            for token in tokens[start : start + self.max_depth]:
                if node.children is None:
                    break  # a leaf has no nodes below it
                child = node.children[token]
                node.decrement(child)
                node = child

    def find(self, string: Sequence[int]) -> tuple[Node, int] | None:
        """The node of a string and how many further tokens of a leaf it takes; None if it does not occur."""
        node = self.root
        for i, token in enumerate(string):
            if node.children is None:
                assert node.sequence is not None
                at = node.start + node.depth
                beyond = len(string) - i
                is_same = node.sequence.tokens[at : at + beyond] == list(string[i:])
                return (node, beyond) if is_same and len(string) <= self.max_depth else None
            child = node.children.get(token)
            if child is None:
                return None
            node = child
        return node, 0

    def count(self, string: Sequence[int]) -> int:
        place = self.find(string)
        return 0 if place is None else place[0].count

    def ends_with(self, sequence_id: int, context: Sequence[int]) -> bool:
        sequence = self.sequences.get(sequence_id)
        return sequence is not None and sequence.tokens[-len(context) :] == list(context) != []

    def speculate(self, context: Sequence[int], max_spec_tokens: int, limits: Limits) -> SuffixDraft:
        """The best-scoring continuation over all lengths of match, longer matches first among equals."""
        if not self.root.children:
            return SuffixDraft()
        context = list(context[-self.max_depth :])
        most = self._longest_match(context)
        return self._best((self.find(context[-n:]) for n in range(most, 0, -1)), most, max_spec_tokens, limits)

    def speculate_at_end(self, sequence_id: int, context_len: int, max_spec_tokens: int, limits: Limits) -> SuffixDraft:
        """The same where the context is the last `context_len` tokens of a sequence: its open nodes are the matches, so
        nothing is searched. Longer suffixes occur at the end alone and nothing follows them."""
        most = max(min(context_len, self.max_depth) - 1, 0)
        node_by_depth = {node.depth: node for node in self.sequences[sequence_id].open_nodes}
        longest = max((depth for depth in node_by_depth if depth <= most), default=0)
        draft = self._best(((node_by_depth[n], 0) for n in range(longest, 0, -1)), longest, max_spec_tokens, limits)
        return draft if draft.token_ids else SuffixDraft(match_len=most)

    def _longest_match(self, context: list[int]) -> int:
        """Length of the longest suffix that occurs, below len(context). Suffixes of it occur too: binary search."""
        low, high = 0, 1
        most = len(context) - 1
        while high <= most and self.find(context[-high:]) is not None:
            low, high = high, 2 * high
        high = min(high, most + 1)  # low matches, high does not (or is too long)
        while high - low > 1:
            middle = (low + high) // 2
            if self.find(context[-middle:]) is not None:
                low = middle
            else:
                high = middle
        return low

    def _best(
        self, positions: Iterable[tuple[Node, int] | None], match_len: int, max_spec_tokens: int, limits: Limits
    ) -> SuffixDraft:
        """The best draft of matches of `match_len`, `match_len - 1`, ... tokens.

        A token scores at most 1, so the search ends once no shorter match can win."""
        grow = self._grow_tree if limits.as_tree else self._grow_chain
        best = SuffixDraft()
        for length, position in zip(range(match_len, 0, -1), positions, strict=False):
            assert position is not None
            limit = limits.num_tokens(length, max_spec_tokens)
            if length < match_len and limit <= best.score:
                break
            draft = grow(*position, limit, limits.min_prob, length)
            if length == match_len or draft.score > best.score:
                best = draft
        return best

    def _grow_chain(self, node: Node, beyond: int, limit: int, min_prob: float, match_len: int) -> SuffixDraft:
        token_ids: list[int] = []
        probs: list[float] = []
        prob = 1.0
        while len(token_ids) < limit:
            if node.children is None:
                assert node.sequence is not None
                at, depth = node.start + node.depth + beyond, node.depth + beyond
                rest = node.sequence.tokens[at : at + min(limit - len(token_ids), self.max_depth - depth)]
                token_ids += rest
                probs += [prob] * len(rest)
                break
            child = node.head
            if child is None:
                break
            if child.count != node.count:
                prob = single(prob * single(child.count / node.count))
            if prob < min_prob:
                break
            token_ids.append(child.token)
            probs.append(prob)
            node = child
        return SuffixDraft(token_ids, list(range(-1, len(token_ids) - 1)), probs, single_sum(probs), match_len)

    def _grow_tree(self, node: Node, beyond: int, limit: int, min_prob: float, match_len: int) -> SuffixDraft:
        """A draft tree, likeliest tokens first."""
        token_ids: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        order = 0
        heap: list[tuple[float, int, int, Node, int, int]] = []  # (-prob, order, token, node, beyond, parent)

        def push_children(node: Node, beyond: int, prob: float, parent: int) -> None:
            nonlocal order
            followers: list[tuple[int, float, Node, int]] = []
            if node.children is None:
                assert node.sequence is not None
                at = node.start + node.depth + beyond
                if at < len(node.sequence.tokens) and node.depth + beyond < self.max_depth:
                    followers.append((node.sequence.tokens[at], prob, node, beyond + 1))
            else:
                child = node.head
                while child is not None:
                    followers.append((child.token, single(single(prob * child.count) / node.count), child, 0))
                    child = child.right
            for token, child_prob, next_node, next_beyond in followers:
                if child_prob >= min_prob:
                    heapq.heappush(heap, (-child_prob, order, token, next_node, next_beyond, parent))
                    order += 1

        push_children(node, beyond, 1.0, -1)
        while heap and len(token_ids) < limit:
            negative_prob, _, token, next_node, next_beyond, parent = heapq.heappop(heap)
            token_ids.append(token)
            parents.append(parent)
            probs.append(-negative_prob)
            push_children(next_node, next_beyond, -negative_prob, len(token_ids) - 1)
        return SuffixDraft(token_ids, parents, probs, single_sum(probs), match_len)


_SINGLE = struct.Struct("f")


def single(value: float) -> float:
    """Rounded to single precision."""
    return _SINGLE.unpack(_SINGLE.pack(value))[0]


def single_sum(values: list[float]) -> float:
    """In single precision throughout."""
    if values and values[-1] == 1.0 == values[0]:  # probabilities along a chain only fall
        return float(len(values))
    total = 0.0
    for value in values:
        total = single(total + value)
    return total
