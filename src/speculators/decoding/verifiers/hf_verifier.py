"""Any Hugging Face causal LM as a `Verifier`: scores tokens of rows of different lengths against a preallocated cache.

Shapes: B rows of the forward (first_row .. first_row + B - 1), T tokens, V vocabulary, D width of captured states.

Lengths are host integers. `score` writes behind a row's length, `keep` moves the length: rollback is free.
Use it as a context manager around a run of forwards: entering sets the model up for decoding, leaving restores it.

There are two forwards: `LeanForward` for Llama-shaped models whose logits it reproduces (tested when the verifier is
made), and `HFForward`, the model's own, for all others and for a model that gets hooks or other modules later.
`forward_reason` says which one runs and why.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators.decoding.verifiers.cache import Move, WriteSpan, path_moves
from speculators.decoding.verifiers.hf_forward import HFForward, MaskBuilder, Masks
from speculators.decoding.verifiers.lean_forward import LeanForward, StaticForward
from speculators.decoding.verifiers.lean_weights import LeanWeights, NotLlamaShaped
from speculators.interfaces import CaptureSpec, VerifierOutput
from speculators.nn.device import to_device
from speculators.nn.graphs import Record
from speculators.utils.util import NestedContext
from speculators.verifier import VerifierParts, capture_states, verifier_parts

MAX_GROUPED_TOKENS = 32
"""Up to here a forward is decoding (heads that share a key are grouped); beyond, it is prefill."""
NUM_PROVEN_TOKENS = 16
"""Tokens on which the lean forward is compared with the model's own."""
TOLERANCE_BY_DTYPE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference that is rounding, as a share of the largest value."""


class HFVerifier(NestedContext):
    """A model with a cache of `num_rows` rows. `capture`: the states that `score` returns. `lean=False`: run the
    model's own forward. `masks` of that forward: "own" are those that the model makes, one row at a time, chains only.
    Raises ValueError for layers that the model does not have or that cannot be rolled back."""

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        capture: CaptureSpec | None = None,
        *,
        lean: bool = True,
        masks: Masks = "grouped",
    ):
        parts = verifier_parts(model)
        capture = capture or CaptureSpec()
        refuse_unknown_layers(capture, parts)
        forward: LeanForward | HFForward | None = None
        self.forward_reason = "lean=False"
        if lean and masks == "grouped":
            forward, self.forward_reason = lean_forward(model, parts, num_rows, capture)
        windows = None if masks == "own" else _attention_windows(model, parts.config)
        forward = forward or HFForward(model, parts, num_rows, capture, masks=masks)
        self._start(model, parts, num_rows, forward, windows)

    def _start(
        self,
        model: PreTrainedModel,
        parts: VerifierParts,
        num_rows: int,
        forward: LeanForward | HFForward,
        windows: dict[str, int | None] | None,
    ) -> None:
        """`windows` None: the model makes its masks itself."""
        parameter = parts.head.weight
        self._model = model
        self.num_rows, self.length_by_row = num_rows, [0] * num_rows
        self.vocab_size: int = parts.config.vocab_size
        self.device: torch.device = parameter.device  # type: ignore[assignment]
        self._forward, self._cache = forward, forward.cache
        self._max_positions: int | None = getattr(parts.config, "max_position_embeddings", None)
        self._masks = None if windows is None else MaskBuilder(windows, parameter.dtype, self.device)  # type: ignore[arg-type]
        self._position_S = torch.arange(0, device=self.device)
        self._last_rows: tuple[int, bool] = (0, False)
        self._static: StaticForward | None = None

    @classmethod
    def around(cls, forward: LeanForward, model: PreTrainedModel, parts: VerifierParts, num_rows: int) -> HFVerifier:
        """A verifier on a given forward."""
        verifier = cls.__new__(cls)
        verifier._start(model, parts, num_rows, forward, _attention_windows(model, parts.config))
        return verifier

    @property
    def is_lean(self) -> bool:
        return isinstance(self._forward, LeanForward)

    @property
    def has_fixed_shapes(self) -> bool:
        return self._static is not None

    def use_graphs(self, record: Record | None) -> None:
        """Score decoding's chains at fixed shapes (`nn.graphs`), where the forward is lean; None: no longer."""
        self._static = None
        if record is not None and isinstance(self._forward, LeanForward) and self._masks is not None:
            self._static = StaticForward(self._forward, self._masks, self.num_rows, record)

    def set_up(self, stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode())
        self._leave_lean_if_changed()
        stack.enter_context(self._forward)

    def _leave_lean_if_changed(self) -> None:
        """Go on with the model's own forward once it has hooks or modules that the lean one would not run."""
        if not isinstance(self._forward, LeanForward):
            return
        try:
            self._forward.weights.refuse_changes()
        except NotLlamaShaped as reason:
            forward = HFForward(self._model, verifier_parts(self._model), self.num_rows, self._forward.capture)
            if self._cache.capacity:
                forward.cache.adopt(*self._forward.cache.by_layer())
            self._forward, self._cache, self.forward_reason = forward, forward.cache, str(reason)
            self._static = None

    def num_positions_left(self, row: int) -> int:
        """How many more tokens the row may have before the model's positions end."""
        return sys.maxsize if self._max_positions is None else max(self._max_positions - self.length_by_row[row], 0)

    # -- scoring

    def score(
        self,
        token_ids_BT: Tensor,
        num_valid_B: Tensor,
        parents_K: Tensor | None = None,
        *,
        first_row: int = 0,
        last_only: bool = False,
    ) -> VerifierOutput:
        """See `interfaces.Verifier`. `last_only` computes logits of each row's last valid token alone: [B, 1, V]."""
        B, T = token_ids_BT.shape
        if self._static is not None and parents_K is None and not (first_row or last_only) and T <= MAX_GROUPED_TOKENS:
            self._last_rows = (0, False)
            return VerifierOutput(*self._static(token_ids_BT, self.length_by_row))
        lengths = self.length_by_row[first_row : first_row + B]
        self._cache.reserve(max(lengths) + T)
        position_BT, masks = self._positions_and_masks(lengths, T, parents_K)
        span = self._span(lengths, first_row, T, position_BT, parents_K is None)
        self._last_rows = (first_row, parents_K is not None)
        columns_B = (num_valid_B - 1).clamp(min=0) if last_only else None
        return VerifierOutput(*self._forward(token_ids_BT, position_BT, masks, span, columns_B))

    def keep(self, columns_BT: Tensor, num_kept_B: Tensor) -> None:
        """See `interfaces.Verifier`. Give host tensors: lengths live on the host."""
        first_row, is_tree = self._last_rows
        moves: list[Move] = []
        for i, (num_kept, columns) in enumerate(zip(num_kept_B.tolist(), columns_BT.tolist(), strict=True)):
            row = first_row + i
            length = self.length_by_row[row]
            moves += path_moves(row, length, columns[:num_kept]) if is_tree else []
            self.length_by_row[row] += num_kept
        if moves:
            self._cache.move(moves)

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on (0 = the row is free)."""
        assert length <= self.length_by_row[row]
        self.length_by_row[row] = length

    def share_prefix(self, from_row: int, to_row: int, length: int) -> None:
        """Give `to_row` the first `length` tokens of `from_row` without computing them."""
        assert length <= self.length_by_row[from_row]
        self._cache.copy_prefix(from_row, to_row, length)
        self.length_by_row[to_row] = length

    def clear_unused(self) -> None:
        """See `interfaces.Verifier`."""
        for row, length in enumerate(self.length_by_row):
            self._cache.clear(row, length)

    def cached_states(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Cached keys and values of a row, each [N, S, D]."""
        return self._cache.layer_states(layer, row, self.length_by_row[row])

    # -- inputs of one forward

    def _positions_and_masks(
        self, lengths: list[int], num_tokens: int, parents_K: Tensor | None
    ) -> tuple[Tensor, Tensor | dict[str, Tensor] | None]:
        num_slots = max(lengths) + num_tokens
        if self._masks is None:
            assert len(lengths) == 1 and parents_K is None
            return self._positions(num_slots)[None, lengths[0] :], None
        groups = self._forward.num_groups if num_tokens <= MAX_GROUPED_TOKENS else 1
        if parents_K is not None:
            tree = self._masks.tree_shape(parents_K)
            length_B = to_device(lengths, self.device)
            position_BT = length_B[:, None] + tree.depth_T
            return position_BT, self._unwrapped(self._masks.tree(tree, length_B, num_slots, groups))
        if len(set(lengths)) == 1:
            position_BT = self._positions(num_slots)[lengths[0] :].expand(len(lengths), -1)
        else:
            length_B1 = to_device(lengths, self.device)[:, None]
            position_BT = length_B1 + self._positions(num_tokens)
        if self._forward.is_grouped and _needs_no_mask(self._masks.windows, lengths, num_tokens):
            return position_BT, None
        return position_BT, self._unwrapped(self._masks.chain(position_BT, num_slots, groups))

    def _positions(self, end: int) -> Tensor:
        """0 .. end - 1: a view of one table."""
        if len(self._position_S) < end:
            self._position_S = torch.arange(2 * end, device=self.device)
        return self._position_S[:end]

    def _unwrapped(self, masks: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _span(
        self, lengths: list[int], first_row: int, num_tokens: int, position_BT: Tensor, is_chain: bool
    ) -> WriteSpan:
        B, num_slots = len(lengths), max(lengths) + num_tokens
        if len(set(lengths)) == 1:
            return WriteSpan(first_row, B, num_tokens, num_slots, lengths[0], None, is_chain)
        row_B1 = torch.arange(first_row, first_row + B, device=self.device)[:, None]
        slot_BT = position_BT[:, :1] + self._positions(num_tokens)  # nodes of a tree fill consecutive slots
        slots_M = (row_B1 * self._cache.capacity + slot_BT).flatten()
        return WriteSpan(first_row, B, num_tokens, num_slots, None, slots_M, is_chain)


def _needs_no_mask(windows: dict[str, int | None], lengths: list[int], num_tokens: int) -> bool:
    """Whether no mask is needed: one new token that attends to all, or a prompt from its start (plain causal)."""
    num_slots = max(lengths) + num_tokens
    if any(window is not None and num_slots > window for window in windows.values()):
        return False
    return max(lengths) == 0 or (num_tokens == 1 and len(set(lengths)) == 1)


def refuse_unknown_layers(capture: CaptureSpec, parts: VerifierParts) -> None:
    num_layers = len(parts.layers)
    if any(not 0 <= i <= num_layers for i in capture.aux_layer_ids):
        raise ValueError(
            f"aux_layer_ids={list(capture.aux_layer_ids)} but the verifier has {num_layers} layers; ids count finished "
            f"layers, so 0..{num_layers} are valid"
        )


def lean_forward(
    model: PreTrainedModel, parts: VerifierParts, num_rows: int, capture: CaptureSpec
) -> tuple[LeanForward | None, str]:
    """The lean forward, if it reproduces the model's own, else None; and the reason."""
    try:
        weights = LeanWeights(model, parts)
        prove_same(weights, model, parts)
    except NotLlamaShaped as reason:
        return None, str(reason)
    return LeanForward(weights, parts.config, num_rows, capture), "Llama-shaped: its logits are the model's own"


def prove_same(weights: LeanWeights, model: PreTrainedModel, parts: VerifierParts) -> None:
    """Raise NotLlamaShaped unless logits and all layers' states equal the model's, on a few tokens in two chunks."""
    everything = CaptureSpec(tuple(range(len(parts.layers) + 1)))
    trial = HFVerifier.around(LeanForward(weights, parts.config, 1, everything), model, parts, 1)
    T, first = NUM_PROVEN_TOKENS, NUM_PROVEN_TOKENS - 5
    token_ids_1T = (torch.arange(T, device=trial.device)[None] * 37 + 11) % trial.vocab_size
    with torch.inference_mode(), capture_states(model, everything) as states:
        logits = model(input_ids=token_ids_1T, use_cache=False).logits
    with trial:
        head = trial.score(token_ids_1T[:, :first], torch.tensor([first]))
        trial.keep(torch.arange(first)[None], torch.tensor([first]))
        tail = trial.score(token_ids_1T[:, first:], torch.tensor([T - first]))
    assert states.aux is not None and head.states_BTD is not None and tail.states_BTD is not None
    compare("logits", torch.cat((head.logits_BTV, tail.logits_BTV), 1), logits)
    compare("states", torch.cat((head.states_BTD, tail.states_BTD), 1), states.aux)


def compare(what: str, ours: Tensor, expected: Tensor) -> None:
    if ours.shape != expected.shape:
        raise NotLlamaShaped(f"its {what} have shape {tuple(expected.shape)}, read as Llama's {tuple(ours.shape)}")
    difference = (ours.float() - expected.float()).abs().max().item()
    difference /= max(expected.float().abs().max().item(), 1.0)
    if not difference <= TOLERANCE_BY_DTYPE.get(expected.dtype, 0.0):
        raise NotLlamaShaped(f"read as Llama's, its {what} differ by {difference:.1e} of the largest")


def _attention_windows(model: PreTrainedModel, config: Any) -> dict[str, int | None]:
    """Sliding window by layer type (None: full attention). Raises ValueError for recurrent layers."""
    layer_types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{type(model).__name__} keeps a recurrent state, which cannot be rolled back when drafts are rejected; "
            "decode it with transformers' generate"
        )
    unknown = [name for name in layer_types if name not in ("full_attention", "sliding_attention")]
    if unknown:
        raise ValueError(f"{type(model).__name__} has layers of type {unknown}, for which no masks are made here")
    window = getattr(config, "sliding_window", None)
    if not layer_types:
        return {"all": window if getattr(config, "use_sliding_window", True) else None}
    return {name: window if name == "sliding_attention" else None for name in layer_types}
