"""A checkpoint whose record of the verifier's place is out of date drafts for the verifier that the engine holds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from speculators.decoding import Engine, SamplingParams

K = 3


def drafted(verifier, checkpoint):
    engine = Engine(verifier, {"model": str(checkpoint), "num_speculative_tokens": K})
    outputs = engine.generate([[5, 6, 7, 8, 9, 10]], SamplingParams(max_tokens=24))
    return outputs[0].token_ids, engine.stats.accepted_histogram


@pytest.mark.parametrize("name", ["eagle", "eagle3", "peagle", "mtp", "medusa", "mlp"])
def test_the_verifier_at_hand_is_used_where_the_recorded_one_has_moved(name, verifier, checkpoints, tmp_path):
    moved = shutil.copytree(checkpoints[name], tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(tmp_path / "gone" / "verifier")
    (moved / "config.json").write_text(json.dumps(config))
    assert drafted(verifier, moved) == drafted(verifier, checkpoints[name])


def test_a_verifier_made_in_memory_leaves_the_recorded_place(verifier, checkpoints):
    in_memory = type(verifier)(verifier.config).eval()
    in_memory.load_state_dict(verifier.state_dict())
    in_memory.config = in_memory.model.config = type(verifier.config)(**verifier.config.to_dict())
    in_memory.config.name_or_path = ""
    assert torch.equal(in_memory.lm_head.weight, verifier.lm_head.weight)
    assert drafted(in_memory, checkpoints["eagle3"]) == drafted(verifier, checkpoints["eagle3"])
