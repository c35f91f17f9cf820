"""Rows that are read ahead are the rows, in order, and no more of them than asked for; steps report what they waited
for."""

import gc
import threading
import time

import pytest
import torch
from training_toys import random_batch, trainer_config

from speculators.data_generation import ServerUnavailableError
from speculators.data_generation.sources import local
from speculators.interfaces import CaptureSpec
from speculators.losses.metrics import RecentSteps
from speculators.train import records
from speculators.train.config import TrainConfig
from speculators.train.data import ListLoader
from speculators.train.distributed import Ranks
from speculators.train.events import Saved, StepDone, Validated
from speculators.train.prefetch import DeviceRows, read_ahead
from speculators.train.run import train
from speculators.train.sources import kept_in_memory, lengths_of, reading_ahead
from speculators.train.trainer import Trainer
from speculators.verifier import load_verifier

AHEAD = [(1, 1), (1, 4), (3, 2)]


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("rows-")] == []


@pytest.mark.parametrize(("num_threads", "num_ahead"), AHEAD)
def test_rows_come_in_order_and_no_more_are_begun_than_asked_for(num_threads, num_ahead):
    begun = []

    def make(row):
        begun.append(row)
        time.sleep(0.001 * (row % 3))  # later rows may be ready first
        return row * 10

    taken = []
    for made in read_ahead(make, range(12), num_threads=num_threads, num_ahead=num_ahead):
        taken.append(made)
        assert len(begun) <= len(taken) + num_ahead
    assert taken == [row * 10 for row in range(12)] and sorted(begun) == list(range(12))


def test_an_error_is_raised_in_the_place_of_its_row_as_it_was():
    def make(row):
        if row == 3:
            raise ServerUnavailableError("the server at 127.0.0.1 is gone")
        return row

    taken = []
    with pytest.raises(ServerUnavailableError, match=r"^the server at 127.0.0.1 is gone$"):
        taken.extend(read_ahead(make, range(9), num_threads=2, num_ahead=4))
    assert taken == [0, 1, 2]


def test_what_is_closed_early_begins_no_further_row():
    begun, rows = [], read_ahead(lambda row: begun.append(row) or row, range(100), num_threads=1, num_ahead=2)
    assert next(rows) == 0
    rows.close()
    assert len(begun) <= 3 and list(rows) == []


def test_what_is_collected_in_its_own_thread_does_not_wait_for_itself():
    """The last reference may be dropped by a thread of the pool, where the garbage collector runs."""
    holder, dropped, going = [], threading.Event(), threading.Event()

    def make(row):
        if row == 1:
            going.wait()
            holder.clear()  # ends the generator here
            dropped.set()
        return row

    holder.append(read_ahead(make, range(9), num_threads=1, num_ahead=1))
    assert next(holder[0]) == 0
    going.set()
    assert dropped.wait(10)


def test_a_run_that_computes_states_ahead_has_the_bits_of_one_that_does_not(verifier_path, data_path, tmp_path):
    """With validation inside epochs and decoded prompts, which use the same verifier."""
    weights, curves = [], []
    for name, ahead in (("here", False), ("ahead", True)):
        values = {
            "verifier_name_or_path": str(verifier_path),
            "data_path": str(data_path),
            "save_path": str(tmp_path / name),
        }
        rest = {"speculator_type": "mtp", "total_seq_len": 64, "epochs": 2, "hidden_states_memory_gb": 0.0}
        checks = {"parity_gate": False, "contract_check": False, "checkpoint_freq": 0.5, "eval_prompts": 1}
        config = TrainConfig.from_flat({**values, **rest, **checks, "prefetch_in_process": ahead})
        events = []
        result = train(config, on_event=events.append)
        weights.append((result.checkpoint / "model.safetensors").read_bytes())
        curves.append([event.metrics for event in events if isinstance(event, StepDone | Validated)])
    assert weights[0] == weights[1]
    assert curves[0] == curves[1] and len(curves[0]) > 4


def test_the_first_rows_of_a_run_on_a_cpu_wait_for_one_forward_and_not_for_thousands_of_tokens(
    verifier_path, data_path, monkeypatch
):
    monkeypatch.setattr(local, "CPU_BATCHING", local.Batching(max_tokens=24, max_padding=32))
    keys = TrainConfig.from_flat({"verifier_name_or_path": str(verifier_path), "data_path": str(data_path)}).data
    computing = local.LocalSource(load_verifier(str(verifier_path)), CaptureSpec(last_hidden=True))
    kept = kept_in_memory(keys, computing, hidden_size=1)
    lengths = lengths_of(keys)
    assert sorted(kept.rows) == list(range(len(lengths))) and max(map(len, kept.groups)) > 1
    assert all(len(group) == 1 or len(group) * lengths[group[0]] <= 24 for group in kept.groups)


def test_who_reads_ahead_is_chosen_by_argument_and_device():
    def asked(device, **keys):
        return reading_ahead(TrainConfig.from_flat({"verifier_name_or_path": "v", **keys}).data, torch.device(device))

    assert asked("cpu") == (0, 0) and asked("cuda") == (1, 1)
    assert asked("cpu", prefetch_in_process=True) == (1, 1) and asked("cuda", prefetch_in_process=False) == (0, 0)
    assert asked("cpu", vllm_endpoint="http://localhost:8000/v1") == (12, 4)


class SlowLoader(ListLoader):
    def __init__(self, ready, clock, read_s):
        super().__init__(ready)
        self.clock, self.read_s = clock, read_s

    def batches(self, first=0):
        for batch in super().batches(first):
            self.clock[0] += self.read_s
            yield batch


@pytest.mark.parametrize(("read_s", "waiting"), [(3.0, 0.75), (0.0, 0.0)])
def test_the_share_of_waiting_and_the_time_left_are_measured(tmp_path, make_model, monkeypatch, read_s, waiting):
    clock, events = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    trainer = Trainer(
        make_model(),
        trainer_config(save_path=tmp_path, num_epochs=2, log_freq=2),
        SlowLoader([random_batch(seed) for seed in range(4)], clock, read_s),
        on_event=events.append,
    )
    backward = trainer.backward
    monkeypatch.setattr(trainer, "backward", lambda *args: clock.__setitem__(0, clock[0] + 1.0) or backward(*args))
    trainer.run_training()
    done = [event for event in events if isinstance(event, StepDone)]
    assert [event.waiting for event in done] == pytest.approx([waiting] * 4)
    assert [event.left_s for event in done] == [None, 4 * (1 + read_s), 2 * (1 + read_s), 0.0]
    assert all(event.peak_bytes > 10_000_000 for event in done)  # torch alone takes more


def test_a_slow_beginning_does_not_lengthen_the_time_that_is_left(monkeypatch, tmp_path):
    clock, told = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(records, "RECENT_REPORTS", 3)
    reports = records.StepReports(trainer_config(save_path=tmp_path, log_freq=1), 10, Ranks(), told.append)
    for step, step_s in enumerate((100.0, 100.0, 2.0, 2.0, 2.0), start=1):
        clock[0] += step_s
        reports.step_done(step, 0, 1.0)
    assert [event.left_s for event in told] == [None, 800.0, 7 * 51.0, 6 * 2.0, 5 * 2.0]


def test_rows_are_timed_and_closed_where_the_loop_ends():
    closed, recent = [], RecentSteps()

    def batches():
        try:
            yield from (1, 2, 3)
        finally:
            closed.append(threading.current_thread().name)

    for batch in recent.timed(batches()):
        if batch == 2:
            break
    assert closed == [threading.current_thread().name]


def test_a_line_of_the_log_is_a_report_too(tmp_path, make_model):
    events = []
    config = trainer_config(save_path=tmp_path, log_freq=4, log_every=3)
    Trainer(make_model(), config, [random_batch(seed) for seed in range(9)], on_event=events.append).run_training()
    done = [event for event in events if isinstance(event, StepDone)]
    assert [(event.step, event.is_logged) for event in done] == [
        (3, True),
        (4, False),
        (6, True),
        (8, False),
        (9, True),
    ]


def test_late_reports_say_the_same_before_what_follows_them(tmp_path, make_model):
    """As on a GPU: a report waits until its numbers have arrived, for the next one, a validation or a checkpoint."""
    told = []
    for name, late in (("at once", False), ("late", True)):
        events, batches = [], [random_batch(seed) for seed in range(5)]
        config = trainer_config(save_path=tmp_path / name, num_epochs=2, checkpoint_freq=0.5)
        trainer = Trainer(make_model(), config, batches, batches[:1], on_event=events.append)
        trainer.recent.late = late
        trainer.run_training()
        measured = (StepDone, Validated, Saved)
        told.append([(type(e), e.step, getattr(e, "metrics", None)) for e in events if isinstance(e, measured)])
    assert told[0] == told[1] and len(told[0]) == 10 + 4 + 4


@pytest.mark.gpu
def test_rows_made_on_a_stream_of_their_own_are_the_rows():
    device = torch.device("cuda")
    batches = [random_batch(seed, num_tokens=4096) for seed in range(6)]
    made_by = DeviceRows(device, lambda row: dict(batches[row]), on_host=["document_ids"])
    for row, made in enumerate(read_ahead(made_by.make, range(6), num_threads=1, num_ahead=1)):
        batch = made_by.taken(made)
        assert {name for name, value in batch.items() if not value.is_cuda} == {"document_ids", "loss_mask"}
        products = batch["hidden_states"][0] @ batch["hidden_states"][0].T
        expected = batches[row]["hidden_states"][0].to(device)
        torch.testing.assert_close(products, expected @ expected.T)
