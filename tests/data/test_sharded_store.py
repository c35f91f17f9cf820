"""The sharded store: what is written is read, kills and cuts cost only what was unfinished, damage is named."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speculators.data_generation import CorruptHiddenStatesError, ShardedStore, WriteOptions
from speculators.data_generation.configs import parse_bytes
from speculators.data_generation.sources import shard_writer
from speculators.data_generation.sources.samples import Origin, StoreFacts, encode, mask_of, runs_of, target_rows
from speculators.data_generation.sources.shard_writer import ShardWriter
from speculators.data_generation.sources.shards import RECORD_MAGIC, head_bytes
from speculators.data_generation.sources.store import StoragePlan
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.utils.files import lock_if_free

CAPTURE = CaptureSpec((1, 3), last_hidden=True)
HIDDEN_SIZE = 16
LENGTHS = (7, 3, 12, 9, 1, 20)
FP8 = torch.float8_e4m3fn


@pytest.fixture
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def masks(rows) -> list[torch.Tensor]:
    """The second half of each row, and its second token."""
    return [(torch.arange(len(ids)) >= len(ids) // 2) | (torch.arange(len(ids)) == 1) for ids in rows]


def states_of(rows, dtype=torch.float32, seed=2) -> list[VerifierStates]:
    generator = torch.Generator().manual_seed(seed)

    def random_states(*shape) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [VerifierStates(ids, random_states(len(ids), 2 * 16), random_states(len(ids), 16)) for ids in rows]


def write(directory, rows, masks=None, *, states=None, only=None, origin=None, **options) -> ShardedStore:
    store = ShardedStore(directory, CAPTURE, rows, masks=masks, origin=origin, options=WriteOptions(**options))
    for row, of_row in enumerate(states or states_of(rows)):
        if (only is None or row in only) and not store.has(row):
            store.write_row(row, of_row)
    store.close()
    return store


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def assert_equal(left: VerifierStates, right: VerifierStates) -> None:
    assert torch.equal(left.token_ids_T, right.token_ids_T)
    assert torch.equal(left.aux_TD, right.aux_TD)
    assert torch.equal(left.last_hidden_TH, right.last_hidden_TH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_read_as_they_were_written(rows, masks, tmp_path, dtype):
    states = states_of(rows, dtype)
    write(tmp_path, rows, masks, states=states, shard_bytes=3000)
    assert len(list(tmp_path.glob("*.shard"))) > 1
    for read, written in zip(ShardedStore(tmp_path, CAPTURE, rows).read(rows), states, strict=True):
        assert_equal(read, written)


def test_fp8_states_have_a_scale_per_token_and_are_the_same_from_the_start(rows, tmp_path):
    states = states_of(rows, torch.bfloat16)
    store = ShardedStore(tmp_path, CAPTURE, rows, options=WriteOptions(dtype=FP8))
    first = [store.write_row(row, of_row) for row, of_row in enumerate(states)]
    store.close()
    for read, returned, exact in zip(ShardedStore(tmp_path, CAPTURE, rows).read(rows), first, states, strict=True):
        assert_equal(read, returned)
        every = torch.cat((exact.aux_TD, exact.last_hidden_TH), dim=-1).float()
        scale = every.abs().amax(1, keepdim=True) / 448
        by_hand = ((every / scale).to(FP8).float() * scale).to(torch.bfloat16)
        assert torch.equal(torch.cat((read.aux_TD, read.last_hidden_TH), dim=-1), by_hand)


def test_last_states_are_kept_where_a_target_is_made_of_them(rows, masks, tmp_path):
    states = states_of(rows)
    write(tmp_path / "all", rows, masks, states=states)
    write(tmp_path / "some", rows, masks, states=states, last_rows="supervised")
    for read, exact, mask in zip(
        ShardedStore(tmp_path / "some", CAPTURE, rows, masks=masks).read(rows), states, masks, strict=True
    ):
        assert torch.equal(read.aux_TD, exact.aux_TD)
        for position in range(len(mask)):
            is_read = bool(mask[position]) or (position + 1 < len(mask) and bool(mask[position + 1]))
            expected = exact.last_hidden_TH[position] if is_read else torch.zeros(HIDDEN_SIZE)
            assert torch.equal(read.last_hidden_TH[position], expected)
    small, large = ((tmp_path / name / "states-000-00000.shard").stat().st_size for name in ("some", "all"))
    assert small < large

    other = [torch.ones_like(mask) for mask in masks]
    with pytest.raises(ValueError, match=r"states-000-00000.shard lacks last states that row 2 is trained on"):
        ShardedStore(tmp_path / "some", CAPTURE, rows, masks=other).read(rows)
    with pytest.raises(ValueError, match=r"reads that of every token.* --last-states all"):
        ShardedStore(tmp_path / "some", CaptureSpec(last_hidden=True), rows, masks=masks)


def test_rows_of_equal_tokens_keep_what_either_is_trained_on(tmp_path):
    rows = [torch.arange(6), torch.arange(6)]
    masks = [torch.tensor([0, 0, 0, 0, 0, 1]), torch.tensor([0, 1, 0, 0, 0, 0])]
    states = states_of(rows[:1]) * 2
    write(tmp_path, rows, masks, states=states, last_rows="supervised")
    [read, _] = ShardedStore(tmp_path, CAPTURE, rows, masks=masks).read(rows)
    assert read.last_hidden_TH.any(1).tolist() == [True, True, False, False, True, True]


def test_masks_as_runs():
    for mask, runs in (([1, 1, 0], (0, 2, 1)), ([0, 0, 1], (2, 1)), ([0], (1,)), ([1], (0, 1)), ([], (0,))):
        assert runs_of(torch.tensor(mask)) == runs
        assert mask_of(runs).int().tolist() == mask
    assert target_rows(torch.tensor([0, 0, 1, 0, 1])).tolist() == [False, True, True, True, True]


def test_a_drafter_reads_fewer_layers_and_shorter_rows_than_were_stored(rows, tmp_path):
    states = states_of(rows)
    write(tmp_path, rows, states=states)
    clipped = [ids[:5] for ids in rows]
    store = ShardedStore(tmp_path, CaptureSpec((3,), last_hidden=True), rows, max_length=5)
    for read, whole in zip(store.read(clipped), states, strict=True):
        assert torch.equal(read.aux_TD, whole.aux_TD[:5, HIDDEN_SIZE:])
        assert torch.equal(read.last_hidden_TH, whole.last_hidden_TH[:5])
    with pytest.raises(ValueError, match=r"store.json holds layers \[1, 3\] and the last, the drafter reads .*\(2,\)"):
        ShardedStore(tmp_path, CaptureSpec((2,), last_hidden=True), rows)


def test_any_cut_of_the_files_costs_only_what_was_cut(rows, masks, tmp_path):
    """The shard, or its index, or both, end anywhere: a resumed run then has the bytes of an uninterrupted one."""
    options = {"dtype": FP8, "last_rows": "supervised"}
    write(tmp_path / "whole", rows, masks, **options)
    whole = contents(tmp_path / "whole")
    draw = random.Random(0)
    names = ("states-000-00000.shard", "states-000-00000.index")
    for case in range(40):
        directory = tmp_path / str(case)
        shutil.copytree(tmp_path / "whole", directory)
        for name in draw.choice([names[:1], names[1:], names]):
            os.truncate(directory / name, draw.randrange(len(whole[name]) + 1))
        store = ShardedStore(directory, CAPTURE, rows, masks=masks)
        cut_at = (directory / names[0]).stat().st_size
        index = ShardedStore(tmp_path / "whole", CAPTURE, rows, masks=masks).entries.values()
        lost = sum(entry.offset + entry.num_bytes > cut_at for entry in index)
        assert len(rows) - len(store.present) == lost, (case, cut_at)
        write(directory, rows, masks, **options)
        found = contents(directory)
        if lost:  # a run that has nothing to write leaves the index as it is
            assert found == whole, case
        assert found[names[0]] == whole[names[0]], case


def test_an_index_that_is_missing_or_damaged_is_made_again_from_the_shard(rows, tmp_path):
    write(tmp_path, rows)
    index = tmp_path / "states-000-00000.index"
    good = index.read_bytes()
    lines = good.splitlines(keepends=True)
    for bad in (b"", b"".join(lines[:2] + lines[3:]), good.replace(b'"num_tokens":12', b'"num_tokens":13')):
        index.write_bytes(bad)
        store = ShardedStore(tmp_path, CAPTURE, rows)
        assert store.present == set(range(len(rows)))
        store.read(rows)


@pytest.mark.parametrize("bit", [3, 5])
def test_a_flipped_bit_is_named_and_only_its_sample_is_written_again(rows, tmp_path, bit):
    store = write(tmp_path, rows)
    shard = tmp_path / "states-000-00000.shard"
    content = bytearray(shard.read_bytes())
    content[store.entries[store.keys[2][0]].offset + 100] ^= 1 << bit
    shard.write_bytes(content)
    damaged = ShardedStore(tmp_path, CAPTURE, rows)
    with pytest.raises(
        CorruptHiddenStatesError, match=r"states-000-00000.shard is damaged: the sample of row 2 .*--validate-outputs"
    ):
        damaged.read(rows)
    assert list(damaged.damaged(in_full=True)) == [2]
    damaged.write_row(2, states_of(rows)[2])
    damaged.close()
    again = ShardedStore(tmp_path, CAPTURE, rows)
    for read, exact in zip(again.read(rows), states_of(rows), strict=True):
        assert_equal(read, exact)


def test_a_damaged_head_and_a_stale_manifest_are_named(rows, tmp_path):
    write(tmp_path, rows, origin=Origin(verifier="a", chat_template="t1"))
    manifest, shard = tmp_path / "store.json", tmp_path / "states-000-00000.shard"
    good = manifest.read_text()
    manifest.write_text(good.replace('"t1"', '"t2"'))
    with pytest.raises(ValueError, match=r"store.json does not describe .*\(chat_template: t2 -> t1\): it is stale"):
        ShardedStore(tmp_path, CAPTURE, rows)
    manifest.unlink()
    assert len(ShardedStore(tmp_path, CAPTURE, rows).present) == len(rows)
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptHiddenStatesError, match=r"the head of .*shard is damaged.* delete it and its index"):
        ShardedStore(tmp_path, CAPTURE, rows)


def test_other_verifiers_templates_and_types_are_refused(rows, tmp_path):
    write(tmp_path, rows, only=[0], origin=Origin("a", "1234", "tok", "t1"))
    with pytest.raises(ValueError, match=r"holds states of 'a' \(weights 1234\), not of 'b' \(weights 99\)"):
        ShardedStore(tmp_path, CAPTURE, rows, origin=Origin("b", "99"))
    with pytest.raises(ValueError, match="holds states of 'a'"):
        ShardedStore(tmp_path, CAPTURE, rows, origin=Origin("b"))
    moved = ShardedStore(tmp_path, CAPTURE, rows, origin=Origin("moved/a", "1234"))
    moved.write_row(1, states_of(rows)[1])  # the same weights by another name
    assert moved.present == {0, 1}
    for changes, said in (
        ({"origin": Origin("a", "1234", "tok", "t2")}, "chat_template: +t1 -> t2"),
        ({"dtype": FP8}, "dtype: +float32 -> float8_e4m3fn"),
        ({"last_rows": "supervised"}, "last_rows: +all -> supervised"),
    ):
        with pytest.raises(
            ValueError, match=rf"store.json was made with other settings:\n +{said}\ngive the settings it was"
        ):
            write(tmp_path, rows, **changes)


def test_nan_is_never_written(rows, tmp_path):
    states = states_of(rows)
    states[1].last_hidden_TH[2, 3] = float("nan")
    with pytest.raises(ValueError, match="hidden states are not finite"):
        write(tmp_path, rows, states=states)
    assert ShardedStore(tmp_path, CAPTURE, rows).present == {0}


def test_the_oldest_shards_make_room_under_a_cap(rows, tmp_path):
    many = [torch.full((8,), token) for token in range(40)]
    cap = 20_000
    store = write(tmp_path, many, max_bytes=cap)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.shard")) <= cap
    kept = sorted(store.present)
    assert kept == list(range(kept[0], 40))  # the newest
    assert kept[0] > 0
    again = ShardedStore(tmp_path, CAPTURE, many)
    assert sorted(again.present) == kept
    assert all(again.was_reused(row) for row in range(kept[0]))  # a resumed run does not compute them again
    again.read(many[kept[0] :])
    with pytest.raises(ValueError, match=r"--max-disk 100 B is less than one sample"):
        write(tmp_path / "tiny", many, max_bytes=100)


def test_no_writer_can_take_a_shard_while_it_makes_room(rows, tmp_path, monkeypatch):
    """It wrote into a file without a name then."""
    many = [torch.full((8,), token) for token in range(40)]
    taken = []

    def taking(function):
        def call(path, *args, **kwargs):
            shard = Path(path).with_suffix(".shard")
            if Path(path).suffix in (".index", ".shard") and shard.exists():
                handle = os.open(shard, os.O_RDWR)
                taken.append((Path(path).suffix, lock_if_free(handle)))
                os.close(handle)
            return function(path, *args, **kwargs)

        return call

    write(tmp_path, many, only=range(20), max_bytes=20_000)
    monkeypatch.setattr(os, "replace", taking(os.replace))
    monkeypatch.setattr(Path, "unlink", taking(Path.unlink))
    store = write(tmp_path, many, max_bytes=20_000)
    monkeypatch.undo()
    assert set(taken) == {(".index", False), (".shard", False)}
    store.read([many[row] for row in sorted(store.present)])


def test_a_shard_that_another_process_removed_is_not_counted_nor_made_again(rows, tmp_path, monkeypatch):
    many = [torch.full((8,), token) for token in range(40)]
    write(tmp_path, many, only=range(20), max_bytes=20_000)
    listed, locked, gone = shard_writer.shard_paths, ShardWriter.locked, []

    def list_one_more(directory):
        return [directory / "states-001-99999.shard", *listed(directory)]

    def remove_first(self, path, num_bytes):
        """Between the question whether its space was reused and its opening."""
        if not gone:
            gone.append(path)
            exists = Path.exists

            def remove_once_seen(candidate, **how):
                found = exists(candidate, **how)
                if candidate == path and found:
                    os.replace(path.with_suffix(".index"), path.with_suffix(".reused"))
                    os.unlink(path)
                return found

            with monkeypatch.context() as patch:
                patch.setattr(Path, "exists", remove_once_seen)
                return locked(self, path, num_bytes)
        return locked(self, path, num_bytes)

    monkeypatch.setattr(ShardWriter, "locked", remove_first)
    store = ShardedStore(tmp_path, CAPTURE, many, options=WriteOptions(max_bytes=20_000))
    monkeypatch.setattr(shard_writer, "shard_paths", list_one_more)
    states = states_of(many)
    store.write_row(20, states[20])
    assert not gone[0].exists() and gone[0].with_suffix(".reused").exists()
    for row in range(21, 40):
        store.write_row(row, states[row])
    store.close()
    monkeypatch.undo()
    assert {39, 38, 37} <= ShardedStore(tmp_path, CAPTURE, many).present
    assert sum(path.stat().st_size for path in tmp_path.glob("*.shard")) <= 20_000


def test_a_writer_does_not_make_room_with_its_own_open_shard(rows, tmp_path):
    store = ShardedStore(tmp_path, CAPTURE, rows)
    store.write_row(0, states_of(rows)[0])
    other = ShardWriter(tmp_path, store.facts.to_dict(), WriteOptions(max_bytes=10_000))
    for writer in (other, store.writer):
        writer.max_bytes = 10_000
        writer.make_room(9_000)
    assert store.writer.path.exists() and not store.writer.reused and not other.reused
    store.close()
    other.make_room(9_000)
    assert other.reused == {"states-000-00000.shard"} and not store.writer.path.exists()


def test_writers_beside_each_other_share_no_file_and_readers_see_all(tmp_path):
    rows = [torch.full((4,), token) for token in range(60)]
    states = states_of(rows)

    def one(first: int) -> None:
        write(tmp_path, rows, states=states, only=range(first, 60, 3), shard_bytes=4000)

    threads = [threading.Thread(target=one, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for read, exact in zip(ShardedStore(tmp_path, CAPTURE, rows).read(rows), states, strict=True):
        assert_equal(read, exact)


def test_a_shard_that_another_writer_locked_first_is_left_to_it(rows, tmp_path, monkeypatch):
    """Between making a shard and locking it another writer may take it: both wrote to it then."""
    opened, taken = os.open, []

    def open_and_take(path, flags, *mode, **where):
        handle = opened(path, flags, *mode, **where)
        if flags & os.O_EXCL and not taken:
            taken.append(opened(path, os.O_RDWR))
            fcntl.flock(taken[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle

    monkeypatch.setattr(os, "open", open_and_take)
    store = write(tmp_path, rows, only=[0, 1])
    assert {entry.shard for entry in store.entries.values()} == {"states-000-00001.shard"}
    assert os.fstat(taken[0]).st_size == 0
    os.close(taken[0])


def test_a_full_disk_leaves_no_part_of_a_sample(rows, tmp_path, monkeypatch):
    full_disk = tmp_path / "full"
    store = write(full_disk, rows, only=[0, 1])
    size = (full_disk / "states-000-00000.shard").stat().st_size
    written = os.pwrite

    def full(handle, data, offset):
        if offset > size + 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(full_disk, rows)
    monkeypatch.undo()
    assert (full_disk / "states-000-00000.shard").stat().st_size == size
    assert ShardedStore(full_disk, CAPTURE, rows).present == {0, 1} == store.present
    write(full_disk, rows)
    write(tmp_path / "whole", rows)
    assert contents(tmp_path / "whole") == contents(full_disk)


def test_sizes_of_people():
    assert [parse_bytes(text) for text in ("500GB", "1.5 TB", "1GiB", "7")] == [500 * 10**9, 15 * 10**11, 1 << 30, 7]
    with pytest.raises(ValueError, match="'5 elephants' is no number of bytes; write 500GB"):
        parse_bytes("5 elephants")


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def flip_a_bit(directory: Path, store: ShardedStore) -> None:
    flip(directory / "states-000-00000.shard", store.entries[store.keys[2][0]].offset + 100)


def cut_the_shard(directory: Path, store: ShardedStore) -> None:
    os.truncate(directory / "states-000-00000.shard", store.entries[store.keys[3][0]].offset)


def store_nan(directory: Path, store: ShardedStore) -> None:
    """By a program that checks nothing: the checksum is right."""
    path, entry = directory / "states-000-00000.shard", store.entries[store.keys[2][0]]
    content = bytearray(path.read_bytes())
    content[entry.offset + 48 : entry.offset + 52] = b"\xff\xff\xff\x7f"  # after the ids of its 12 tokens
    entry = replace(entry, crc32=zlib.crc32(content[entry.offset : entry.offset + entry.num_bytes]))
    content[entry.start : entry.offset] = head_bytes(RECORD_MAGIC, entry.as_json()).ljust(
        entry.offset - entry.start, b"\0"
    )
    path.write_bytes(content)
    path.with_suffix(".index").unlink()


def change_the_manifest(directory: Path, store: ShardedStore) -> None:
    manifest = directory / "store.json"
    manifest.write_text(manifest.read_text().replace('"t1"', '"t2"'))


def damage_the_head(directory: Path, store: ShardedStore) -> None:
    flip(directory / "states-000-00000.shard", 20)


def cut_the_manifest(directory: Path, store: ShardedStore) -> None:
    os.truncate(directory / "store.json", 50)


def damage_nothing(directory: Path, store: ShardedStore) -> None: ...


MADE_BY = Origin("a", "1234", "tok", "t1")


@pytest.mark.parametrize(
    ("damage", "origin", "said"),
    [
        (flip_a_bit, MADE_BY, r"00.shard is damaged: the sample of row 2 .*write it again: generate-offline-data"),
        (cut_the_shard, MADE_BY, r"00.shard was cut: 2 of its samples are lost; write it again: generate-offline-data"),
        (store_nan, MADE_BY, r"00.shard: the states of row 2 are NaN or infinite; `speculators store compact` drops"),
        (
            change_the_manifest,
            MADE_BY,
            r"store.json does not describe .* it is stale, .*; delete the one that is wrong",
        ),
        (cut_the_manifest, MADE_BY, r"store.json .*delete it: it is written again from the shards"),
        (damage_the_head, MADE_BY, r"the head of .*00.shard is damaged.* delete it and its index: generate-offline-d"),
        (damage_nothing, Origin("b", "99"), r"store.json holds states of 'a' .* not of 'b' .*; name another directory"),
        (
            damage_nothing,
            Origin("a", "1234", "tok", "t2"),
            r"(?s)store.json .*chat_template: +t1 -> t2.* name another dir",
        ),
    ],
)
def test_what_is_wrong_is_named_with_the_file_and_the_way_out(rows, tmp_path, damage, origin, said):
    store = write(tmp_path, rows, only=[0, 1, 2, 3, 4], origin=MADE_BY)
    damage(tmp_path, store)
    with pytest.raises(ValueError, match=said):
        store = ShardedStore(tmp_path, CAPTURE, rows, origin=origin)
        if store.problems:
            raise ValueError(store.problems[0])
        store.read([rows[row] for row in store.present])
        store.write_row(5, states_of(rows)[5])


def test_the_index_of_an_earlier_shard_of_the_same_name_is_not_believed(rows, tmp_path):
    write(tmp_path / "earlier", [torch.cat((ids, ids)) for ids in rows])
    write(tmp_path / "now", rows)
    shutil.copy(tmp_path / "earlier" / "states-000-00000.index", tmp_path / "now")
    store = ShardedStore(tmp_path / "now", CAPTURE, rows)
    for read, exact in zip(store.read(rows), states_of(rows), strict=True):
        assert_equal(read, exact)
    [line] = store.finish_dead_writes()
    assert line.startswith(f"completed {tmp_path / 'now' / 'states-000-00000.index'}")
    write(tmp_path / "again", rows)
    assert contents(tmp_path / "now") == contents(tmp_path / "again")


def test_a_writer_goes_on_in_the_last_shard_so_that_the_order_stays(rows, tmp_path):
    """A short row would fit in what is left of an earlier shard, where an uninterrupted run did not put it."""
    write(tmp_path / "whole", rows, shard_bytes=6000)
    write(tmp_path / "resumed", rows, shard_bytes=6000, only=[0, 1, 2, 3])
    write(tmp_path / "resumed", rows, shard_bytes=6000)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_fp8_takes_half_of_bf16_and_less_without_the_last_states_of_prompts():
    """At a width of practice; 55 of 100 tokens supervised, as in chats of one and two turns."""
    mask_T = torch.arange(200) % 100 >= 45
    generator = torch.Generator().manual_seed(0)
    states = VerifierStates(
        torch.arange(200), torch.randn(200, 3 * 576, generator=generator), torch.randn(200, 576, generator=generator)
    )
    sizes = {}
    for dtype, last_rows in (("bfloat16", "all"), ("float8_e4m3fn", "all"), ("float8_e4m3fn", "supervised")):
        facts = StoreFacts((2, 15, 27), True, last_rows, 3 * 576, 576, dtype, "bfloat16", Origin())
        kept_T = facts.kept_rows(mask_T)
        sizes[dtype, last_rows] = sum(map(len, encode(states, kept_T, facts)))
        assert facts.num_bytes(200, int(kept_T.sum())) == sizes[dtype, last_rows]
    bf16, fp8, supervised = sizes.values()
    assert bf16 == 200 * (4 * 576 * 2 + 4)
    assert fp8 <= 0.51 * bf16
    assert supervised <= 0.45 * bf16


def test_a_store_without_last_states_is_continued(rows, tmp_path):
    """Its facts hold no width of last states, whatever the verifier's is."""
    capture, states = CaptureSpec((1, 3)), states_of(rows)
    for only in (range(3), range(3, len(rows))):
        store = ShardedStore(tmp_path, capture, rows)
        store.check_space(store.facts_for(2 * HIDDEN_SIZE, HIDDEN_SIZE, torch.float32))
        for row in only:
            store.write_row(row, replace(states[row], last_hidden_TH=None))
        store.close()
    assert ShardedStore(tmp_path, capture, rows).present == set(range(len(rows)))


def test_a_damaged_file_of_a_row_that_a_shard_has_is_not_made_again(rows, tmp_path):
    store = write(tmp_path, rows)
    (tmp_path / "hs_1.safetensors").write_bytes(b"damaged")
    again = ShardedStore(tmp_path, CAPTURE, rows)
    assert again.damaged(in_full=True) == again.damaged(in_full=False) == {}
    assert_equal(again.read([rows[1]])[0], store.read([rows[1]])[0])
    (tmp_path / "hs_1.safetensors").unlink()


def test_a_ring_that_is_full_needs_no_free_disk(tmp_path):
    plan = StoragePlan(num_files=5, num_tokens=9, num_bytes=500, present_bytes=90, free_bytes=30)
    plan.refuse_too_large(tmp_path, 100, is_ring=True)  # 10 bytes more, then space is reused
    with pytest.raises(ValueError, match="would not fit the disk"):
        plan.refuse_too_large(tmp_path, 200, is_ring=True)


def test_reused_shards_are_not_kept_mapped(tmp_path):
    many = [torch.full((20,), token) for token in range(40)]
    states = states_of(many)
    store = ShardedStore(tmp_path, CAPTURE, many, options=WriteOptions(max_bytes=60_000))
    for row, of_row in enumerate(states):
        store.write_row(row, of_row)
        assert_equal(store.read([many[row]])[0], of_row)  # maps its shard
    assert store.writer is not None and store.writer.reused == set()
    on_disk = {path.name for path in tmp_path.glob("*.shard")}
    assert set(store.mappings.mapped) <= on_disk and {entry.shard for entry in store.entries.values()} <= on_disk
    assert len(on_disk) < len(list(tmp_path.glob("*.reused"))) + len(on_disk)
    store.close()
