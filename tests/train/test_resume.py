"""One run per directory: its lock, its recipe, what a dead process left half done, damaged checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from training_toys import random_batch, trainer_config

from speculators.train.checkpointer import Checkpointer, Position
from speculators.train.config import TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.events import Note, Started, StepDone
from speculators.train.keys import group_of
from speculators.train.optimizers import make_optimizers
from speculators.train.recipe import FREE_KEYS, HASHED_KEYS, LENGTH_KEYS, data_hash
from speculators.train.run import train
from speculators.train.trainer import Trainer

BATCHES = [random_batch(seed) for seed in range(5)]


@pytest.fixture
def settings(tmp_path, verifier_path, data_path):
    return {
        "speculator_type": "myalgo",
        "plugins": ["myalgo"],
        "verifier_name_or_path": str(verifier_path),
        "data_path": str(data_path),
        "save_path": str(tmp_path / "run"),
        "total_seq_len": 64,
        "epochs": 2,
        "hidden_states_dtype": "float32",
        "lr": 0.01,
        "train_data_ratio": 0.8,
        "draft_arch": "llama",
        "parity_gate": False,
        "contract_check": False,
    }


def run(settings, on_event=lambda event: None, **changes):
    return train(TrainConfig.from_flat({**settings, **changes}), on_event=on_event)


def notes(events) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -- one recipe per directory --------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_changes_nothing(settings, tmp_path):
    run(settings)
    before, events = contents(tmp_path / "run"), []
    result = run(settings, events.append, log_freq=5)
    assert result.finished_before
    num_steps = result.num_steps
    assert f"finished ({num_steps} of {num_steps} steps); nothing to do" in notes(events)
    assert f"finished ({num_steps} of {num_steps} steps); nothing to do" in str(result)
    assert not [event for event in events if isinstance(event, Started | StepDone)]
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lr": 0.5}, r"lr: +0\.01 -> 0\.5"),
        ({"seed": 1}, r"seed: +42 -> 1"),
        ({"optimizer": "adamw"}, "optimizer: +muon -> adamw"),
        ({"total_seq_len": 48}, "total_seq_len: +64 -> 48"),
        ({"epochs": 3}, "epochs: +2 -> 3"),
        ({"max_steps": 3}, "max_steps: +none -> 3"),
        ({"train_data_ratio": 0.5}, r"train_data_ratio: +0\.8 -> 0\.5"),
        ({"weight_decay": 0.1}, r"weight_decay: +0\.01 -> 0\.1"),
        ({"num_layers": 2}, "num_layers: +1 -> 2"),
    ],
)
def test_a_changed_setting_is_refused_in_two_columns(settings, tmp_path, changes, line):
    run(settings)
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"was made with other settings:\n[^~]*{line}[^~]*--allow-changed-settings"):
        run(settings, **changes)
    assert contents(tmp_path / "run") == before


def test_other_data_and_another_verifier_of_the_same_shape_are_refused(settings, tmp_path, verifier_path, data_path):
    run(settings)
    rows = Dataset.load_from_disk(str(data_path))
    changed = [{**row, "input_ids": [*row["input_ids"][:-1], 5]} for row in rows]
    Dataset.from_list(changed).save_to_disk(tmp_path / "data2")
    with pytest.raises(ValueError, match=r"data: +40 rows [0-9a-f]{12} -> 40 rows [0-9a-f]{12}"):
        run(settings, data_path=str(tmp_path / "data2"))
    from transformers import LlamaForCausalLM

    other = LlamaForCausalLM.from_pretrained(verifier_path)
    torch.manual_seed(9)
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(tmp_path / "verifier2")
    with pytest.raises(ValueError, match=r"verifier: +/.*verifier[0-9]+ [0-9a-f]+ -> /.*verifier2 [0-9a-f]+"):
        run(settings, verifier_name_or_path=str(tmp_path / "verifier2"))


def test_the_hash_of_data_follows_tokens_masks_and_their_order_only(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"input_ids": [4], "loss_mask": [1]}]

    def hashed(rows):
        return data_hash(Dataset.from_list(rows))

    assert hashed(rows) == hashed([dict(row, seq_len=7) for row in rows])
    variants = [rows[::-1], rows[:1], [{"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1]}, rows[1]]]
    assert len({hashed(rows), *map(hashed, variants)}) == 4


def test_what_was_allowed_is_said_and_becomes_the_recipe(settings, tmp_path):
    run(settings)
    events = []
    run(settings, events.append, epochs=3, lr=0.02, allow_changed_settings=True)
    assert "continuing with changed settings" in notes(events) and "0.01 -> 0.02" in notes(events)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["lr"] == 0.02
    assert run(settings, epochs=3, lr=0.02).finished_before


def test_with_a_schedule_of_its_own_length_a_run_may_be_prolonged(settings):
    fixed = {**settings, "scheduler_total_steps": 40}
    run(fixed)
    assert not run(fixed, epochs=3).finished_before


def test_inside_an_epoch_other_rows_cannot_be_allowed(settings):
    run(settings, max_steps=2, scheduler_total_steps=40)
    with pytest.raises(ValueError, match=r"inside an epoch[^~]*seed: +42 -> 7"):
        run(settings, max_steps=4, scheduler_total_steps=40, seed=7, allow_changed_settings=True)


def test_a_run_of_an_earlier_release_is_continued_with_a_line(settings, tmp_path):
    run(settings, max_steps=2)
    (tmp_path / "run" / "recipe.json").unlink()
    events = []
    run(settings, events.append, max_steps=2)
    assert "no recipe.json" in notes(events)


def test_every_free_key_exists():
    assert FREE_KEYS | HASHED_KEYS | set(LENGTH_KEYS) <= set(group_of())


# -- one process per directory -------------------------------------------------------------------------------------

HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from speculators.provenance import output_lock\n"
    "with output_lock(Path(sys.argv[1]), 'it', print):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_a_second_run_is_refused_and_the_lock_of_a_dead_one_is_taken_over(settings, tmp_path):
    lock = tmp_path / "run" / ".run.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"run directory .*run is in use by process {holder.pid} on \S+ \(since"):
            run(settings)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".run.lock"]
        os.kill(holder.pid, signal.SIGKILL)
    events = []
    run(settings, events.append, epochs=1)
    assert f"in the place of process {holder.pid} on" in notes(events)
    assert not lock.exists()


# -- what a dead process left --------------------------------------------------------------------------------------


def optimizers_of(model):
    return make_optimizers(model, trainer_config(optimizer="muon"))


def test_links_and_the_best_checkpoint_follow_from_the_directories(tmp_path, make_model):
    model = make_model()
    checkpointer = Checkpointer(tmp_path)
    for epoch, loss in ((0, 3.0), (1, 1.0), (2, 2.0)):
        path = tmp_path / str(epoch)
        checkpointer.save(path, model, optimizers_of(model), Position(epoch, 0, epoch), {"loss": loss})
    (tmp_path / "epoch2_end").unlink()  # killed after the directory, before its link
    (tmp_path / ".epoch2_end.new").symlink_to("2")
    (tmp_path / ".recipe.json.abcdefgh").write_text("{")
    assert checkpointer.recover() == [
        f"removed {tmp_path}/.recipe.json.abcdefgh: its process died while it wrote recipe.json"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["0", "1", "2", "checkpoint_best", "epoch0_end", "epoch1_end", "epoch2_end"]
    )
    assert (tmp_path / "checkpoint_best").resolve() == tmp_path / "1"
    assert checkpointer.recover() == []


def test_a_directory_is_removed_under_another_name(tmp_path, make_model, monkeypatch):
    """Killed while it removes the files of an epoch, a run leaves no epoch with half of them."""
    model = make_model()
    checkpointer = Checkpointer(tmp_path, save_best=True)
    for epoch in (0, 1):
        checkpointer.save(tmp_path / str(epoch), model, optimizers_of(model), Position(epoch), {"loss": 2.0 - epoch})
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpointer.mark_best()
    assert not (tmp_path / "0").exists()
    checkpointer.recover()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "checkpoint_best", "epoch1_end"]


def masters_of(path):
    return {name: tensor.clone() for name, tensor in load_file(path / "master_weights.fp32").items()}


@pytest.mark.parametrize(
    "name", ["master_weights.fp32", "optimizer_state_dict.pt", "scheduler_state_dict.pt", "training_state.json"]
)
def test_from_a_damaged_checkpoint_a_run_falls_back_to_the_one_before(tmp_path, make_model, name):
    def config(**changes):
        return trainer_config(save_path=tmp_path / "parts", num_epochs=3, **changes)

    torch.manual_seed(7)
    Trainer(make_model(), config(), BATCHES).run_training()
    whole = masters_of(tmp_path / "parts" / "2")
    damaged = tmp_path / "parts" / "2" / name
    content = bytearray(damaged.read_bytes())
    content[-len(content) // 4] ^= 1
    damaged.write_bytes(content)
    events = []
    Trainer(make_model(seed=3), config(resume_from_checkpoint=True), BATCHES, on_event=events.append).run_training()
    assert "It is now 2.damaged" in notes(events) and "continuing from " in notes(events)
    again = masters_of(tmp_path / "parts" / "2")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert (tmp_path / "parts" / "epoch2_end").resolve() == tmp_path / "parts" / "2"


def test_a_checkpoint_of_an_earlier_release_is_continued_and_said_to_be_unchecked(tmp_path, make_model):
    def config(num_epochs):
        return trainer_config(save_path=tmp_path / "run", num_epochs=num_epochs, resume_from_checkpoint=True)

    Trainer(make_model(), config(1), BATCHES).run_training()
    (tmp_path / "run" / "0" / "checksums.json").unlink()
    events = []
    Trainer(make_model(seed=3), config(2), BATCHES, on_event=events.append)
    assert "/run/0 at step 5, an earlier release's: it has no checksums to compare" in notes(events)


def test_with_only_a_damaged_checkpoint_the_run_ends_with_the_way_out(tmp_path, make_model):
    config = trainer_config(save_path=tmp_path / "run", resume_from_checkpoint=True)
    Trainer(make_model(), config, BATCHES).run_training()
    (tmp_path / "run" / "0" / "master_weights.fp32").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot be read .* --no-resume-from-checkpoint"):
        Trainer(make_model(), config, BATCHES)
    assert (tmp_path / "run" / "0").exists()


def test_save_best_remembers_that_the_run_is_over(tmp_path, make_model, monkeypatch):
    monkeypatch.setattr(Trainer, "validate", lambda trainer: {"loss": 1.0 + trainer.position.epoch})
    settings = {"save_path": tmp_path, "num_epochs": 3, "save_best": True}
    first = Trainer(make_model(), trainer_config(**settings), BATCHES, BATCHES[:2]).run_training()
    assert not (tmp_path / "2").exists()
    again = Trainer(
        make_model(), trainer_config(**settings, resume_from_checkpoint=True), BATCHES, BATCHES[:2]
    ).run_training()
    assert again.finished_before and again.num_steps == first.num_steps == 15


def test_another_number_of_ranks_goes_on_after_the_same_rows_and_other_rows_are_refused(tmp_path, make_model):
    """Two ranks had 3 of 22 rows each."""
    model = make_model()
    checkpointer = Checkpointer(tmp_path)
    states = [Ranks().random_state()] * 2
    of_ranks = {"random_states": states, "num_rows": 22, "rows_a_step": 3}
    checkpointer.save(tmp_path / "1", model, optimizers_of(model), Position(1, 3, 9), **of_ranks)
    optimizers = optimizers_of(model)
    both, alone = Ranks(rank=0, world_size=2), Ranks()
    assert checkpointer.load(tmp_path / "1", model, optimizers, ranks=both, num_rows=22) == Position(1, 3, 9)
    for num_rows in (44, 45):  # two ranks leave out a row that they cannot share
        assert checkpointer.load(tmp_path / "1", model, optimizers, ranks=alone, num_rows=num_rows) == Position(1, 6, 9)
    for ranks, num_rows in ((both, 25), (alone, 43), (alone, 46)):
        with pytest.raises(ValueError, match=rf"after 3 of 22 rows.* packs {num_rows}"):
            checkpointer.load(tmp_path / "1", model, optimizers, ranks=ranks, num_rows=num_rows)


def test_a_step_keeps_its_rows_whatever_the_number_of_ranks(tmp_path, make_model):
    model, lines = make_model(), []
    checkpointer, states = Checkpointer(tmp_path), [Ranks().random_state()] * 2
    checkpointer.save(tmp_path / "0", model, optimizers_of(model), Position(), random_states=states, rows_a_step=3)
    config = trainer_config(resume_from_checkpoint=True)
    assert [checkpointer.rows_a_step(config, num_ranks, lines.append) for num_ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert "6 of each rank, not 1" in lines[0] and "ranks: 2 -> 1" in lines[1]
    with pytest.raises(ValueError, match=r"6 rows per step, which 4 ranks cannot share.*continues with 4 rows"):
        checkpointer.rows_a_step(config, 4, lines.append)
    changed = trainer_config(resume_from_checkpoint=True, allow_changed_settings=True)
    assert checkpointer.rows_a_step(changed, 4, lines.append) == 1
    assert checkpointer.rows_a_step(trainer_config(), 4, lines.append) == 1  # begins anew
