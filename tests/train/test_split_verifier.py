"""A verifier of which each of two ranks holds a slice (--verifier-tp) gives states and run of the whole one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import split_runs
from drafter_toys import save_llama
from split_runs import ALGORITHM, CUT, FAMILIES, NUM_STEPS
from training_toys import free_port, run_on_two_ranks
from transformers import LlamaConfig, MambaConfig

from speculators.cli.app import main as command_line
from speculators.train.config import ConfigError, TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.keys import DataKeys
from speculators.train.sources import placement_of, reading_ahead
from speculators.verifier import load_verifier


@pytest.fixture(scope="module")
def found(tmp_path_factory, data_path) -> Path:
    """What two processes left that ran the command with a split verifier, and this one with the whole one."""
    folder = tmp_path_factory.mktemp("split")
    split_runs.save_verifiers(folder)
    ports = [free_port() for _ in range(4)]
    told = run_on_two_ranks(split_runs.__file__, folder, data_path, *ports, folder=folder, timeout_s=300)
    assert told[0].count('"verb": "train"') == 4 and told[1] == ""  # one of them reports
    of_two_rows = split_runs.flags(
        folder / "llama", data_path, folder / "whole", NUM_STEPS, "--gradient-accumulation-steps", "2"
    )
    assert command_line(of_two_rows) == 0
    return folder


def losses(run: Path) -> dict[tuple[str, int], float]:
    """Of every step and validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["split"], line["step"]): line["loss"] for line in lines}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_of_two_ranks_rows_are_those_of_the_whole_verifier(found, family):
    """Rows of unequal lengths and numbers of documents; the largest difference on either rank, of values below 1."""
    states = json.loads((found / "states.json").read_text())[family]
    assert states["slice"] * 2 == states["whole"]
    assert states["largest"] > 0.0 and states["difference"] < 1e-5 * states["largest"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_with_a_split_verifier_have_the_losses_of_one_with_the_whole(found, kind):
    """Steps of two epochs, the second partly from memory, and validation rows of which there is one for both ranks. The
    two were stopped inside the first epoch, and continued by the same command."""
    split, whole = losses(found / kind), losses(found / "whole")
    assert split.keys() - whole.keys() == {("val", CUT)} and len(whole) == NUM_STEPS + 2
    assert max(abs(split[point] - loss) for point, loss in whole.items()) < 1e-5
    assert (found / kind / "1" / "sharded_state").is_dir() == (kind == "fsdp")


def test_what_the_ranks_cannot_split_is_refused_before_weights_are_read(tmp_path):
    keys = DataKeys(verifier_tp=True)
    three = LlamaConfig(num_attention_heads=6, num_key_value_heads=3, hidden_size=24, vocab_size=64)
    with pytest.raises(ValueError, match="2 ranks cannot share num_key_value_heads=3 of the verifier equally"):
        placement_of(keys, Ranks(world_size=2), three)
    with pytest.raises(ValueError, match="no tensor-parallel plan for mamba: spread its layers with"):
        placement_of(keys, Ranks(world_size=2), MambaConfig())
    with pytest.raises(ValueError, match="this process is the only one: start several"):
        placement_of(keys, Ranks())
    save_llama(tmp_path, num_layers=1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="3 ranks cannot share num_attention_heads"):
        load_verifier(tmp_path, tp_size=3)
    with pytest.raises(ValueError, match="ranks spread plain weights over devices"):
        load_verifier(tmp_path, tp_size=2, device="cpu")


def test_no_thread_reads_ahead_and_settings_of_one_process_are_refused():
    assert reading_ahead(DataKeys(verifier_tp=True), Ranks().device) == (0, 0)
    for key, value in {"verifier_device": "cpu", "cache_hidden_states": True, "prefetch_in_process": True}.items():
        with pytest.raises(ConfigError, match=f"in the thread that trains: leave out {key}"):
            TrainConfig.from_sources(cli={"verifier_name_or_path": "m", "verifier_tp": True, key: value})
    config = TrainConfig.from_sources(cli={"verifier_name_or_path": "m", "speculator_type": ALGORITHM})
    assert not config.data.verifier_tp
