"""The DSpark network: DFlash's and two small heads, a low-rank bias from the token before and the chance of being
accepted.

Shapes: any leading axes, K slots in order on the axis before the last, H hidden size, R rank, V verifier vocabulary,
D draft vocabulary.

    bias of slot k = W2 phi_k,  phi_k from e = W1[token before] (a verifier id), the slot's state h and (rnn) all before

    vanilla   e
    gated     sigmoid(G [h ; e] + b) * e
    rnn       [gate ; candidate ; out] = J [state ; e ; h] + b
              state <- sigmoid(gate) state + (1 - sigmoid(gate)) tanh(candidate),  from 0 at the first slot that drafts
              tanh(out)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speculators.models.dflash.network import DFlashNetwork
from speculators.nn.flops import product_flop

W1_STD = 0.01


class MarkovHead(nn.Module):
    """`vanilla`, and what all kinds share. W1 is indexed by verifier ids, so that any token may stand before."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int):
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=W1_STD)

    def start(self, like: Tensor) -> Tensor:
        """State before the first slot: [.., R] for hidden states [.., H]."""
        return like.new_zeros((*like.shape[:-1], self.rank))

    def step(self, state: Tensor, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One slot: (phi, next state)."""
        return embedded, state

    def features(self, embedded_KR: Tensor, hidden_KH: Tensor) -> Tensor:
        """phi of all slots, the tokens before them known: [.., K, R]."""
        return self.step(self.start(hidden_KH), embedded_KR, hidden_KH)[0]

    def features_flop(self, num_slots: int) -> int:
        """Model FLOPs of `features`: of the products of a slot, which W1 and W2 are not among."""
        linears = [part for part in self.children() if isinstance(part, nn.Linear) and part is not self.markov_w2]
        return sum(product_flop(linear.weight, num_slots) for linear in linears)


class GatedMarkovHead(MarkovHead):
    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, draft_vocab_size, rank, hidden_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, state: Tensor, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate_proj(torch.cat((hidden, embedded.to(hidden.dtype)), -1)).sigmoid()
        return gate * embedded, state


class RnnMarkovHead(MarkovHead):
    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, draft_vocab_size, rank, hidden_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def step(self, state: Tensor, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.joint_proj(torch.cat((state.to(hidden.dtype), embedded.to(hidden.dtype), hidden), -1))
        gate, candidate, out = joint.chunk(3, dim=-1)
        keep = gate.sigmoid()
        return out.tanh(), keep * state + (1 - keep) * candidate.tanh()

    def features(self, embedded_KR: Tensor, hidden_KH: Tensor) -> Tensor:
        state, found = self.start(hidden_KH[..., 0, :]), []
        for k in range(hidden_KH.shape[-2]):
            phi, state = self.step(state, embedded_KR[..., k, :], hidden_KH[..., k, :])
            found.append(phi)
        return torch.stack(found, -2)


MARKOV_HEADS = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RnnMarkovHead}


class ConfidenceHead(nn.Module):
    """Logit of the chance that a draft is accepted, given that those before it were."""

    def __init__(self, hidden_size: int, rank: int):
        """`rank`: width of the Markov embedding it reads beside the state; 0 = the state alone."""
        super().__init__()
        self.reads_markov = rank > 0
        self.proj = nn.Linear(hidden_size + rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        if self.reads_markov:
            assert embedded is not None
            hidden = torch.cat((hidden, embedded.to(hidden.dtype)), -1)
        return self.proj(hidden).squeeze(-1)


@dataclass(frozen=True)
class DSparkNetwork(DFlashNetwork):
    markov_head: MarkovHead | None
    """Ties neighbouring drafts together."""
    confidence_head: ConfidenceHead | None
    """Estimates whether a draft will be accepted."""
