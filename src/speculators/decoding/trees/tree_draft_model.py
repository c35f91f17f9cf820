"""A draft model drafts a fixed tree: each node's best tokens (or draws without replacement) continue it.

Shapes: B rows, K tree nodes (slots), V vocabulary, S source nodes of one level.

A level's nodes are scored together with all nodes above them, by the same tree-masked forward that verifies trees: the
last committed token is column 0 of it, so it is taken out of the cache first and put back by the next call's feed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculators.decoding.proposers.draft_model import DraftModelProposer
from speculators.decoding.trees.static_tree import Law, draw_uniforms, rank_tree, sample_tree
from speculators.decoding.trees.token_tree import TokenTree
from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal


class TreeDraftModelProposer:
    """Wraps a draft model's proposer: the same cache, a tree in place of a chain."""

    def __init__(self, chain: DraftModelProposer, tree: TokenTree):
        self.capture = CaptureSpec()
        self.chain, self.tree = chain, tree

    def __enter__(self) -> TreeDraftModelProposer:
        self.chain.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.chain.__exit__(*exc)

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        paths = [path for path in self.tree.paths if len(path) <= num_tokens]
        if not paths:
            return self.chain.propose(committed, num_tokens, sampling)
        tree = TokenTree.of(paths)
        with self.chain:
            root_logits_BV, takes_part_B = self.chain.feed(committed)
            last_B1 = committed.token_ids_BT.gather(1, (committed.num_new_B - 1).clamp_min(0)[:, None])
            lengths = list(self.chain.lm.length_by_row)

            def logits_after(slots: list[int], token_ids_BK: Tensor) -> Tensor:
                if slots == [-1]:
                    return root_logits_BV[:, None]
                num_known = max(slots) + 1
                self.chain.lm.length_by_row[:] = [max(length - 1, 0) for length in lengths]
                known_BT = torch.cat([last_B1, token_ids_BK[:, :num_known].clamp_min(0)], 1)
                num_valid_B = torch.full((len(known_BT),), num_known + 1)
                output = self.chain.lm.score(known_BT, num_valid_B, torch.tensor(tree.parents[:num_known]))
                return output.logits_BTV[:, [slot + 1 for slot in slots]].float()

            if sampling.probabilistic:
                proposal = self._sampled(tree, logits_after, sampling)
            else:
                proposal = rank_tree(tree, logits_after, len(last_B1), last_B1.device)
            self.chain.lm.length_by_row[:] = lengths
        token_ids_BK = proposal.token_ids_BK.masked_fill(~takes_part_B[:, None], -1)
        return Proposal(token_ids_BK, proposal.probs_BKV, proposal.parents_K)

    @staticmethod
    def _sampled(tree: TokenTree, logits_after: Law, sampling: DraftSampling) -> Proposal:
        temperature_B = sampling.temperature_B
        scale_B11 = temperature_B.masked_fill(temperature_B == 0, 1.0)[:, None, None]
        return sample_tree(
            tree.parents,
            lambda slots, token_ids_BK: (logits_after(slots, token_ids_BK) / scale_B11).softmax(-1),
            draw_uniforms(len(temperature_B), len(tree.paths), sampling.generator, temperature_B.device),
            is_greedy_B=temperature_B == 0,
        )
