"""The seams: every record and protocol that crosses a boundary between packages. Nothing here computes.

Shapes: B sequences (rows), T tokens, K draft tokens, K1 = K + 1, V verifier vocabulary, H hidden size,
A aux layers, D = width of the states a drafter reads (A * H, or H when only the last state is read).
Ids of aux layers count finished decoder layers: i = residual stream after i layers, 0 = embeddings,
n = after the last layer and BEFORE the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class CaptureSpec:
    """Says which activations of the verifier a drafter reads."""

    aux_layer_ids: tuple[int, ...] = ()
    """Residual streams, concatenated on the feature axis in this (strictly increasing) order."""
    last_hidden: bool = False
    """Also the residual stream after the last layer, before the final norm (training targets are made of it)."""


@dataclass(frozen=True)
class VerifierStates:
    """Holds what the verifier computed for one token sequence. Row i belongs to token i."""

    token_ids_T: Tensor
    aux_TD: Tensor | None = None
    """[T, A * H] in the order of `CaptureSpec.aux_layer_ids`; None when no aux layer was asked for."""
    last_hidden_TH: Tensor | None = None


class HiddenStateSource(Protocol):
    """Gives training its verifier states: in process, a vLLM server, a store on disk, or a cache over one."""

    capture: CaptureSpec

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        """States of several sequences at once (each an int64 [T]); same order, none missing, or an error is raised."""
        ...


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed into one row, its padding cut (one column is left when there is nothing else).

        captured           x0   x1   x2   x3      tokens; the states of position i are computed from x[0] .. x[i]
                           g0   g1   g2   g3      aux states
                           y0   y1   y2   y3      last states: head(norm(y[i])) is P(x[i+1])

        as captured        x0   x1   x2   x3      column i: x[i], g[i], y[i]
        aligned (EAGLE)    x1   x2   x3           column i: x[i+1], the state g[i] that predicts it, y[i+1]
                           g0   g1   g2           a document has one column less
                           y1   y2   y3

    Which of the two an algorithm trains on is said by its `align`; documents never share a column.
    """

    token_ids_T: Tensor
    document_ids_T: Tensor
    """Document of each column, ascending; -1 = padding (inside the row only between rows that were joined)."""
    position_ids_T: Tensor
    """Position of each column's token in its document."""
    supervised_T: Tensor
    """bool: the column's token belongs to an answer that is learnt. False for padding."""
    aux_TD: Tensor | None
    last_hidden_TH: Tensor | None
    """Before the verifier's final norm."""
    row_length: int
    """Columns of each row before its padding was cut."""
    host_document_ids_T: Tensor
    host_supervised_T: Tensor  # on the host: choosing from them waits for no device


@dataclass(frozen=True)
class Ratio:
    """A metric: numerators and denominators are added over steps, accumulation and ranks, then divided."""

    numerator: Tensor
    denominator: Tensor | None
    """None: the number of forwards that reported it."""


@dataclass(frozen=True)
class LossOutput:
    """Result of one training forward."""

    loss: Tensor  # scalar, with its graph
    metrics: dict[str, Ratio]
    draft_ids: list[Tensor] | None = None
    """Of each step, int64 [T] over the draft vocabulary; -1 = no draft in this column."""
    model_flop: int | None = None  # of the row, forward and backward (`nn.flops`); None = not counted


# -- decoding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Committed:
    """Tokens the engine committed since the proposer was last called.

    The alignment is EAGLE's: row i carries token x_i and the state that PREDICTED it, which sits at position i - 1.

        column      0    1    2    3         first call of a request: the prompt and the first sampled token
        token       x0   x1   x2   x3        later calls: only the newly emitted tokens
        state       -    g0   g1   g2        column 0 of a prompt has no state: its row is zeros
    """

    token_ids_BT: Tensor
    """int64, right padded with 0; columns past `num_new_B` mean nothing."""
    states_BTD: Tensor | None
    """None when the proposer's `capture` is empty."""
    num_new_B: Tensor
    """int64 valid columns per row; 0 = the row is idle (finished, or still in its prompt)."""
    num_committed_B: Tensor
    """int64 sequence lengths after this commit. `num_new == num_committed > 0` means a new request took the row:
    whatever the proposer kept for that row is void. B ends at the last used row: it may differ between calls."""
    on_host: tuple[list[list[int]], list[int], list[int]] | None = None
    """New tokens by row, `num_new` and `num_committed`, where the engine knows them: `nn.device.read_on_host`."""


@dataclass(frozen=True)
class Proposal:
    """Draft tokens for one round."""

    token_ids_BK: Tensor
    """int64 ids of the VERIFIER's vocabulary; -1 = no draft in this slot (ragged drafts end with -1)."""
    probs_BKV: Tensor | None = None
    """q(x): the distribution that each token was drawn from, over the verifier's vocabulary; None = point mass (greedy,
    n-gram)."""
    parents_K: Tensor | None = None
    """int64 [K] on the host, a draft tree shared by all rows: slot of each node's parent, -1 = the last committed
    token. Parents come first. A row with fewer nodes has -1 tokens in the other slots. None = chain."""
    confidence_BK: Tensor | None = None
    """For chains: the drafter's own probability that each slot is accepted, given that those before it are."""
    num_dropped_B: Tensor | None = None
    """Set by the engine: how many drafts it left out, because their scores were not finite or they are no tokens."""


@dataclass(frozen=True)
class DraftSampling:
    """Says how a proposer draws drafts: temperatures [B] (0 = argmax) and the source of randomness."""

    temperature_B: Tensor
    generator: torch.Generator | None = None
    probabilistic: bool = False
    """True: draw from softmax(draft logits / temperature) and return `probs_BKV`. False: argmax, a point mass."""
    wants_confidence: bool = False
    """True: return `Proposal.confidence_BK` if the drafter has one."""
    own_probs: list[Tensor] | None = None
    """A list: drafters of chains add their probability of each draft, before temperature, as [B] per slot or [B, K]."""


@runtime_checkable
class Proposer(Protocol):
    """Makes drafts. Owns its state for every row and crops it to `num_committed_B` itself: no rollback call."""

    capture: CaptureSpec

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal: ...


@runtime_checkable
class RemembersRequests(Protocol):
    """A proposer that drafts from the text of earlier requests."""

    def reset(self) -> None:
        """Forget earlier requests. Called between runs only."""
        ...


class TreeDrafter(Protocol):
    """A drafter that continues many nodes at once: static, sampled and dynamic draft trees are grown with it.

    Its vocabulary may be smaller than the verifier's. One tree lives from `start` to the next `start`.
    Shapes beside those above: F nodes of the frontier (the same number at every depth), N nodes so far.
    """

    capture: CaptureSpec
    max_depth: int | None
    """Greatest depth of its drafts; None: no limit."""

    def start(self, committed: Committed, depth: int) -> Tensor:
        """Process the committed tokens and begin a tree `depth` deep; log-probabilities [B, V_draft] after them."""
        ...

    def expand(self, token_ids_BF: Tensor, parent_BF: Tensor, visible_BFN: Tensor) -> Tensor:
        """Log-probabilities [B, F, V_draft] after each node of the next depth. A node is given by its verifier id, its
        parent's index in the frontier before (0 = the root, at the first), and the nodes that it attends to."""
        ...

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor: ...

    def to_verifier_probs(self, draft_probs: Tensor) -> Tensor:
        """[..., V_draft] to [..., V]"""
        ...


@dataclass(frozen=True)
class VerifierOutput:
    """Scores of the tokens just given to the verifier. Row j scores what follows the j-th given token."""

    logits_BTV: Tensor
    states_BTD: Tensor | None


class Verifier(Protocol):
    """The model whose distribution is reproduced, with its KV cache, for a fixed number of rows.

    A context manager: entering sets the model up for decoding, and forwards run inside. It may be entered again inside.
    """

    vocab_size: int
    device: torch.device

    def score(
        self,
        token_ids_BT: Tensor,
        num_valid_B: Tensor,
        parents_K: Tensor | None = None,
        *,
        first_row: int = 0,
        last_only: bool = False,
    ) -> VerifierOutput:
        """One forward over the given tokens, appended to the cache of rows first_row .. first_row + B - 1. In decoding
        column 0 is the last committed token; with `parents_K`, columns 1.. are the nodes of a draft tree.
        `last_only`: logits of each row's last valid token alone, [B, 1, V] (prompts)."""
        ...

    def keep(self, columns_BT: Tensor, num_kept_B: Tensor) -> None:
        """Of the columns scored last, keep the first `num_kept_B` entries of `columns_BT` in the cache, drop the rest.
        Both are on the host."""

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on; 0 frees the row."""

    def share_prefix(self, from_row: int, to_row: int, length: int) -> None:
        """Give an empty row the first `length` cached tokens of another."""

    def clear_unused(self) -> None:
        """Overwrite what the cache holds behind each row's tokens. Called after scores that were not finite: slots
        behind a row may be read with weight 0, and 0 times NaN is NaN."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class Verification:
    """The decision of a rule for each row."""

    path_BK: Tensor
    """int64 indices into the proposal's slots, in order, of the accepted drafts; -1 past `num_accepted_B`.
    For a chain it is 0, 1, 2, ..."""
    num_accepted_B: Tensor
    next_token_B: Tensor
    """The token emitted after the accepted drafts: recovered (a draft was rejected) or bonus (all were accepted)."""


@runtime_checkable
class Draws(Protocol):
    """Makes the random decisions of a rule."""

    def accept(self, probs_BN: Tensor, first_slot: int = 0) -> Tensor:
        """bool [B, N]: slots first_slot .. first_slot + N - 1, each true with its probability, independently."""
        ...

    def pick(self, probs_BNV: Tensor, columns_BN: Tensor) -> Tensor:
        """int64 [B, N]: one token from each distribution (rows sum to 1), with the randomness of the given columns."""
        ...


class AcceptanceRule(Protocol):
    """Decides which drafts are kept. Pure: no model, no cache, no state."""

    @property
    def lossless(self) -> bool: ...

    @property
    def reads_logits(self) -> bool:
        """True: takes logits (after penalties) in place of probabilities."""
        ...

    def __call__(
        self, proposal: Proposal, target_probs_BK1V: Tensor, generator: torch.Generator | Draws | None
    ) -> Verification:
        """`target_probs_BK1V[:, 0]` follows the last committed token, `[:, j + 1]` follows draft j. Greedy rows are
        one-hot rows. `generator`: None is torch's global one; `Draws` are the random decisions themselves."""
        ...
