"""Which source the trainer asks for verifier states: in process, from files that exist, or both.

no files, no --cache-hidden-states     computed in process, forgotten
files                                  read; what is missing: --on-missing
--cache-hidden-states                  read, or computed once and kept
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from speculators.data_generation import CachedSource, HiddenStateStore, LocalSource, PreparedData
from speculators.interfaces import CaptureSpec, HiddenStateSource, VerifierStates
from speculators.train.keys import DataKeys
from speculators.train.state_cache import KeptInMemory

HIDDEN_STATES_NAME = "hidden_states"
MAX_STORED_DIFFERENCE = 0.15
"""Relative. fp8 storage of bf16 states differs by about 0.03, other layers or models by 1."""


class StoredOrComputed:
    """A `HiddenStateSource`: files where they exist, the verifier for the rest; nothing is written."""

    def __init__(self, store: HiddenStateStore, inner: HiddenStateSource):
        self.store, self.inner = store, inner
        self.capture = store.capture

    def read(self, token_ids: Sequence[Tensor]) -> list[VerifierStates]:
        is_stored = [self.store.has(row) if (row := self.store.row_of(ids)) is not None else False for ids in token_ids]
        computed = iter(self.inner.read([ids for ids, stored in zip(token_ids, is_stored, strict=True) if not stored]))
        stored = iter(self.store.read([ids for ids, stored in zip(token_ids, is_stored, strict=True) if stored]))
        return [next(stored) if from_store else next(computed) for from_store in is_stored]


def open_store(keys: DataKeys, capture: CaptureSpec, verifier: str) -> HiddenStateStore | None:
    """The files beside the prepared data; None when there are none and none are to be made."""
    directory = Path(keys.data_path) / HIDDEN_STATES_NAME
    if not keys.cache_hidden_states and not directory.is_dir():
        return None
    rows = PreparedData.open(keys.data_path).dataset()["input_ids"]
    clipped = (ids[: keys.total_seq_len] for ids in rows)
    return HiddenStateStore(directory, capture, clipped, verifier=verifier)


def rows_to_use(keys: DataKeys, store: HiddenStateStore | None, note: Callable[[str], None]) -> set[int] | None:
    """Rows that may be trained on; None = all of them. Decides before training what `--on-missing` says."""
    if keys.on_missing == "generate" or keys.cache_hidden_states:
        return None
    present = set() if store is None else {row for row in range(len(store.lengths)) if store.has(row)}
    num_rows = len(PreparedData.open(keys.data_path).dataset())
    num_missing = num_rows - len(present)
    if num_missing and (keys.on_missing == "raise" or not present):
        raise ValueError(
            f"{num_missing} of {num_rows} rows have no file in {Path(keys.data_path) / HIDDEN_STATES_NAME}: compute "
            "them as training goes with --on-missing generate, or leave them out with --on-missing warn"
        )
    if num_missing and keys.on_missing == "warn":
        note(f"{num_missing} of {num_rows} rows have no stored verifier states and are left out")
    return present


def make_source(
    keys: DataKeys, capture: CaptureSpec, store: HiddenStateStore | None, verifier_model: PreTrainedModel | None
) -> HiddenStateSource:
    """`verifier_model=None`: every row that is used has a file."""
    if verifier_model is None:
        assert store is not None
        return store
    local = LocalSource(verifier_model, capture)
    if store is None:
        return kept_in_memory(keys, local, verifier_model)
    check_stored_states(store, local, Path(keys.data_path))
    return CachedSource(local, store) if keys.cache_hidden_states else StoredOrComputed(store, local)


def kept_in_memory(keys: DataKeys, local: LocalSource, verifier_model: PreTrainedModel) -> HiddenStateSource:
    """Only where later epochs can use them: `--hidden-states-memory-gb 0` computes them anew each time."""
    if keys.hidden_states_memory_gb == 0:
        return local
    hidden_size = verifier_model.config.get_text_config(decoder=True).hidden_size
    num_states = len(local.capture.aux_layer_ids) + local.capture.last_hidden
    data = PreparedData.open(keys.data_path).dataset()
    return KeptInMemory(
        local,
        [min(int(length), keys.total_seq_len) for length in data["seq_len"]],
        lambda row: data[row]["input_ids"][: keys.total_seq_len],
        bytes_a_token=num_states * hidden_size * verifier_model.dtype.itemsize,
        budget_bytes=int(keys.hidden_states_memory_gb * 1e9),
    )


def check_stored_states(store: HiddenStateStore, local: LocalSource, datapath: Path) -> None:
    """Compare the first stored row with what the verifier says now: states of another model train a useless drafter."""
    row = min(store.present, default=None)
    if row is None:
        return
    token_ids = PreparedData.open(datapath).dataset()[row]["input_ids"][: store.lengths[row]]
    [stored], [computed] = store.read([token_ids]), local.read([token_ids])
    for ours, theirs in ((computed.aux_TD, stored.aux_TD), (computed.last_hidden_TH, stored.last_hidden_TH)):
        if ours is None or theirs is None:
            continue
        difference = float((ours.float().cpu() - theirs.float()).norm() / ours.float().norm())
        if not difference <= MAX_STORED_DIFFERENCE:
            raise ValueError(
                f"the states stored for row {row} in {store.directory} differ from the verifier's by {difference:.0%}: "
                "they are of another model or of other layers; delete them, or use another --data-path"
            )
