"""Directories of releases 0.1 to 0.9 load, are upgraded where a key is missing that engines need, and are served.

What each release wrote, as far as it is documented: a key that came later is left out, one that was retired is there.
Every release left `auto_map` and a `config.py`, and no record of training.
"""

import json

import pytest
import torch
from deploy_toys import VERIFIER, edit_config, edit_tensors, make_checkpoint
from safetensors.torch import load_file

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.checkpoint.record import RECORD_FILE
from speculators.convert import convert_checkpoint
from speculators.deploy.check import check_checkpoint
from speculators.deploy.export import export_checkpoint
from speculators.interfaces import VerifierStates
from speculators.utils.loading import load_model_layers

EMBEDDING = "embed_tokens.weight"
IDS = "eagle_aux_hidden_state_layer_ids"
FIRST_IN = {
    IDS: 3,
    "embed_requires_grad": 3,
    "norm_before_fc": 3,
    "target_hidden_size": 6,
    "fc_norm": 6,
    "norm_output": 6,
    "sample_from_anchor": 6,
    "sliding_window_non_causal": 6,
    "tie_word_embeddings": 6,
}
"""Key of config.json -> the 0.x that wrote it first."""
RETIRED_IN_6 = {
    "dflash": {"max_anchors": 256},
    "peagle": {"num_depths": 8, "down_sample_ratio": 0.7, "down_sample_ratio_min": 0.2},
}
"""Settings of training that 0.3 to 0.5 kept in config.json."""
LAYER_KEYS_OF_6 = ("layer_types", "sliding_window", "use_sliding_window", "is_causal")
RELEASES = {
    **{(minor, "eagle3"): IDS if minor < 3 else "fc_norm" if minor < 6 else None for minor in range(1, 10)},
    **{(minor, "peagle"): "fc_norm" if minor < 6 else None for minor in range(3, 10)},
    **{(minor, "dflash"): "sliding_window_non_causal" if minor < 6 else EMBEDDING for minor in range(3, 9)},
    (9, "dflash"): None,
    **{(minor, "dspark"): None for minor in range(6, 10)},
}
"""(minor of 0.x, drafter) -> a key that the upgrade writes, or a tensor that it leaves out; None: nothing to do."""


def as_release(minor, case, path):
    if case == "eagle3" and minor < 6:  # without the options that came later
        make_checkpoint(case, path, norm_before_fc=False, norm_output=False)
    else:
        make_checkpoint(case, path, **({"fc_norm": False} if case == "peagle" and minor < 6 else {}))

    def change(values):
        for key, first in FIRST_IN.items():
            if minor < first:
                values.pop(key, None)
        nested = values["transformer_layer_config"]
        if minor < 6:
            values["torch_dtype"] = values.pop("dtype")
            nested |= {"rope_theta": nested.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
            for key in LAYER_KEYS_OF_6:
                nested.pop(key, None)
            values |= RETIRED_IN_6.get(case, {})
        values |= {"speculators_version": f"0.{minor}.0", "auto_map": {"": f"config.{case.title()}SpeculatorConfig"}}

    edit_config(path, change)
    if case == "dflash" and minor < 9:  # the verifier's own, which 0.9 no longer wrote
        edit_tensors(path, lambda tensors: tensors.update(load_model_layers([EMBEDDING], VERIFIER)))
    (path / "config.py").write_text("raise RuntimeError('code of a checkpoint is never run')\n")
    (path / RECORD_FILE).unlink()
    return path


def logits_of(path):
    """[V], and which tokens were drafted from."""
    drafter = SpeculatorModel.from_pretrained(str(path), verifier=VERIFIER, dtype=torch.float32).eval()
    hidden, num_aux = 256, len(drafter.capture.aux_layer_ids)
    generator = torch.Generator().manual_seed(0)
    aux, last = (torch.randn(8, width, generator=generator) for width in (num_aux * hidden, hidden))
    with torch.no_grad():
        return drafter.draft_logits(VerifierStates(torch.arange(5, 13), aux, last), 1)[0]


@pytest.mark.parametrize(("minor", "case"), RELEASES)
def test_a_directory_of_each_release_loads_is_upgraded_and_served(minor, case, tmp_path):
    old = as_release(minor, case, tmp_path / "old")
    key = RELEASES[minor, case]
    assert SpeculatorModelConfig.from_pretrained(old).speculators_version == f"0.{minor}.0"
    drafted = logits_of(old)
    assert bool(drafted.isfinite().any())
    if key is None:
        with pytest.raises(ValueError, match="is a speculator already"):
            convert_checkpoint(old, tmp_path / "new", verifier=VERIFIER)
        new = old
    else:
        written = convert_checkpoint(old, tmp_path / "new", verifier=VERIFIER)
        new = written.path
        assert f"release 0.{minor}.0" in written.notes[0] and any(key in note for note in written.notes)
        values = json.loads((new / "config.json").read_text())
        assert "auto_map" not in values and not (new / "config.py").exists() and (key in values or key == EMBEDDING)
        assert not check_checkpoint(new).findings
        before, after = (load_file(path / "model.safetensors") for path in (old, new))
        left_out = {EMBEDDING} if case == "dflash" else set()
        assert before.keys() - after.keys() == left_out and after.keys() <= before.keys()
        assert all(torch.equal(before[name], after[name]) for name in after)
    assert torch.equal(logits_of(new), drafted)
    assert check_checkpoint(new).ok
    exported = export_checkpoint(new, tmp_path / "served")
    assert exported.serving is not None and torch.equal(logits_of(exported.path), drafted)


@pytest.mark.parametrize("minor", [4, 7])
def test_an_embedding_that_is_not_the_verifiers_is_not_left_out(minor, tmp_path):
    old = as_release(minor, "dflash", tmp_path / "old")
    edit_tensors(old, lambda tensors: tensors[EMBEDDING][3].mul_(1.5))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*no copies of the verifier's"):
        convert_checkpoint(old, tmp_path / "new", verifier=VERIFIER)
    assert not (tmp_path / "new").exists()


def test_every_release_is_in_the_table():
    assert {minor for minor, _ in RELEASES} == set(range(1, 10))
    assert {case for _, case in RELEASES} == {"eagle3", "peagle", "dflash", "dspark"}
