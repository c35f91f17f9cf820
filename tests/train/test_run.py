"""`train()` from a config alone: a third party's algorithm on a saved verifier, and what is wrong said before work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file

from speculators.data_generation import HiddenStateStore, ShardedStore
from speculators.interfaces import CaptureSpec
from speculators.model import SpeculatorModel
from speculators.train.config import TrainConfig
from speculators.train.events import Note, Saved, Started, StepDone, Validated
from speculators.train.run import train


@pytest.fixture
def settings(tmp_path, verifier_path, data_path):
    """Flat keys of a run of a second."""
    shutil.copytree(data_path, tmp_path / "data")
    return {
        "speculator_type": "myalgo",
        "plugins": ["myalgo"],
        "verifier_name_or_path": str(verifier_path),
        "data_path": str(tmp_path / "data"),
        "save_path": str(tmp_path / "run"),
        "total_seq_len": 64,
        "epochs": 2,
        "hidden_states_dtype": "float32",
        "lr": 0.01,
        "train_data_ratio": 0.8,
        "draft_arch": "llama",
    }


def run(settings, on_event=lambda event: None, **changes):
    return train(TrainConfig.from_flat({**settings, **changes}), on_event=on_event)


def test_an_algorithm_written_from_the_guide_alone_trains(settings, tmp_path):
    events = []
    result = run(settings, events.append, epochs=30)
    started = next(event for event in events if isinstance(event, Started))
    assert started.num_documents == 32
    losses = [event.metrics["loss"] for event in events if isinstance(event, StepDone)]
    assert losses[-1] < 0.8 * losses[0]
    assert len([event for event in events if isinstance(event, Validated)]) == 30
    assert result.checkpoint == (tmp_path / "run" / "checkpoint_best").resolve()
    assert type(SpeculatorModel.from_pretrained(result.checkpoint)).__name__ == "MyAlgoDraftModel"


def test_the_run_directory_says_what_made_it(settings, tmp_path):
    config = TrainConfig.from_flat({**settings, "epochs": 1})
    train(config)
    root = tmp_path / "run"
    assert {"run.yaml", "train_command.txt", "0", "epoch0_end", "checkpoint_best"} <= {
        path.name for path in root.iterdir()
    }
    assert (root / "run.yaml").read_text().startswith("# speculators ")
    again = TrainConfig.from_sources(config_path=root / "run.yaml")
    assert again.flatten() == config.flatten()
    assert yaml.safe_load((root / "run.yaml").read_text())["trainer"]["epochs"] == 1


def test_a_run_continued_by_the_same_command_ends_with_the_same_bits(settings, tmp_path):
    run(settings, save_path=str(tmp_path / "whole"), epochs=3)

    class PowerCut(Exception):
        pass

    def cut(event):
        if isinstance(event, Saved) and event.path.name == "1":
            raise PowerCut

    with pytest.raises(PowerCut):
        run(settings, cut, epochs=3)
    events = []
    run(settings, events.append, epochs=3)
    assert any("continuing from" in event.text for event in events if isinstance(event, Note))
    left, right = (load_file(tmp_path / name / "2" / "master_weights.fp32") for name in ("whole", "run"))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_cached_states_train_like_computed_ones(settings, tmp_path):
    def masters(name, **changes):
        run(settings, save_path=str(tmp_path / name), **changes)
        return load_file(tmp_path / name / "1" / "master_weights.fp32")

    computed = masters("computed")
    cached = masters("cached", cache_hidden_states=True)
    assert {path.name for path in (tmp_path / "data" / "hidden_states").iterdir()} == {
        "store.json",
        "states-000-00000.shard",
        "states-000-00000.index",
    }
    read = masters("read", on_missing="raise", num_workers=2)  # no verifier in the process, files read by threads
    for key in computed:
        # the verifier's batches differ in their padding, so its states do in the last bits, and AdamW divides by them
        torch.testing.assert_close(computed[key], cached[key], atol=1e-3, rtol=1e-2)
        assert torch.equal(cached[key], read[key])


def store_as_files(settings, tmp_path) -> None:
    """Stores the states of all rows as earlier releases did: a file for each."""
    run(settings, cache_hidden_states=True, epochs=1)
    directory = tmp_path / "data" / "hidden_states"
    facts = json.loads((directory / "store.json").read_text())
    capture = CaptureSpec(tuple(facts["aux_layer_ids"]), facts["last_hidden"])
    rows = list(Dataset.load_from_disk(str(tmp_path / "data")).with_format("torch")["input_ids"])
    states = ShardedStore(directory, capture, rows).read(rows)
    shutil.rmtree(directory)
    files = HiddenStateStore(directory, capture, rows, verifier=facts["verifier"])
    for row, of_row in enumerate(states):
        files.write_row(row, of_row)


def test_missing_states_are_left_out_counted_or_refused(settings, tmp_path):
    store_as_files(settings, tmp_path)
    for row in range(5):
        (tmp_path / "data" / "hidden_states" / f"hs_{row}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"5 of 40 rows have no stored states .* --on-missing generate"):
        run(settings, save_path=str(tmp_path / "b"), on_missing="raise")
    events = []
    run(settings, events.append, save_path=str(tmp_path / "c"), on_missing="warn", epochs=1)
    assert any("5 of 40 rows" in event.text for event in events if isinstance(event, Note))
    assert next(event for event in events if isinstance(event, Started)).num_documents == 27


def test_stored_states_of_another_verifier_are_refused(settings, tmp_path):
    store_as_files(settings, tmp_path)
    path = tmp_path / "data" / "hidden_states" / "hs_0.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "hidden_states": tensors["hidden_states"].roll(1, 0)}, path)  # no header: of another tool
    with pytest.raises(ValueError, match=r"row 0 .* differ from the verifier's"):
        run(settings, save_path=str(tmp_path / "b"))


def test_a_dry_run_builds_estimates_and_saves_but_does_not_train(settings, tmp_path):
    events = []
    result = run(settings, events.append, dry_run=True)
    assert not any(isinstance(event, StepDone) for event in events)
    assert any("of memory" in event.text for event in events if isinstance(event, Note))
    assert (result.checkpoint / "config.json").exists()
    events.clear()
    run(settings, events.append, epochs=1)
    assert next(event for event in events if isinstance(event, Started)).first_step == 0


def rows(lengths, mask=1, token=3):
    """`token`: of all rows, or of each."""
    tokens = token if isinstance(token, list) else [token] * len(lengths)
    return Dataset.from_list(
        [
            {"input_ids": [id_] * length, "loss_mask": [mask] * length, "seq_len": length}
            for length, id_ in zip(lengths, tokens, strict=True)
        ]
    )


def supervised_late():
    return Dataset.from_list([{"input_ids": [3] * 50, "loss_mask": [0] * 45 + [1] * 5, "seq_len": 50}] * 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier_name_or_path": "/no/such/model"}, "--verifier /no/such/model"),
        ({"data_path": "/no/such/data"}, "the prepared dataset '/no/such/data' does not exist"),
        ({"data_path": rows([9] * 5, mask=0)}, "every loss_mask is 0"),
        ({"data_path": supervised_late(), "total_seq_len": 32}, "within total_seq_len=32"),
        ({"data_path": rows([9] * 5, token=99)}, r"token 99 but the verifier knows 0\.\.63"),
        (
            {"data_path": rows([9] * 5, token=[3, 3, 3, 3, 99])},
            r"token 99 but the verifier knows 0\.\.63",
        ),  # of validation
        ({"data_path": rows([9])}, "train split is empty"),
        ({"draft_arch": "lama"}, "--draft-arch lama"),
        ({"full_attention_indices": [4]}, "the drafter has 1 layers"),
        ({"logger": "wandbb"}, "Did you mean 'wandb'"),
        ({"draft_vocab_size": 1000}, "draft_vocab_size=1000"),
    ],
)
def test_bad_input_is_said_before_any_training(settings, tmp_path, changes, message):
    if isinstance(changes.get("data_path"), Dataset):
        changes["data_path"].save_to_disk(tmp_path / "bad")
        changes = {**changes, "data_path": str(tmp_path / "bad")}
    with pytest.raises(ValueError, match=message):
        run(settings, **changes)
    assert not (tmp_path / "run").exists()


def test_a_draft_config_must_fit_the_verifier(settings, tmp_path):
    (tmp_path / "draft.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 99}))
    settings.pop("draft_arch")
    with pytest.raises(ValueError, match=r"hidden_size=99, the verifier 16"):
        run(settings, draft_config=str(tmp_path / "draft.json"))
