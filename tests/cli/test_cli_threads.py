"""How many threads a command computes with: what the user says, a run began with, or finds an idle CPU."""

from __future__ import annotations

import json

import pytest
import torch

from speculators.cli import flags
from speculators.cli.app import CommonFlags, main, split_common

STAT = "cpu  9 9 9 9\ncpu0 100 0 50 800 10 0 0 0 0 0\ncpu1 100 0 50 800 10 0 0 0 0 0\ncpu2 0 0 0 7 0 0 0 0 0 0\n"
LATER = "cpu  9 9 9 9\ncpu0 110 0 60 800 10 0 0 0 0 0\ncpu1 100 0 50 815 15 0 0 0 0 0\ncpu2 0 0 0 27 0 0 0 0 0 0\n"


@pytest.fixture
def two_threads(monkeypatch):
    """As a user has it: nothing is said, and torch would take two."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def train_args(verifier: str, data: str, output: str) -> list[str]:
    return ["train", "--verifier", verifier, "--data", data, "--output", output, "--epochs", "2", "--max-steps", "2"]


def test_idle_cpus_are_counted_between_two_readings():
    assert flags.idle_between(STAT, LATER, [0, 1]) == 1.0  # the first is busy, the second waits for a disk at most
    assert flags.idle_between(STAT, LATER, [0, 1, 2]) == 2.0
    assert flags.idle_between(STAT, STAT, [0, 1, 2]) is None


@pytest.mark.parametrize(
    ("files", "groups", "quota"),
    [
        ({"cpu.max": "max 100000"}, "0::/\n", None),
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 4.0),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", None),
    ],
)
def test_the_quota_of_a_container_is_read(tmp_path, files, groups, quota):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    (tmp_path / "groups").write_text(groups)
    assert flags.cpu_quota(root, tmp_path / "groups") == quota


@pytest.mark.parametrize(("idle", "quota", "chosen"), [(2.0, None, 2), (1.4, None, 1), (0.1, None, 1), (2.0, 0.5, 1)])
def test_threads_are_no_more_than_idle_cpus_and_the_quota(two_threads, monkeypatch, capsys, idle, quota, chosen):
    monkeypatch.setattr(flags, "idle_cpus", lambda cpus: idle)
    monkeypatch.setattr(flags, "cpu_quota", lambda root, groups: quota)
    with flags.choosing_threads():
        assert torch.get_num_threads() == chosen
    assert torch.get_num_threads() == 2
    assert ("of 2 threads; --threads N" in capsys.readouterr().err) == (chosen < 2)


def test_what_the_user_says_is_taken(two_threads, monkeypatch):
    monkeypatch.setattr(flags, "idle_cpus", lambda cpus: 0.0)
    asked = flags.THREADS.set(3)
    try:
        with flags.choosing_threads(begun=1):
            assert torch.get_num_threads() == 3
    finally:
        flags.THREADS.reset(asked)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with flags.choosing_threads(begun=1):
        assert torch.get_num_threads() == 2


def test_a_number_of_threads_is_checked_and_never_dropped(capsys):
    assert split_common(["train", "--threads=4", "--threads", "2"]) == (["train"], CommonFlags(threads="2"))
    assert main(["train", "--threads", "none"]) == 2
    assert "--threads none: a number of CPU threads, 1 or more" in capsys.readouterr().err
    assert main(["check", "somewhere", "--threads", "2"]) == 2
    assert "`check` runs no model in this process" in capsys.readouterr().err


def test_a_continued_training_keeps_the_threads_that_it_began_with(
    two_threads, monkeypatch, verifier, chats, tmp_path, capsys
):
    monkeypatch.setattr(flags, "idle_cpus", lambda cpus: 1.0)
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["prepare-data", "--verifier", verifier, "--data", chats, "--output", data]) == 0
    args = [*train_args(verifier, data, run), "--target-layer-ids", "1", "3", "5", "--no-parity-gate"]
    assert main(args) == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["num_threads"] == 1
    monkeypatch.setattr(flags, "idle_cpus", lambda cpus: 2.0)
    capsys.readouterr()
    assert main(args) == 0
    assert "CPU threads: 1, as when the run began" in capsys.readouterr().err
    assert main([*args, "--threads", "2"]) == 0
    assert "threads: 1 -> 2; the result may differ in its last bits" in " ".join(capsys.readouterr().err.split())
