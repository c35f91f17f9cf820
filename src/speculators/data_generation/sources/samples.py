"""What a sharded store holds: the facts that all its samples share, and the way from states to bytes and back.

    contents     token ids int32 [T] | scales f32 [T] (fp8 only) | aux states [T, D] | last states [M, H]

One scale per token over all its states. M = T, or with `last_rows="supervised"` the rows a target is made of: those of
a supervised token, and of the token before it. The others read as zeros, which no loss looks at.
Shapes: T tokens, M stored last states, D width of the aux states, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speculators.checkpoint.record import verifier_facts
from speculators.data_generation.offline import FP8, CorruptHiddenStatesError, check_finite, columns_of, quantise
from speculators.data_generation.prepared import PreparedData
from speculators.data_generation.sources.shard_writer import LastRows
from speculators.data_generation.sources.shards import (
    REUSED,
    Entry,
    Mappings,
    Shard,
    as_json,
    read_index,
    read_shard,
    shard_paths,
)
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.provenance import changed_settings
from speculators.utils.files import is_same_model, read_json_object
from speculators.verifier.loading import layer_matrices

FORMAT = "speculators-store-1"
MANIFEST = "store.json"


@dataclass(frozen=True)
class Origin:
    """Says what the states are made from and by; None where nobody knows."""

    verifier: str | None = None
    verifier_fingerprint: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    projection: str | None = None
    """Fingerprint of the projection whose output is stored in place of the aux states."""

    def completed(self, known: Origin) -> Origin:
        """Takes over what this one does not know, what a store does not say, and the name of a verifier with the same
        fingerprint."""
        mine = {name: value for name, value in vars(self).items() if None not in (value, getattr(known, name))}
        if self.verifier_fingerprint is None or self.verifier_fingerprint == known.verifier_fingerprint:
            mine.pop("verifier", None)
        return Origin(**{**vars(known), **mine})


def origin_of(verifier: str, prepared: PreparedData | None = None) -> Origin:
    """Describes the verifier, by its files alone, and the template of the rows, where those can be read."""
    is_here = bool(layer_matrices(verifier, 2))  # a server may serve what this machine does not have
    facts = verifier_facts(verifier) if is_here else {}
    known = sorted((key, value) for key, value in facts.items() if key != "name_or_path")
    is_read = any(facts.get("tensors", {}).values())
    recipe = None if prepared is None or prepared.manifest is None else prepared.manifest.recipe
    return Origin(
        verifier=verifier,
        verifier_fingerprint=hashlib.sha256(repr(known).encode()).hexdigest()[:16] if is_read else None,
        tokenizer=None if recipe is None else recipe.tokenizer_sha256[:16],
        chat_template=None if recipe is None else (recipe.chat_template_sha256 or "none")[:16],
    )


@dataclass(frozen=True)
class StoreFacts:
    """Says what every sample of a store is, in `store.json` and in the head of each shard."""

    aux_layer_ids: tuple[int, ...]
    last_hidden: bool
    last_rows: LastRows
    aux_width: int
    hidden_size: int
    dtype: str
    source_dtype: str
    """Type to which fp8 values are restored."""
    origin: Origin

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {"format": FORMAT, **values.pop("origin"), **values, "aux_layer_ids": list(self.aux_layer_ids)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Path) -> StoreFacts:
        values = dict(values)
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is not of format {FORMAT}; read it with the version that wrote it")
        try:
            origin = Origin(**{name: values.pop(name) for name in Origin.__dataclass_fields__})
            facts = cls(**{**values, "aux_layer_ids": tuple(values["aux_layer_ids"])}, origin=origin)
            if not isinstance(getattr(torch, facts.dtype), torch.dtype):
                raise ValueError(facts.dtype)
            return facts
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, it is written again from the shards") from error

    @property
    def made(self) -> str:
        return hashlib.sha256(as_json(self.to_dict())).hexdigest()[:16]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def kept_rows(self, mask_T: Tensor) -> Tensor:
        """Says whose last states are stored: bool [T]."""
        return target_rows(mask_T) if self.last_rows == "supervised" else torch.ones(len(mask_T), dtype=torch.bool)

    def num_bytes(self, num_tokens: int, num_last: int) -> int:
        """Bytes of the contents of a sample."""
        item = self.torch_dtype.itemsize
        fixed = 4 + 4 * (self.torch_dtype == FP8) + self.aux_width * item
        return num_tokens * fixed + num_last * self.hidden_size * item * self.last_hidden


# -- one sample --------------------------------------------------------------------------------------------------------


def runs_of(mask_T: Tensor) -> tuple[int, ...]:
    """Lengths of runs, the first one of zeros: [1, 1, 0] -> (0, 2, 1)."""
    mask = np.concatenate(([0], mask_T.cpu().numpy().astype(bool).astype(np.int8)))
    edges = np.flatnonzero(np.diff(mask))
    return tuple(np.diff(np.concatenate(([0], edges, [len(mask) - 1]))).tolist())


def mask_of(runs: Sequence[int]) -> Tensor:
    values = torch.arange(len(runs)) % 2 == 1
    return values.repeat_interleave(torch.tensor(runs, dtype=torch.int64))


def target_rows(mask_T: Tensor) -> Tensor:
    """Says which last states the targets of supervised tokens are made of: bool [T].

    y[i] tells what follows token i, so it is a target of a supervised token i (EAGLE) or i + 1 (DFlash)."""
    kept_T = mask_T.bool().clone()
    kept_T[:-1] |= mask_T[1:].bool()
    return kept_T


def encode(states: VerifierStates, kept_T: Tensor, facts: StoreFacts) -> list[memoryview]:
    """Makes the contents of a sample. Raises `ValueError` for NaN and infinity."""
    aux_TD = states.token_ids_T.new_zeros(len(kept_T), 0).float() if states.aux_TD is None else states.aux_TD.cpu()
    last_TH = aux_TD[:, :0] if states.last_hidden_TH is None else states.last_hidden_TH.cpu()
    num_aux = max(1, facts.aux_width // max(1, facts.hidden_size))
    for part in (aux_TD.unflatten(-1, (num_aux, -1)), last_TH[:, None]):
        check_finite(part)
    parts = [states.token_ids_T.to("cpu", torch.int32)]
    if facts.torch_dtype == FP8:
        values_T1W, scales_T11 = quantise(torch.cat((aux_TD.to(last_TH.dtype), last_TH), dim=-1)[:, None])
        parts.append(scales_T11.flatten())
        aux_TD, last_TH = values_T1W[:, 0].split((aux_TD.shape[1], last_TH.shape[1]), dim=-1)
    else:
        aux_TD, last_TH = (part.to(facts.torch_dtype) for part in (aux_TD, last_TH))
        for part in (aux_TD, last_TH):
            check_finite(part[:, None])  # float16 overflows where bfloat16 does not
    last_MH = last_TH.view(torch.uint8)[kept_T] if last_TH.shape[1] else last_TH[:0]
    return [part.contiguous().flatten().view(torch.uint8).numpy().data for part in (*parts, aux_TD, last_MH)]


def decode(content: Tensor, entry: Entry, facts: StoreFacts) -> VerifierStates:
    """Reads the contents of a sample, uint8; states that need no restoring are views of it."""
    num_tokens, is_fp8 = entry.num_tokens, facts.torch_dtype == FP8
    kept_T = facts.kept_rows(mask_of(entry.mask))
    num_last = int(kept_T.sum()) * facts.last_hidden
    item = facts.torch_dtype.itemsize
    sizes = (4 * num_tokens, 4 * num_tokens * is_fp8, num_tokens * facts.aux_width * item)
    ids, scales, aux, last = content.tensor_split(np.cumsum(sizes).tolist())
    aux_TD = aux.view(facts.torch_dtype).view(num_tokens, facts.aux_width)
    last_MH = last.view(facts.torch_dtype).view(num_last, facts.hidden_size if facts.last_hidden else 0)
    if is_fp8:
        scales_T1 = scales.view(torch.float32)[:, None]
        source_dtype = getattr(torch, facts.source_dtype)
        aux_TD = (aux_TD.float() * scales_T1).to(source_dtype)
        last_MH = (last_MH.float() * (scales_T1[kept_T] if facts.last_hidden else 1)).to(source_dtype)
    last_TH = None
    if facts.last_hidden:
        last_TH = last_MH
        if num_last < num_tokens:
            last_TH = last_MH.new_zeros(num_tokens, facts.hidden_size)
            last_TH[kept_T] = last_MH
    return VerifierStates(ids.view(torch.int32).to(torch.int64), aux_TD if facts.aux_width else None, last_TH)


def read_sample(mappings: Mappings, entry: Entry, facts: StoreFacts, *, always_check: bool = False) -> VerifierStates:
    """Reads a sample; checks bytes and values when it is first read. Raises `CorruptHiddenStatesError`."""
    is_checked = mappings.is_checked(entry) and not always_check
    states = decode(mappings.content(entry, always_check=always_check), entry, facts)
    for values in (states.aux_TD, states.last_hidden_TH):
        if not is_checked and values is not None and not torch.isfinite(values).all():
            raise CorruptHiddenStatesError(
                f"{mappings.directory / entry.shard}: the states of row {entry.row} are NaN or infinite; `speculators "
                "store compact` drops them, then generate-offline-data writes them again"
            )
    return states


def choose(states: VerifierStates, facts: StoreFacts, capture: CaptureSpec, num_tokens: int) -> VerifierStates:
    """Returns what `capture` asks for, of the first tokens: causal states of a clipped row are those of the whole."""
    layers = facts.aux_layer_ids if facts.origin.projection is None else capture.aux_layer_ids
    chosen = columns_of(states, layers, capture)
    aux_TD, last_TH = chosen.aux_TD, chosen.last_hidden_TH
    return VerifierStates(
        states.token_ids_T[:num_tokens],
        None if aux_TD is None else aux_TD[:num_tokens],
        None if last_TH is None else last_TH[:num_tokens],
    )


def refuse_other_reader(facts: StoreFacts, capture: CaptureSpec, ours: Origin, file: Path) -> None:
    """Raises `ValueError` when a store cannot give what `capture` asks for, or is of another verifier."""
    theirs, ways_out = facts.origin, "name another directory for the states, or delete this one"
    if set(capture.aux_layer_ids) - set(facts.aux_layer_ids) or (capture.last_hidden and not facts.last_hidden):
        raise ValueError(
            f"{file} holds layers {list(facts.aux_layer_ids)}{' and the last' * facts.last_hidden}, the drafter reads "
            f"{capture}: {ways_out}"
        )
    if facts.last_rows == "supervised" and not capture.aux_layer_ids:
        raise ValueError(
            f"{file} holds the last state of supervised tokens only, and this drafter reads that of every token: write "
            "the states with --last-states all"
        )
    if theirs.projection != ours.projection:
        raise ValueError(
            f"{file} holds {'states' if theirs.projection is None else 'projection ' + theirs.projection}, the drafter "
            f"reads {'states' if ours.projection is None else 'projection ' + ours.projection}: {ways_out}"
        )
    if not is_same_origin(ours, theirs):
        raise ValueError(
            f"{file} holds states of {theirs.verifier!r} (weights {theirs.verifier_fingerprint}), not of "
            f"{ours.verifier!r} (weights {ours.verifier_fingerprint}); {ways_out}"
        )


def is_same_origin(ours: Origin, theirs: Origin) -> bool:
    """Compares verifiers by their weights where both are known, else by their names."""
    if None not in (ours.verifier_fingerprint, theirs.verifier_fingerprint):
        return ours.verifier_fingerprint == theirs.verifier_fingerprint
    return ours.verifier is None or theirs.verifier is None or is_same_model(ours.verifier, theirs.verifier)


@dataclass
class Directory:
    """A store as found on disk."""

    facts: StoreFacts | None
    shards: list[Shard]
    reused: list[Entry]
    """Samples that were written and whose space was reused."""

    @classmethod
    def read(cls, directory: Path) -> Directory:
        """Raises `ValueError`, naming the file, where manifest and shards are not of one store."""
        shards = [read_shard(path) for path in shard_paths(directory)]
        manifest = directory / MANIFEST
        fix = "delete it: it is written again from the shards"
        values = read_json_object(manifest, fix) if manifest.is_file() else None
        for shard in shards:
            values = values if values is not None else shard.facts
            if values is not None and shard.facts is not None and values != shard.facts:
                changes = "; ".join(f"{name}: {how}" for name, how in changed_settings(values, shard.facts).items())
                raise CorruptHiddenStatesError(
                    f"{manifest} does not describe {shard.path.name} ({changes}): it is stale, or the shard is of "
                    "another store; delete the one that is wrong"
                )
        facts = None if values is None else StoreFacts.from_dict(values, manifest)
        gone = sorted(directory.glob(f"*{REUSED}"))
        reused = [entry for path in gone for entry in read_index(path, path.name)[0]]
        return cls(facts, shards, reused)

    @property
    def problems(self) -> list[str]:
        return [problem for shard in self.shards for problem in shard.problems]

    def entries(self) -> dict[str, Entry]:
        """Hash of the tokens -> the sample that counts."""
        found: dict[str, Entry] = {}
        for shard in self.shards:
            for entry in shard.entries:
                known = found.get(entry.tokens)
                if known is None or entry.attempt >= known.attempt:
                    found[entry.tokens] = entry
        return found
