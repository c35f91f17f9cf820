"""Verifiers with recurrent states (Mamba, linear attention, hybrids with attention), rolled back by snapshots.

Shapes: B rows of the forward (first_row .. first_row + B - 1), T tokens, V vocabulary, D width of captured states.

Keys and values of attention layers are dropped by moving a length, as in `hf_verifier`. A state cannot be shortened, so
the states before the scored tokens are kept until `keep` says how many tokens were accepted:

    before     state after x0 .. x[L-1]                        kept until the round is verified
    scored     x[L] and K drafts, in one forward               its states are valid where everything was accepted
    kept       x[L] .. x[L+n-1], n < K + 1                     run again from the states before, equal n together

Chains only: the nodes of a tree would each need a state of their own.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from speculators.decoding.verifiers.attention_proof import Way, make_proven_verifier
from speculators.decoding.verifiers.cache import STATELESS, HybridCache, States, WriteSpan, neighbours, tensors_of
from speculators.decoding.verifiers.hf_forward import MaskBuilder, cache_argument
from speculators.decoding.verifiers.hf_verifier import HFVerifier, refuse_unknown_layers
from speculators.interfaces import CaptureSpec, Verifier, VerifierOutput
from speculators.nn.graphs import Record
from speculators.utils.util import NestedContext
from speculators.verifier import CapturedStates, capture_states, verifier_parts

CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_PRECISION_TOLERANCE = 0.1
"""Tolerances of the constructor's check, as a share of the largest value; ignoring the state gives 50 %."""


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether some layer keeps a state instead of keys and values."""
    if getattr(model, "_is_stateful", False):
        return True
    layers = DynamicCache(config=verifier_parts(model).config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def make_verifier(
    verifier: PreTrainedModel | Verifier,
    num_rows: int,
    capture: CaptureSpec | None = None,
    record: Record | None = None,
) -> Verifier:
    """The verifier for a model, by how its layers keep the past; a ready verifier is returned as it is. `record`: of
    fixed shapes (`nn.graphs`)."""
    if not isinstance(verifier, nn.Module):
        return verifier
    if not is_recurrent(verifier):
        refuse_unknown_layers(capture or CaptureSpec(), verifier_parts(verifier))
        proven = make_proven_verifier(verifier, num_rows, capture)
        if isinstance(proven, HFVerifier):
            proven.use_graphs(record)
        return proven
    RecurrentVerifier(verifier, 1, capture)  # refuses what it cannot follow, with its own reason
    return make_proven_verifier(verifier, num_rows, capture, (Way(RecurrentVerifier, has_trees=False),))


class RefusedState(ValueError):
    """Says why a recurrent model is not decoded here."""


class RecurrentVerifier(NestedContext):
    """A `Verifier` over transformers' own recurrent and hybrid models."""

    def __init__(self, model: PreTrainedModel, num_rows: int, capture: CaptureSpec | None = None):
        self.model, self.parts = model, verifier_parts(model)
        self.capture = capture or CaptureSpec()
        self.vocab_size: int = self.parts.config.vocab_size
        parameter: Any = self.parts.head.weight
        self.device: torch.device = parameter.device
        kinds = DynamicCache(config=self.parts.config).layers
        self._windows = attention_windows(model, self.parts.config, kinds)
        self._cache = HybridCache(num_rows, kinds, list(getattr(self.parts.config, "layer_types", None) or []))
        self._masks = MaskBuilder(self._windows, parameter.dtype, self.device) if self._windows else None
        takes = inspect.signature(model.forward).parameters
        self._cache_name = cache_argument(model)
        self._takes_positions, self._takes_logits_to_keep = "position_ids" in takes, "logits_to_keep" in takes
        self._tokens_by_row: list[list[int]] = [[] for _ in range(num_rows)]
        self._states_by_row: list[States | None] = [None] * num_rows
        self._scored_first = 0
        self._scored: list[tuple[list[int], States]] = []
        self._captured: CapturedStates | None = None
        with torch.inference_mode():
            try:
                self._check_that_states_continue()
            except RefusedState:
                raise
            except Exception as error:  # whatever a model's forward raises on a cache that is not its own
                raise RefusedState(
                    f"{type(model).__name__} does not run on a cache whose states can be put back when drafts are "
                    f"rejected ({type(error).__name__}: {error}); decode it with transformers' generate"
                ) from error

    @property
    def length_by_row(self) -> list[int]:
        return [len(token_ids) for token_ids in self._tokens_by_row]

    def set_up(self, stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode())
        if self.capture != CaptureSpec():
            self._captured = stack.enter_context(capture_states(self.model, self.capture))

    # -- the methods of `interfaces.Verifier`

    def score(
        self,
        token_ids_BT: Tensor,
        num_valid_B: Tensor,
        parents_K: Tensor | None = None,
        *,
        first_row: int = 0,
        last_only: bool = False,
    ) -> VerifierOutput:
        """See `interfaces.Verifier`. Prompts of different lengths run one by one: a state must not see padding."""
        if parents_K is not None:
            raise ValueError(
                f"{type(self.model).__name__} keeps one recurrent state per layer, and the nodes of a draft tree "
                "would each need their own; draft a chain: leave out speculative_token_tree and dynamic_tree"
            )
        self._scored_first, self._scored = first_row, []
        num_valid = num_valid_B.tolist()
        if not last_only or len(set(num_valid)) == 1:
            output = self._run(token_ids_BT, first_row, last_only=last_only)
            self._scored = [(row_T, self._cache.states_of(i)) for i, row_T in enumerate(token_ids_BT.tolist())]
            return output
        logits, states = [], []
        for i, num_tokens in enumerate(num_valid):
            output = self._run(token_ids_BT[i : i + 1, : max(num_tokens, 1)], first_row + i, last_only=True)
            self._scored.append((token_ids_BT[i, :num_tokens].tolist(), self._cache.states_of(0)))
            logits.append(output.logits_BTV)
            states.append(output.states_BTD[0] if output.states_BTD is not None else None)
        return VerifierOutput(torch.cat(logits), _padded(states))

    def keep(self, columns_BT: Tensor, num_kept_B: Tensor) -> None:
        """See `interfaces.Verifier`. States of partly kept rows are computed again from those before the round."""
        rows_by_length: dict[int, list[int]] = {}
        for i, num_kept in enumerate(num_kept_B.tolist()):
            token_ids, states = self._scored[i]
            if num_kept == len(token_ids):
                self._accept(self._scored_first + i, token_ids, states)
            elif num_kept:
                rows_by_length.setdefault(num_kept, []).append(self._scored_first + i)
        for num_kept, rows in rows_by_length.items():
            for run in neighbours(rows):
                self._advance(run, [self._scored[row - self._scored_first][0][:num_kept] for row in run])

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on; the states of a shortened row are computed again."""
        kept = self._tokens_by_row[row][:length]
        assert len(kept) == length
        if length < len(self._tokens_by_row[row]):
            self._tokens_by_row[row], self._states_by_row[row] = [], None
            if kept:
                self._advance([row], [kept])

    def share_prefix(self, from_row: int, to_row: int, length: int) -> None:
        """Run the tokens again: the other row's state is past `length`."""
        self._advance([to_row], [self._tokens_by_row[from_row][:length]])

    def clear_unused(self) -> None:
        """See `interfaces.Verifier`."""
        for row, length in enumerate(self.length_by_row):
            self._cache.clear(row, length)

    # -- forwards

    def _advance(self, rows: list[int], token_ids: list[list[int]]) -> None:
        """Append the same number of tokens to each of several neighbouring rows."""
        self._run(torch.tensor(token_ids, device=self.device), rows[0], last_only=True)
        for i, row in enumerate(rows):
            self._accept(row, token_ids[i], self._cache.states_of(i))

    def _accept(self, row: int, token_ids: list[int], states: States) -> None:
        self._tokens_by_row[row] += token_ids
        self._states_by_row[row] = states

    def _run(self, token_ids_BT: Tensor, first_row: int, *, last_only: bool) -> VerifierOutput:
        B, T = token_ids_BT.shape
        lengths = self.length_by_row[first_row : first_row + B]
        self._cache.load(self._states_by_row[first_row : first_row + B])
        self._cache.reserve(max(lengths) + T)
        position_BT = torch.tensor(lengths, device=self.device)[:, None] + torch.arange(T, device=self.device)
        self._cache.span = self._span(lengths, first_row, T, position_BT)
        kwargs: dict[str, Any] = {self._cache_name: self._cache}
        if self._masks is not None:
            masks = self._masks.chain(position_BT, max(lengths) + T, 1)
            kwargs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        if self._takes_positions:
            kwargs["position_ids"] = position_BT
        if last_only and self._takes_logits_to_keep:
            kwargs["logits_to_keep"] = 1
        logits_BTV = self.model(input_ids=token_ids_BT, use_cache=True, **kwargs).logits
        states_BTD = self._captured.drafter_input if self._captured is not None else None
        return VerifierOutput(logits_BTV[:, -1:] if last_only else logits_BTV, states_BTD)

    def _span(self, lengths: list[int], first_row: int, num_tokens: int, position_BT: Tensor) -> WriteSpan:
        B, num_slots = len(lengths), max(lengths) + num_tokens
        if len(set(lengths)) == 1:
            return WriteSpan(first_row, B, num_tokens, num_slots, lengths[0], None)
        row_B1 = torch.arange(first_row, first_row + B, device=self.device)[:, None]
        return WriteSpan(
            first_row, B, num_tokens, num_slots, None, (row_B1 * self._cache.capacity + position_BT).flatten()
        )

    def _check_that_states_continue(self) -> None:
        """Raise ValueError unless five tokens at once give the logits and states of two and then three: not every model
        reads its state for several tokens. States are compared because they differ for any weights."""
        token_ids_15 = torch.arange(1, 6, device=self.device)[None] % self.vocab_size
        whole = [self._run(token_ids_15, 0, last_only=True).logits_BTV, *tensors_of(self._cache.states_of(0))]
        if not all(tensors_of({i: state}) for i, state in self._cache.states_of(0).items()):
            raise _states_outside_the_cache(self.model)
        self._advance([0], token_ids_15[:, :2].tolist())
        parts = [self._run(token_ids_15[:, 2:], 0, last_only=True).logits_BTV, *tensors_of(self._cache.states_of(0))]
        self._tokens_by_row[0], self._states_by_row[0] = [], None
        difference = max(relative_difference(*pair) for pair in zip(whole, parts, strict=True))
        if not difference <= CHECK_TOLERANCE.get(self.model.dtype, HALF_PRECISION_TOLERANCE):
            raise RefusedState(
                f"{type(self.model).__name__} does not continue its states over several tokens at once (they differ by "
                f"{difference:.1%}), so drafts cannot be scored; decode it with transformers' generate"
            )


def _states_outside_the_cache(model: PreTrainedModel) -> RefusedState:
    return RefusedState(
        f"{type(model).__name__} keeps its states outside transformers' cache, where they cannot be put back when "
        "drafts are rejected; decode it with transformers' generate"
    )


def relative_difference(whole: Tensor, parts: Tensor) -> float:
    whole, parts = whole.float(), parts.float()
    return ((whole - parts).abs().max() / whole.abs().max().clamp_min(1e-30)).item()


def attention_windows(model: PreTrainedModel, config: Any, kinds: list[Any]) -> dict[str, int | None]:
    """Sliding window by type of the layers that keep keys and values. Raises ValueError for unknown cache layers."""
    if not any(isinstance(kind, LinearAttentionCacheLayerMixin) for kind in kinds):
        raise _states_outside_the_cache(model)
    names = list(getattr(config, "layer_types", None) or [])
    windows: dict[str, int | None] = {}
    for i, kind in enumerate(kinds):
        if names and names[i] in STATELESS:
            continue
        if isinstance(kind, DynamicSlidingWindowLayer):
            windows[names[i] if names else "all"] = kind.sliding_window
        elif type(kind) is DynamicLayer or (isinstance(kind, DynamicLayer) and isinstance(kind, LinearAttentionLayer)):
            windows[names[i] if names else "all"] = None
        elif not isinstance(kind, LinearAttentionLayer):
            raise ValueError(
                f"{type(model).__name__} has a cache layer of type {type(kind).__name__}, which cannot be rolled back "
                "here; decode it with transformers' generate"
            )
    return windows if len(set(windows.values())) > 1 else dict(list(windows.items())[:1])


def _padded(states: list[Tensor | None]) -> Tensor | None:
    if states[0] is None:
        return None
    return torch.nn.utils.rnn.pad_sequence([state for state in states if state is not None], batch_first=True)
