"""Verifier states: batched equals one by one, the cache equals its source, damage is named, size is known before."""

from __future__ import annotations

import errno
import fcntl
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.data_generation import (
    CachedSource,
    CorruptHiddenStatesError,
    HiddenStateStore,
    LocalSource,
    check_hidden_states,
    estimate_bytes,
    find_corrupt_hidden_state_indices,
    get_existing_hidden_state_indices,
    get_indices_to_process,
)
from speculators.data_generation.sources.local import Batching, batches_by_length
from speculators.interfaces import CaptureSpec, VerifierStates

CAPTURE = CaptureSpec((1, 3), last_hidden=True)
HIDDEN_SIZE = 16


@pytest.fixture(scope="module")
def verifier() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=HIDDEN_SIZE, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator) for length in (7, 3, 12, 7, 1)]


class CountingSource:
    """A source that says how often it was asked."""

    def __init__(self, inner: LocalSource) -> None:
        self.inner = inner
        self.capture = inner.capture
        self.num_rows_read = 0

    def read(self, token_ids):
        self.num_rows_read += len(token_ids)
        return self.inner.read(token_ids)


def assert_same_states(left: VerifierStates, right: VerifierStates, **tolerance) -> None:
    assert torch.equal(left.token_ids_T, right.token_ids_T)
    torch.testing.assert_close(left.aux_TD, right.aux_TD, **tolerance)
    torch.testing.assert_close(left.last_hidden_TH, right.last_hidden_TH, **tolerance)


@pytest.mark.parametrize("max_batch_tokens", [1, 14, 1000])
def test_batched_states_equal_the_models_own_one_by_one(verifier, rows, max_batch_tokens):
    found = LocalSource(verifier, CAPTURE, max_batch_tokens=max_batch_tokens).read(rows)
    before_norm = []
    hook = verifier.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    for ids, states in zip(rows, found, strict=True):
        with torch.no_grad():
            streams = verifier(ids[None], output_hidden_states=True).hidden_states
        expected = VerifierStates(ids, torch.cat([streams[1][0], streams[3][0]], dim=-1), before_norm.pop()[0])
        assert_same_states(states, expected, atol=1e-5, rtol=1e-5)
    hook.remove()


def test_states_are_the_same_under_a_callers_autocast(verifier, rows):
    source = LocalSource(verifier, CAPTURE)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = source.read(rows[:1])[0]
    assert_same_states(under_autocast, source.read(rows[:1])[0], atol=0, rtol=0)


def test_a_batch_never_exceeds_its_tokens_and_no_sequence_is_lost():
    lengths = [5, 9, 2, 5, 30, 1]
    batches = batches_by_length(lengths, Batching(max_tokens=12, max_padding=100))
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 12 for batch in batches)
    assert batches[0] == [4]


def test_rows_share_a_forward_where_their_padding_costs_less_than_another_one():
    lengths = [100, 98, 97, 60, 59, 10]
    of_like_length = batches_by_length(lengths, Batching(max_tokens=1000, max_padding=5))
    assert of_like_length == [[0, 1, 2], [3, 4], [5]]
    assert batches_by_length(lengths, Batching(max_tokens=1000, max_padding=6)) == [[0, 1, 2], [3, 4], [5]]
    assert batches_by_length(lengths, Batching(max_tokens=200, max_padding=6)) == [[0, 1], [2], [3, 4], [5]]


def test_a_cpu_runs_rows_of_unlike_length_one_by_one_and_short_ones_together(verifier):
    shapes = []
    hook = verifier.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    LocalSource(verifier, CAPTURE).read([torch.arange(n) % 50 for n in (300, 82, 200, 190, 6, 5)])
    hook.remove()
    assert shapes == [(1, 300), (2, 200), (1, 82), (2, 6)]


def test_broken_verifiers_and_empty_sequences_are_refused(rows):
    config = LlamaConfig(
        vocab_size=50, hidden_size=HIDDEN_SIZE, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    broken = LlamaForCausalLM(config)
    broken.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    source = LocalSource(broken, CAPTURE)
    with pytest.raises(ValueError, match="NaN or infinite"):
        source.read(rows)
    with pytest.raises(ValueError, match="without tokens"):
        source.read([torch.empty(0, dtype=torch.int64)])


def make_store(tmp_path, rows, **options) -> HiddenStateStore:
    return HiddenStateStore(tmp_path / "hidden_states", CAPTURE, rows, **options)


def test_the_cache_equals_its_source_and_asks_it_once(verifier, rows, tmp_path):
    inner = CountingSource(LocalSource(verifier, CAPTURE))
    cached = CachedSource(inner, make_store(tmp_path, rows))
    computed = cached.read(rows)
    again = CachedSource(inner, make_store(tmp_path, rows)).read([rows[2], rows[0]])
    assert inner.num_rows_read == len(rows)
    for states, expected in zip(computed, inner.read(rows), strict=True):
        assert_same_states(states, expected, atol=0, rtol=0)
    assert_same_states(again[0], computed[2], atol=0, rtol=0)
    assert_same_states(again[1], computed[0], atol=0, rtol=0)
    alone = make_store(tmp_path, rows).read(rows)
    assert_same_states(alone[4], computed[4], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_lossy_cache_gives_the_same_numbers_the_first_time_and_later(verifier, rows, tmp_path, dtype):
    source = LocalSource(verifier, CAPTURE)
    first = CachedSource(source, make_store(tmp_path, rows, dtype=dtype)).read(rows)
    later = make_store(tmp_path, rows).read(rows)
    exact = source.read(rows)
    for i in range(len(rows)):
        assert_same_states(first[i], later[i], atol=0, rtol=0)
        # bfloat16 keeps 8 bits (2^-9); e4m3 keeps 4 (2^-4) of each value, or 2^-10 * 2 of the token's largest
        relative, absolute = (2**-8, 0) if dtype == torch.bfloat16 else (2**-4, 2**-9 * 4)
        torch.testing.assert_close(first[i].aux_TD.float(), exact[i].aux_TD, rtol=relative, atol=absolute)


def test_files_have_the_documented_layout(verifier, rows, tmp_path):
    store = make_store(tmp_path, rows, dtype=torch.float8_e4m3fn, verifier="tiny")
    (states,) = LocalSource(verifier, CAPTURE).read(rows[:1])
    store.write_row(0, states)
    tensors = load_file(tmp_path / "hidden_states" / "hs_0.safetensors")
    assert {key: (list(value.shape), value.dtype) for key, value in tensors.items()} == {
        "hidden_states": ([7, 3, HIDDEN_SIZE], torch.float8_e4m3fn),
        "hidden_states_scales": ([7, 1, 1], torch.float32),
        "token_ids": ([7], torch.int64),
    }
    restored = tensors["hidden_states"].float() * tensors["hidden_states_scales"]
    largest = torch.cat([states.aux_TD, states.last_hidden_TH], dim=-1).abs().amax(dim=-1)
    torch.testing.assert_close(restored.abs().amax(dim=(1, 2)), largest)
    torch.testing.assert_close(tensors["hidden_states_scales"].flatten(), largest / 448)
    torch.testing.assert_close(restored[:, 2], states.last_hidden_TH, rtol=2**-4, atol=2**-9 * 4)
    with safe_open(tmp_path / "hidden_states" / "hs_0.safetensors", framework="pt") as file:
        assert file.metadata()["aux_layer_ids"] == "[1, 3]"
        assert file.metadata()["verifier"] == "tiny"


def test_an_all_zero_token_survives_fp8(tmp_path):
    ids = torch.tensor([1, 2])
    zeros = VerifierStates(ids, torch.zeros(2, 2 * HIDDEN_SIZE), torch.zeros(2, HIDDEN_SIZE))
    restored = make_store(tmp_path, [ids], dtype=torch.float8_e4m3fn).write_row(0, zeros)
    assert_same_states(restored, zeros, atol=0, rtol=0)


def test_files_of_other_tools_are_read(tmp_path):
    ids = torch.tensor([4, 5, 6])
    states = torch.randn(3, 3, HIDDEN_SIZE).bfloat16()
    (tmp_path / "hidden_states").mkdir()
    save_file({"hidden_states": states, "token_ids": ids}, tmp_path / "hidden_states" / "hs_0.safetensors")
    (found,) = make_store(tmp_path, [ids]).read([ids])
    assert torch.equal(found.aux_TD, torch.cat([states[:, 0], states[:, 1]], dim=-1))
    assert torch.equal(found.last_hidden_TH, states[:, 2])
    clipped = make_store(tmp_path, [ids[:2]]).read([ids[:2]])[0]
    assert torch.equal(clipped.last_hidden_TH, states[:2, 2])


FP8_STATES = torch.ones(3, 3, HIDDEN_SIZE).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("states", "scales", "named"),
    [
        (FP8_STATES, None, "fp8 but there are no hidden_states_scales"),
        (FP8_STATES, torch.ones(2, 1, 1), r"scales are \(2, 1, 1\); one per token is needed: \(3, 1, 1\)"),
        (FP8_STATES, torch.ones(3), r"scales are \(3,\); one per token"),
        (FP8_STATES, torch.tensor([1.0, float("nan"), 1.0]).view(3, 1, 1), "not all finite and positive"),
        (FP8_STATES, torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1), "not all finite and positive"),
        (FP8_STATES.bfloat16(), torch.ones(3, 1, 1), "only fp8 states have scales"),
    ],
)
def test_scales_that_do_not_fit_are_named_with_the_file(tmp_path, states, scales, named):
    ids = torch.tensor([4, 5, 6])
    (tmp_path / "hidden_states").mkdir()
    tensors = {
        "hidden_states": states,
        "token_ids": ids,
        **({} if scales is None else {"hidden_states_scales": scales}),
    }
    save_file(tensors, tmp_path / "hidden_states" / "hs_0.safetensors")
    with pytest.raises(CorruptHiddenStatesError, match=rf"hs_0\.safetensors: .*{named}"):
        make_store(tmp_path, [ids]).read([ids])


def test_the_layer_order_of_files_of_other_tools_is_said_once(tmp_path, caplog):
    rows = [torch.tensor([4, 5, 6]), torch.tensor([7, 8])]
    (tmp_path / "hidden_states").mkdir()
    for i, ids in enumerate(rows):
        tensors = {"hidden_states": torch.randn(len(ids), 3, HIDDEN_SIZE), "token_ids": ids}
        save_file(tensors, tmp_path / "hidden_states" / f"hs_{i}.safetensors")
    make_store(tmp_path, rows).read(rows)
    assert caplog.text.count("does not name its layers: they are taken as [1, 3], then the last layer") == 1


def test_equal_states_are_equal_bytes(verifier, rows, tmp_path):
    (states,) = LocalSource(verifier, CAPTURE).read(rows[:1])
    contents = set()
    for i in range(8):
        make_store(tmp_path / str(i), rows, verifier="tiny").write_row(0, states)
        contents.add((tmp_path / str(i) / "hidden_states" / "hs_0.safetensors").read_bytes())
    assert len(contents) == 1


def test_states_are_kept_when_the_same_verifier_is_given_by_a_link(verifier, rows, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "model")
    source = CountingSource(LocalSource(verifier, CAPTURE))
    CachedSource(source, make_store(tmp_path, rows, verifier=str(tmp_path / "model"))).read(rows)
    CachedSource(source, make_store(tmp_path, rows, verifier=str(tmp_path / "current"))).read(rows)
    assert source.num_rows_read == len(rows)


@pytest.fixture
def filled(verifier, rows, tmp_path):
    CachedSource(LocalSource(verifier, CAPTURE), make_store(tmp_path, rows)).read(rows)
    return tmp_path / "hidden_states"


def flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)


def test_a_damaged_file_is_named_and_computed_again(verifier, rows, tmp_path, filled, caplog):
    flip_a_byte(filled / "hs_2.safetensors")
    (filled / "hs_3.safetensors").write_bytes(b"short")
    store = make_store(tmp_path, rows)
    with pytest.raises(CorruptHiddenStatesError, match=r"hs_2\.safetensors is damaged"):
        store.read(rows)
    assert sorted(store.audit()) == [2, 3]
    assert list(find_corrupt_hidden_state_indices(filled, get_existing_hidden_state_indices(filled))) == [3]
    inner = CountingSource(LocalSource(verifier, CAPTURE))
    recomputed = CachedSource(inner, store).read(rows)
    assert inner.num_rows_read == 2
    assert "hs_2.safetensors" in caplog.text
    assert "hs_3.safetensors" in caplog.text
    assert_same_states(recomputed[2], inner.read([rows[2]])[0], atol=1e-5, rtol=1e-5)
    assert store.audit() == {}


def test_states_of_other_tokens_layers_or_verifiers_are_refused(rows, tmp_path, filled):
    swapped = [rows[1], rows[0], *rows[2:]]
    with pytest.raises(CorruptHiddenStatesError, match="other tokens than row 0"):
        make_store(tmp_path, swapped).read(swapped[:1])
    other_layers = HiddenStateStore(filled, CaptureSpec((1, 2), last_hidden=True), rows)
    with pytest.raises(ValueError, match=r"aux_layer_ids=\(1, 3\).*\(1, 2\)"):
        other_layers.read(rows[:1])
    (filled / "hs_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"hs_0\.safetensors does not exist \(4 of 5"):
        make_store(tmp_path, rows).read(rows[:1])
    with pytest.raises(ValueError, match="no row of the dataset"):
        make_store(tmp_path, rows).read([torch.tensor([49, 49, 49])])


def test_another_verifiers_states_are_refused(verifier, rows, tmp_path):
    (states,) = LocalSource(verifier, CAPTURE).read(rows[:1])
    make_store(tmp_path, rows, verifier="one").write_row(0, states)
    with pytest.raises(ValueError, match="'one', not of 'two'"):
        make_store(tmp_path, rows, verifier="two").read(rows[:1])


def test_sequences_outside_the_dataset_are_computed_and_reported(verifier, rows, tmp_path, caplog):
    cached = CachedSource(LocalSource(verifier, CAPTURE), make_store(tmp_path, rows))
    stranger = torch.tensor([1, 2, 3, 4])
    (states,) = cached.read([stranger])
    assert_same_states(states, LocalSource(verifier, CAPTURE).read([stranger])[0], atol=1e-5, rtol=1e-5)
    assert cached.num_uncached == 1
    assert "not a row of the cached dataset" in caplog.text


def test_the_estimate_is_the_size_on_disk(verifier, rows, tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        store = make_store(tmp_path / str(dtype), rows, dtype=dtype)
        plan = store.plan(HIDDEN_SIZE, torch.float32)
        CachedSource(LocalSource(verifier, CAPTURE), store).read(rows)
        after = store.plan(HIDDEN_SIZE, torch.float32)
        headers = 600 * len(rows)
        assert plan.num_bytes <= after.present_bytes <= plan.num_bytes + headers
        assert (plan.num_files, plan.present_bytes, after.num_bytes) == (5, 0, 0)
    # 8B Llama: hidden 4096, three aux layers and the last, bfloat16: 32 KB a token, 268 MB an 8k sample
    eight_k = estimate_bytes(8192, CaptureSpec((2, 16, 29), True), 4096, torch.bfloat16)
    assert eight_k == 8192 * (32 * 1024 + 8)


def test_a_store_that_would_not_fit_says_so_before_the_first_byte(verifier, rows, tmp_path):
    cached = CachedSource(LocalSource(verifier, CAPTURE), make_store(tmp_path, rows, max_bytes=1000))
    with pytest.raises(ValueError, match=r"more than the cap of 1 KB; raise the cap, store fp8"):
        cached.read(rows)
    assert not (tmp_path / "hidden_states").exists()


def test_a_full_disk_leaves_no_half_written_file(verifier, rows, tmp_path, monkeypatch):
    cached = CachedSource(LocalSource(verifier, CAPTURE), make_store(tmp_path, rows))

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        cached.read(rows)
    assert list((tmp_path / "hidden_states").iterdir()) == []
    assert not cached.store.has(0)


def test_a_file_being_written_is_waited_for(rows, tmp_path, filled):
    lock = filled / "hs_0.safetensors.lock"
    lock.touch()

    def write_for_a_while() -> None:
        with lock.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked.set()
            time.sleep(0.2)

    locked = threading.Event()
    writer = threading.Thread(target=write_for_a_while)
    writer.start()
    locked.wait()
    started = time.monotonic()
    make_store(tmp_path, rows).read(rows[:1])
    assert time.monotonic() - started > 0.15
    writer.join()
    assert not lock.exists()


def test_check_hidden_states_names_what_is_wrong():
    states, tokens = torch.zeros(4, 3, 2), torch.tensor([1, 2, 3, 4])
    check_hidden_states({"hidden_states": states, "token_ids": tokens}, [1, 2, 3, 4])
    broken = states.clone()
    broken[1, 2, 0] = float("nan")
    cases = [
        ({"token_ids": tokens}, "no hidden_states"),
        ({"hidden_states": [1.0], "token_ids": tokens}, "not a tensor"),
        ({"hidden_states": states, "token_ids": tokens + 1}, "mismatch"),
        ({"hidden_states": states[:3], "token_ids": tokens}, "length mismatch"),
        ({"hidden_states": broken, "token_ids": tokens}, r"shape=\(4, 3, 2\).*affected layer slots=\[2\].*min=.*max="),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            check_hidden_states(data, [1, 2, 3, 4])


def test_rows_to_process_are_shared_out_without_gap_or_overlap():
    assert get_indices_to_process(10, None, [0, 3]) == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [get_indices_to_process(10, 7, [5], 3, rank) for rank in range(3)] == [[0, 1, 2], [3, 4], [6]]
    assert get_indices_to_process(2, 100, []) == [0, 1]
    with pytest.raises(ValueError, match="rank=3"):
        get_indices_to_process(10, None, [], 3, 3)


def test_files_that_are_no_hidden_states_are_not_counted(tmp_path, filled):
    (filled / "hs_x.safetensors").touch()
    (filled / "hs_7.safetensors.lock").touch()
    assert get_existing_hidden_state_indices(filled) == [0, 1, 2, 3, 4]
    assert get_existing_hidden_state_indices(tmp_path / "nowhere") == []
