"""Exact laws: every outcome of every random decision of a rule, weighted with the probability the rule gave it.

Shapes: B enumerated cases, K draft slots, V vocabulary; K1 = K + 1. The verifier and the draft are random tables of
conditional distributions over prefixes, so nothing is known but the definition: the first tokens emitted must have the
joint law of the verifier's own process.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from speculators.interfaces import AcceptanceRule, Proposal

Table = dict[tuple[int, ...], torch.Tensor]
"""Prefix -> distribution [V] of the next token (float64)."""


class EveryOutcome:
    """`Draws` whose answers are preset per row; the probabilities the rule asked for multiply into `weights()`."""

    def __init__(self, accept_BK: torch.Tensor, token_BN: torch.Tensor, num_tokens: int):
        self.accept_BK, self.token_BN, self.num_tokens = accept_BK, token_BN, num_tokens
        self.weight_B = torch.ones(len(accept_BK), dtype=torch.float64)
        self.is_used_accept = torch.zeros_like(accept_BK)
        self.is_used_token = torch.zeros_like(token_BN, dtype=torch.bool)

    def accept(self, probs_BN: torch.Tensor, first_slot: int = 0) -> torch.Tensor:
        slots = slice(first_slot, first_slot + probs_BN.shape[1])
        answer_BN = self.accept_BK[:, slots]
        assert not self.is_used_accept[:, slots].any(), "a slot's uniform was used twice"
        self.is_used_accept[:, slots] = True
        self.weight_B *= torch.where(answer_BN, probs_BN, 1 - probs_BN).prod(1)
        return answer_BN

    def pick(self, probs_BNV: torch.Tensor, columns_BN: torch.Tensor) -> torch.Tensor:
        token_BN = self.token_BN.gather(1, columns_BN)
        assert not self.is_used_token.gather(1, columns_BN).any(), "a column's uniform was used twice"
        self.is_used_token.scatter_(1, columns_BN, True)
        self.weight_B *= probs_BNV.gather(-1, token_BN[..., None])[..., 0].prod(1)
        return token_BN

    def weights(self) -> torch.Tensor:
        """Presets a row never looked at occur once for each of their values: count them once."""
        unused_accept_B, unused_token_B = (~self.is_used_accept).sum(1).double(), (~self.is_used_token).sum(1).double()
        return self.weight_B / 2**unused_accept_B / self.num_tokens**unused_token_B


@dataclass(frozen=True)
class Drafted:
    """One possible draft and its probability."""

    tokens: tuple[int, ...]
    probs_KV: torch.Tensor | None
    weight: float


def random_table(num_tokens: int, depth: int, kind: str, generator: torch.Generator) -> Table:
    """Distributions for all prefixes shorter than `depth`: dense, sparse (zeros) or one-hot."""
    table = {}
    for length in range(depth):
        for prefix in itertools.product(range(num_tokens), repeat=length):
            weights = torch.rand(num_tokens, dtype=torch.float64, generator=generator) ** 2 + 1e-3
            if kind == "sparse":
                weights[torch.randint(num_tokens, (), generator=generator)] = 0
            if kind == "one-hot":
                weights = torch.nn.functional.one_hot(weights.argmax(), num_tokens).double()
            table[prefix] = weights / weights.sum()
    return table


def disjoint_tables(num_tokens: int, depth: int, generator: torch.Generator) -> tuple[Table, Table]:
    """p on the even tokens, q on the odd ones: nothing is ever accepted."""
    tables = []
    for parity in (0, 1):
        table = random_table(num_tokens, depth, "dense", generator)
        for prefix, probs in table.items():
            probs = probs * (torch.arange(num_tokens) % 2 == parity)
            table[prefix] = probs / probs.sum()
        tables.append(table)
    return tables[0], tables[1]


def paths(tokens: tuple[int, ...], parents: list[int]) -> list[tuple[int, ...]]:
    """Token path from the root to each slot; a chain has parents -1, 0, 1, ..."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def chain_parents(num_slots: int) -> list[int]:
    return list(range(-1, num_slots - 1))


def independent_drafts(draft: Table, parents: list[int], num_tokens: int) -> list[Drafted]:
    """Every draft whose slot j was drawn from q(. | its own path); of chains too."""
    drafts = []
    for tokens in itertools.product(range(num_tokens), repeat=len(parents)):
        own = paths(tokens, parents)
        probs = [draft[path[:-1]] for path in own]
        weight = torch.stack([q[token] for q, token in zip(probs, tokens, strict=True)]).prod().item()
        if weight > 0:
            drafts.append(Drafted(tokens, torch.stack(probs), weight))
    return drafts


def drafts_without_replacement(draft: Table, parents: list[int], num_tokens: int) -> list[Drafted]:
    """Every draft whose slot j was drawn from q without the tokens of its earlier siblings."""
    drafts = []
    for tokens in itertools.product(range(num_tokens), repeat=len(parents)):
        own, probs, weight = paths(tokens, parents), [], 1.0
        for slot, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            q = draft[own[slot][:-1]].clone()
            q[[tokens[other] for other in range(slot) if parents[other] == parent]] = 0
            weight *= (q[token] / q.sum()).item() if q.sum() > 0 else 0.0
            probs.append(q / q.sum())
        if weight > 0:
            drafts.append(Drafted(tokens, torch.stack(probs), weight))
    return drafts


def emitted_law(
    rule: AcceptanceRule | Callable, drafts: list[Drafted], target: Table, num_tokens: int, parents: list[int] | None
) -> tuple[dict[tuple[int, ...], float], float]:
    """Law of what one round emits (tuples of various lengths), and the expected number of accepted drafts."""
    num_slots = len(drafts[0].tokens)
    chain_or_tree = parents if parents is not None else chain_parents(num_slots)
    depth = max((len(path) for path in paths((0,) * num_slots, chain_or_tree)), default=0)
    bits = list(itertools.product((False, True), repeat=num_slots))
    picks = list(itertools.product(range(num_tokens), repeat=depth + 1))
    every_accept_BK = (
        torch.tensor(bits, dtype=torch.bool).reshape(len(bits), num_slots).repeat_interleave(len(picks), 0)
    )
    every_pick_BN = torch.tensor(picks).repeat(len(bits), 1)
    num_cases = len(every_accept_BK)
    token_ids_BK = torch.tensor([d.tokens for d in drafts]).reshape(len(drafts), num_slots)
    target_BK1V = torch.stack([target_rows(target, d.tokens, chain_or_tree, num_tokens) for d in drafts])
    probs_BKV = None if drafts[0].probs_KV is None else torch.stack([d.probs_KV for d in drafts])
    proposal = Proposal(
        token_ids_BK.repeat_interleave(num_cases, 0),
        None if probs_BKV is None else probs_BKV.repeat_interleave(num_cases, 0),
        None if parents is None else torch.tensor(parents),
    )
    draws = EveryOutcome(every_accept_BK.repeat(len(drafts), 1), every_pick_BN.repeat(len(drafts), 1), num_tokens)
    result = rule(proposal, target_BK1V.repeat_interleave(num_cases, 0), draws)
    weight_B = draws.weights() * torch.tensor([d.weight for d in drafts], dtype=torch.float64).repeat_interleave(
        num_cases
    )
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for row in weight_B.nonzero()[:, 0].tolist():
        path = result.path_BK[row, : result.num_accepted_B[row]]
        law[(*proposal.token_ids_BK[row, path].tolist(), int(result.next_token_B[row]))] += weight_B[row].item()
    return law, float((weight_B * result.num_accepted_B).sum())


def target_rows(target: Table, tokens: tuple[int, ...], parents: list[int], num_tokens: int) -> torch.Tensor:
    """[K1, V]: what the verifier says after the root and after each slot; junk below slots that hold no draft."""
    rows = [target[()]]
    for path in paths(tokens, parents):
        rows.append(torch.full((num_tokens,), 1 / num_tokens, dtype=torch.float64) if -1 in path else target[path])
    return torch.stack(rows)


def largest_error(law: dict[tuple[int, ...], float], target: Table, num_tokens: int, length: int) -> float:
    """max |P(first `length` tokens) - the verifier's| where shorter rounds are continued by the verifier itself."""
    joint = dict.fromkeys(itertools.product(range(num_tokens), repeat=length), 0.0)
    for emitted, weight in law.items():
        for rest in itertools.product(range(num_tokens), repeat=length - len(emitted)):
            joint[emitted + rest] += weight * probability(target, emitted + rest, len(emitted))
    return max(abs(value - probability(target, tokens, 0)) for tokens, value in joint.items())


def probability(target: Table, tokens: tuple[int, ...], start: int) -> float:
    """P(tokens[start:] | tokens[:start]) under the verifier."""
    value = 1.0
    for i in range(start, len(tokens)):
        value *= target[tokens[:i]][tokens[i]].item()
    return value
