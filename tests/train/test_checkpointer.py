"""What a checkpoint directory holds, which one a run continues from, and what is never deleted."""

from __future__ import annotations

import json
import random
import zlib

import pytest
import torch
from safetensors.torch import load_file
from training_toys import trainer_config

from speculators.model import SpeculatorModel
from speculators.train.checkpointer import (
    Checkpointer,
    DamagedCheckpointError,
    Position,
    is_saved_epoch,
    mid_epoch_saves,
)
from speculators.train.optimizers import make_optimizers


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def optimizers(model):
    optimizers = make_optimizers(model, trainer_config(optimizer="muon"))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizers.step(1.0)
    return optimizers


def test_when_checkpoints_are_due():
    assert mid_epoch_saves(0.25, 8) == {2, 4, 6}
    assert mid_epoch_saves(0.5, 5) == {2}
    assert mid_epoch_saves(1.0, 8) == set()
    assert mid_epoch_saves(0.25, 8, rows_a_step=3) == {3, 6}  # a step ends after its rows
    assert [epoch for epoch in range(7) if is_saved_epoch(3, epoch)] == [0, 3, 6]
    assert [epoch for epoch in range(3) if is_saved_epoch(0.5, epoch)] == [0, 1, 2]


def test_the_directory_is_a_bf16_speculator_with_exact_masters_beside_it(tmp_path, model, optimizers):
    Checkpointer(tmp_path, train_command="train --lr 1").save(
        tmp_path / "0", model, optimizers, Position(0, 0, 5), {"loss": 2.0}
    )
    names = {path.name for path in (tmp_path / "0").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "training_record.json",
        "master_weights.fp32",
        "optimizer_state_dict.pt",
        "scheduler_state_dict.pt",
        "training_state.json",
        "val_metrics.json",
        "train_command.txt",
        "checksums.json",
    }
    assert json.loads((tmp_path / "0" / "training_state.json").read_text()) == {
        "epoch": 0,
        "local_step": 0,
        "global_step": 5,
    }
    published = load_file(tmp_path / "0" / "model.safetensors")
    kept = load_file(tmp_path / "0" / "master_weights.fp32")
    for name, param in model.named_parameters():
        assert published[name].dtype == torch.bfloat16
        assert torch.equal(published[name], param.to(torch.bfloat16))
        assert torch.equal(kept[name], param)
    assert json.loads((tmp_path / "0" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "epoch0_end").resolve() == (tmp_path / "0").resolve()
    assert SpeculatorModel.from_pretrained(tmp_path / "0").dtype == torch.bfloat16


def test_loading_restores_weights_optimizers_and_random_numbers(tmp_path, make_model, model, optimizers):
    Checkpointer(tmp_path).save(tmp_path / "0", model, optimizers, Position(0, 3, 3))
    expected_noise = torch.rand(4)
    other = make_model(seed=9)
    others = make_optimizers(other, trainer_config(optimizer="muon"))
    assert Checkpointer(tmp_path).load(tmp_path / "0", other, others) == Position(0, 3, 3)
    assert torch.equal(torch.rand(4), expected_noise)
    for (name, param), (_, restored) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(param, restored), name
    for kind, state in optimizers.state_dict().items():
        for index, values in state["state"].items():
            for key, value in values.items():
                assert torch.equal(
                    torch.as_tensor(value), torch.as_tensor(others.state_dict()[kind]["state"][index][key])
                )


def test_the_highest_epoch_is_continued_unless_interrupted_went_further(tmp_path, model, optimizers):
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.newest() is None
    for epoch, step in ((0, 4), (1, 8), (10, 44)):
        checkpointer.save(tmp_path / str(epoch), model, optimizers, Position(epoch, 0, step))
    (tmp_path / "99").symlink_to("0")
    (tmp_path / "77").mkdir()  # not ours: no training state
    assert checkpointer.newest() == tmp_path / "10"
    checkpointer.save(tmp_path / "interrupted", model, optimizers, Position(10, 3, 43))
    assert checkpointer.newest() == tmp_path / "10"
    checkpointer.save(tmp_path / "interrupted", model, optimizers, Position(11, 3, 47))
    assert checkpointer.newest() == tmp_path / "interrupted"


def test_a_later_save_of_an_epoch_renames_its_link(tmp_path, model, optimizers):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(tmp_path / "2", model, optimizers, Position(2, 5, 25))
    assert (tmp_path / "epoch2_step5").is_symlink()
    checkpointer.save(tmp_path / "2", model, optimizers, Position(2, 0, 30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "epoch2_end"]


def test_save_best_removes_only_what_we_wrote(tmp_path, model, optimizers):
    checkpointer = Checkpointer(tmp_path, save_best=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run.yaml").write_text("seed: 1")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "mine.bin").write_text("x")
    for epoch in (0, 1):
        checkpointer.save(tmp_path / str(epoch), model, optimizers, Position(epoch, 0, epoch), {"loss": 2.0 - epoch})
        checkpointer.mark_best()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1",
        "7",
        "checkpoint_best",
        "epoch1_end",
        "notes.txt",
        "run.yaml",
    ]
    assert checkpointer.val_losses() == {1: 1.0}


def test_save_best_keeps_a_checkpoint_whose_metrics_cannot_be_read(tmp_path, model, optimizers):
    """It may be the best one: its weights are whole."""
    checkpointer = Checkpointer(tmp_path, save_best=True)
    for epoch, loss in ((0, 1.0), (1, 2.0)):
        checkpointer.save(tmp_path / str(epoch), model, optimizers, Position(epoch, 0, epoch), {"loss": loss})
    (tmp_path / "0" / "val_metrics.json").write_text('{"loss": 1.')
    assert any("cannot be the best one" in line for line in checkpointer.recover())
    assert (tmp_path / "0" / "model.safetensors").exists() and (tmp_path / "checkpoint_best").readlink().name == "1"


@pytest.mark.parametrize("name", ["master_weights.fp32", "optimizer_state_dict.pt", "training_state.json"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, model, optimizers, name):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(tmp_path / "0", model, optimizers, Position(0, 0, 1))
    (tmp_path / "0" / name).write_bytes(b"garbage")
    with pytest.raises(ValueError, match="delete th"):
        checkpointer.load(tmp_path / "0", model, optimizers)


def test_a_changed_bit_of_what_resuming_reads_is_noticed(tmp_path, model, optimizers):
    """Neither safetensors nor torch notices one in the data of a tensor."""
    checkpointer, draw = Checkpointer(tmp_path), random.Random(0)
    checkpointer.save(tmp_path / "0", model, optimizers, Position(0, 3, 5), {"loss": 2.5})
    recorded = json.loads((tmp_path / "0" / "checksums.json").read_text())["crc32"]
    assert {name: int(crc, 16) for name, crc in recorded.items()} == {
        name: zlib.crc32((tmp_path / "0" / name).read_bytes())
        for name in (
            "master_weights.fp32",
            "optimizer_state_dict.pt",
            "scheduler_state_dict.pt",
            "training_state.json",
            "val_metrics.json",
        )
    }
    for name in (*recorded, "checksums.json"):
        file = tmp_path / "0" / name
        content = file.read_bytes()
        for _ in range(8):
            changed, place = bytearray(content), draw.randrange(len(content))
            changed[place] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(DamagedCheckpointError, match=f"{tmp_path}/0"):
                checkpointer.load(tmp_path / "0", model, optimizers)
        if name == "val_metrics.json":
            assert checkpointer.val_losses() == {}
            [line] = checkpointer.recover()
            assert "val_metrics.json has changed since it was written" in line and "cannot be the best one" in line
        file.write_bytes(content)
    assert checkpointer.load(tmp_path / "0", model, optimizers) == Position(0, 3, 5)
    assert checkpointer.val_losses() == {0: 2.5}


def test_a_checkpoint_of_another_shape_or_optimizer_is_refused(tmp_path, make_model, model, optimizers):
    from myalgo import MyAlgoConfig, MyAlgoDraftModel

    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(tmp_path / "0", model, optimizers, Position(0, 0, 1))
    deeper = MyAlgoDraftModel(MyAlgoConfig(vocab_size=64, hidden_size=16, num_layers=3))
    with pytest.raises(ValueError, match=r"another drafter .*layers\.2"):
        checkpointer.load(tmp_path / "0", deeper, make_optimizers(deeper, trainer_config(optimizer="muon")))
    same = make_model()
    with pytest.raises(ValueError, match=r"trained with \['AdamW', 'Muon'\]"):
        checkpointer.load(tmp_path / "0", same, make_optimizers(same, trainer_config(optimizer="adamw")))


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_half_written(tmp_path, model, optimizers):
    import resource

    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(tmp_path / "0", model, optimizers, Position(0, 0, 1))
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # writing past this fails as on a full disk
    try:
        with pytest.raises(OSError, match="free some space"):
            checkpointer.save(tmp_path / "1", model, optimizers, Position(1, 0, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert checkpointer.newest() == tmp_path / "0"
