"""The draft vocabulary, against a brute-force construction and hand-worked cases."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from speculators.train.vocab_mapping import (
    build_vocab_mappings_from_distribution,
    check_vocab_mapping,
    coverage,
    get_target_vocab_size,
    resolve_vocab_mapping,
    save_vocab_mapping,
)


def brute_force_kept(token_freq: dict[int, int], draft_size: int) -> list[int]:
    """Pick one token at a time: the most frequent, ties to the smaller id, unseen ones last."""
    kept: list[int] = []
    for _ in range(draft_size):
        seen = [token for token in token_freq if token not in kept]
        if seen:
            most = max(token_freq[token] for token in seen)
            kept.append(min(token for token in seen if token_freq[token] == most))
        else:
            kept.append(next(token for token in range(draft_size) if token not in kept))
    return sorted(kept)


@pytest.mark.parametrize("seed", range(20))
def test_mapping_equals_brute_force(seed):
    rng = random.Random(seed)
    vocab_size = rng.randint(2, 40)
    draft_size = rng.randint(1, vocab_size)
    tokens = rng.sample(range(vocab_size), rng.randint(0, vocab_size))
    token_freq = {token: rng.randint(1, 4) for token in tokens}
    d2t, t2d = build_vocab_mappings_from_distribution(token_freq, draft_size, vocab_size)
    kept = brute_force_kept(token_freq, draft_size)
    assert (d2t.dtype, t2d.dtype) == (torch.int64, torch.bool)
    assert [draft_id + offset for draft_id, offset in enumerate(d2t.tolist())] == kept
    assert t2d.tolist() == [token in kept for token in range(vocab_size)]
    check_vocab_mapping(d2t, t2d, draft_size, vocab_size)


def test_offsets_by_hand():
    # 9 and 5 are seen most, 2 and 7 tie: the smaller id is kept. Kept 2 5 9 -> offsets 2-0, 5-1, 9-2
    d2t, t2d = build_vocab_mappings_from_distribution({9: 8, 5: 4, 7: 1, 2: 1}, 3, 10)
    assert d2t.tolist() == [2, 4, 7]
    assert t2d.nonzero().flatten().tolist() == [2, 5, 9]
    said = coverage(torch.tensor([9] * 8 + [5] * 4 + [7, 2]), t2d)
    assert said.startswith("the draft vocabulary of 3 tokens holds 92.9% of the 14 trained tokens")


def test_unseen_ids_below_the_draft_size_fill_up():
    d2t, _ = build_vocab_mappings_from_distribution({1: 3, 9: 2}, 4, 10)
    assert (d2t + torch.arange(4)).tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize(
    ("token_freq", "draft_size", "message"),
    [({1: 1}, 11, "draft_vocab_size=11 .* 1..10"), ({1: 1}, 0, "draft_vocab_size=0"), ({10: 1}, 2, "token 10")],
)
def test_sizes_and_ids_out_of_bounds_are_refused(token_freq, draft_size, message):
    with pytest.raises(ValueError, match=message):
        build_vocab_mappings_from_distribution(token_freq, draft_size, 10)


def test_target_size_is_given_or_read_and_never_both(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 77}')
    assert get_target_vocab_size(5) == 5
    assert get_target_vocab_size(model_path=str(tmp_path)) == 77
    for arguments in ((None, None), (5, str(tmp_path))):
        with pytest.raises(ValueError, match="exactly one"):
            get_target_vocab_size(*arguments)


@pytest.fixture
def data(tmp_path):
    torch.save({9: 8, 5: 4, 7: 1}, tmp_path / "token_freq.pt")
    return tmp_path


def test_a_built_mapping_is_cached_under_its_size_and_found_again(data):
    built = resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=2, data_path=data)
    assert np.load(data / "d2t-2.npy").tolist() == built[0].tolist() == [5, 8]
    (data / "token_freq.pt").unlink()
    again = resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=2, data_path=data)
    assert all(torch.equal(a, b) for a, b in zip(again, built, strict=True))


def test_mappings_under_the_old_names_are_read_and_checked(data):
    d2t, t2d = build_vocab_mappings_from_distribution({3: 1}, 1, 10)
    np.save(data / "d2t.npy", d2t.numpy())
    np.save(data / "t2d.npy", t2d.numpy())
    found = resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=1, data_path=data)
    assert found[0].tolist() == [3]
    assert resolve_vocab_mapping(target_vocab_size=10, data_path=data) is None  # nobody asked for it
    with pytest.raises(ValueError, match="d2t has 1 entries but draft_vocab_size=2"):
        resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=2, data_path=data)
    with pytest.raises(ValueError, match="t2d has 10 entries"):
        resolve_vocab_mapping(target_vocab_size=12, draft_vocab_size=1, data_path=data)


def test_explicit_files_come_first_and_come_in_pairs(data, tmp_path):
    (tmp_path / "mine").mkdir()
    save_vocab_mapping(tmp_path / "mine", *build_vocab_mappings_from_distribution({3: 1}, 1, 10))
    d2t_path, t2d_path = tmp_path / "mine" / "d2t-1.npy", tmp_path / "mine" / "t2d-1.npy"
    found = resolve_vocab_mapping(target_vocab_size=10, data_path=data, d2t_path=d2t_path, t2d_path=t2d_path)
    assert found[0].tolist() == [3]
    with pytest.raises(ValueError, match="d2t_path is given without t2d_path"):
        resolve_vocab_mapping(target_vocab_size=10, d2t_path=d2t_path)


def test_no_size_means_the_whole_vocabulary_and_a_size_is_never_ignored(data, tmp_path):
    assert resolve_vocab_mapping(target_vocab_size=10, data_path=data) is None
    assert resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=10, data_path=data) is None
    with pytest.raises(ValueError, match=r"needs token frequencies.*token_freq_path"):
        resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=2, data_path=tmp_path / "elsewhere")


def test_ids_passed_off_as_offsets_are_found():
    d2t, t2d = build_vocab_mappings_from_distribution({9: 8, 5: 4}, 2, 10)
    with pytest.raises(ValueError, match="offsets"):
        check_vocab_mapping(d2t + torch.arange(2), t2d, 2, 10)


def test_damaged_files_are_named(data):
    (data / "token_freq.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"token_freq\.pt"):
        resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=2, data_path=data)
    (data / "d2t.npy").write_bytes(b"garbage")
    (data / "t2d.npy").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"d2t\.npy"):
        resolve_vocab_mapping(target_vocab_size=10, draft_vocab_size=2, data_path=data)
