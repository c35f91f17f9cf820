"""Chooses the reduced draft vocabulary: the verifier tokens that occur most often in the training data.

    t2d  bool  [V]   True where the verifier's token is in the draft vocabulary
    d2t  int64 [D]   OFFSETS: verifier id = draft id + d2t[draft id]; draft ids ascend with verifier ids

On disk: `d2t-<D>.npy` and `t2d-<D>.npy` beside the data. Names without a size, of earlier versions, are read too.
Nothing is read unless a size is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speculators.nn.draft_tokens import offsets_of
from speculators.utils.files import atomic_write
from speculators.verifier.config import get_verifier_config

logger = logging.getLogger(__name__)

TOKEN_FREQ_NAME = "token_freq.pt"
VocabMapping = tuple[Tensor, Tensor]
"""(d2t, t2d)"""


def build_vocab_mappings_from_distribution(
    token_freq_dict: Mapping[int, int], draft_vocab_size: int, target_vocab_size: int
) -> VocabMapping:
    """Takes the `draft_vocab_size` most frequent tokens (ties: the smaller id), then the smallest unused ids.

    Returns (d2t [D], t2d [V]). Raises `ValueError` for an impossible size or a counted token outside the vocabulary.
    """
    check_sizes(draft_vocab_size, target_vocab_size)
    outside = [token for token in token_freq_dict if not 0 <= token < target_vocab_size]
    if outside:
        raise ValueError(
            f"token frequencies count token {outside[0]} but the verifier's vocabulary is 0..{target_vocab_size - 1}; "
            "they were counted with another tokenizer: prepare the data again with this verifier"
        )
    by_frequency = sorted(token_freq_dict, key=lambda token: (-token_freq_dict[token], token))
    kept = set(by_frequency[:draft_vocab_size])
    unused = (token for token in range(draft_vocab_size) if token not in kept)
    kept.update(token for token, _ in zip(unused, range(draft_vocab_size - len(kept)), strict=False))
    kept_D = torch.tensor(sorted(kept), dtype=torch.int64)
    t2d = torch.zeros(target_vocab_size, dtype=torch.bool)
    t2d[kept_D] = True
    return offsets_of(kept_D), t2d


def check_sizes(draft_vocab_size: int, target_vocab_size: int) -> None:
    if not 1 <= draft_vocab_size <= target_vocab_size:
        raise ValueError(
            f"draft_vocab_size={draft_vocab_size} but the verifier has {target_vocab_size} tokens; "
            f"1..{target_vocab_size} are valid"
        )


def get_target_vocab_size(size: int | None = None, model_path: str | None = None) -> int:
    """Returns the verifier's vocabulary size, given or read from its config. Raises `ValueError` unless given one."""
    if size is not None and model_path is None:
        return size
    if size is not None or model_path is None:
        raise ValueError(f"target_vocab_size={size} and target_model_path={model_path!r}: give exactly one of the two")
    return int(get_verifier_config(model_path).vocab_size)


def coverage(token_ids_N: Tensor, t2d: Tensor) -> str:
    """Says how many of the trained tokens are in the draft vocabulary: about the most drafts that can be accepted."""
    num_kept, num_tokens = int(t2d.cpu()[token_ids_N].sum()), len(token_ids_N)
    return (
        f"the draft vocabulary of {int(t2d.sum()):,} tokens holds {num_kept / max(num_tokens, 1):.1%} of the "
        f"{num_tokens:,} trained tokens; the others cannot be drafted"
    )


def check_vocab_mapping(d2t: Tensor, t2d: Tensor, draft_vocab_size: int | None, target_vocab_size: int) -> None:
    """Raises `ValueError` unless d2t [D] and t2d [V] have the right sizes and describe the same tokens."""
    if draft_vocab_size is not None and len(d2t) != draft_vocab_size:
        raise ValueError(
            f"d2t has {len(d2t)} entries but draft_vocab_size={draft_vocab_size}; use a mapping of that size"
        )
    if len(t2d) != target_vocab_size:
        raise ValueError(
            f"t2d has {len(t2d)} entries but the verifier has {target_vocab_size} tokens; it is another verifier's"
        )
    kept_D = t2d.nonzero().flatten()
    if len(kept_D) != len(d2t) or not torch.equal(offsets_of(kept_D), d2t):
        raise ValueError(
            f"d2t ({len(d2t)} entries) and t2d ({len(kept_D)} tokens kept) contradict each other; d2t holds offsets, "
            "verifier id = draft id + d2t[draft id]: build both again from the token frequencies"
        )


def mapping_paths(directory: Path, draft_vocab_size: int) -> tuple[Path, Path]:
    return directory / f"d2t-{draft_vocab_size}.npy", directory / f"t2d-{draft_vocab_size}.npy"


def save_vocab_mapping(directory: str | Path, d2t: Tensor, t2d: Tensor) -> None:
    """Writes both files, named by the size of the draft vocabulary."""
    for path, mapping in zip(mapping_paths(Path(directory), len(d2t)), (d2t, t2d), strict=True):
        with atomic_write(path, "wb") as file:
            np.save(file, mapping.cpu().numpy())


def load_vocab_mapping(d2t_path: str | Path, t2d_path: str | Path) -> VocabMapping:
    """Reads (d2t, t2d) from .npy or torch files. Raises `ValueError` for a file that cannot be read."""
    d2t, t2d = (load_array(Path(path)) for path in (d2t_path, t2d_path))
    return d2t.to(torch.int64), t2d.to(torch.bool)


def load_array(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        loaded = torch.load(path, weights_only=True)
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise ValueError(f"vocabulary mapping {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, Tensor):
        raise ValueError(f"vocabulary mapping {str(path)!r} holds a {type(loaded).__name__}, not a tensor")
    return loaded


def load_token_freq(path: str | Path) -> dict[int, int]:
    """Reads how often each token occurs. Raises `ValueError` for a damaged or foreign file."""
    try:
        counts = torch.load(path, weights_only=True)
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise ValueError(f"token frequencies {str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and friends of a damaged or foreign file
        raise ValueError(f"token frequencies {str(path)!r} are damaged or hold more than numbers: {error}") from error
    if not isinstance(counts, dict):
        raise ValueError(f"token frequencies {str(path)!r} hold a {type(counts).__name__}, not a dict of counts")
    return {int(token): int(count) for token, count in counts.items()}


def cached_vocab_mapping(directory: Path, draft_vocab_size: int) -> VocabMapping | None:
    """Reads the mapping beside the data: of the wanted size, else under the names without a size; None if missing."""
    without_size = directory / "d2t.npy", directory / "t2d.npy"
    for d2t_path, t2d_path in (mapping_paths(directory, draft_vocab_size), without_size):
        if d2t_path.is_file() and t2d_path.is_file():
            return load_vocab_mapping(d2t_path, t2d_path)
    return None


def resolve_vocab_mapping(
    *,
    target_vocab_size: int,
    draft_vocab_size: int | None = None,
    data_path: str | Path | None = None,
    token_freq_path: str | Path | None = None,
    d2t_path: str | Path | None = None,
    t2d_path: str | Path | None = None,
) -> VocabMapping | None:
    """Returns the mapping (d2t, t2d) to train with; None = the verifier's whole vocabulary.

    Uses explicit files; else, for a `draft_vocab_size`, those cached in the data directory, or builds one from token
    frequencies and caches it.
    Raises `ValueError` for a `draft_vocab_size` that cannot be met, and for files that do not fit.
    """
    if (d2t_path is None) != (t2d_path is None):
        given, missing = ("d2t_path", "t2d_path") if t2d_path is None else ("t2d_path", "d2t_path")
        raise ValueError(f"{given} is given without {missing}; a mapping is both files")
    if d2t_path is not None and t2d_path is not None:
        return checked(load_vocab_mapping(d2t_path, t2d_path), draft_vocab_size, target_vocab_size)
    if draft_vocab_size is None:
        logger.warning("no draft_vocab_size: the drafter uses the verifier's whole vocabulary (%d)", target_vocab_size)
        return None
    check_sizes(draft_vocab_size, target_vocab_size)
    if draft_vocab_size == target_vocab_size:
        return None
    directory = Path(data_path) if data_path is not None else None
    # frequencies named by the user win over a cache that may have been built from others
    if directory is not None and token_freq_path is None:
        cached = cached_vocab_mapping(directory, draft_vocab_size)
        if cached is not None:
            return checked(cached, draft_vocab_size, target_vocab_size)
    return build_and_cache(directory, token_freq_path, draft_vocab_size, target_vocab_size)


def checked(mapping: VocabMapping, draft_vocab_size: int | None, target_vocab_size: int) -> VocabMapping:
    check_vocab_mapping(*mapping, draft_vocab_size, target_vocab_size)
    return mapping


def build_and_cache(
    directory: Path | None, token_freq_path: str | Path | None, draft_vocab_size: int, target_vocab_size: int
) -> VocabMapping:
    if token_freq_path is None and directory is not None and (directory / TOKEN_FREQ_NAME).is_file():
        token_freq_path = directory / TOKEN_FREQ_NAME
    if token_freq_path is None:
        raise ValueError(
            f"draft_vocab_size={draft_vocab_size} needs token frequencies, and {directory} has no {TOKEN_FREQ_NAME}; "
            "prepare the data again, or name a file with token_freq_path"
        )
    token_freq = load_token_freq(token_freq_path)
    d2t, t2d = build_vocab_mappings_from_distribution(token_freq, draft_vocab_size, target_vocab_size)
    if directory is not None:
        save_vocab_mapping(directory, d2t, t2d)
    return d2t, t2d
