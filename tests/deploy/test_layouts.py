"""Round trips: what a layout can say comes back bit for bit, whoever wrote it; what it cannot say is refused."""

import json
from pathlib import Path

import pytest
import torch
from deploy_toys import CASES, DRAFT_VOCAB, HIDDEN, IDS, VERIFIER, edit_config, make_checkpoint
from safetensors.torch import load_file
from transformers import AutoConfig

from speculators import SpeculatorModel
from speculators.checkpoint.formats import SPECULATORS
from speculators.checkpoint.record import RECORD_FILE, computed_config
from speculators.cli.app import main
from speculators.convert import convert_checkpoint
from speculators.deploy.check import check_checkpoint
from speculators.deploy.export import export_checkpoint

ORIGINAL = {"arch": "llama", "target_layer_ids": IDS, "norm_before_residual": False, "norm_before_fc": False}
DRAFTERS = {
    **{case: {} for case in CASES if case != "mtp"},
    "eagle3-original": {**ORIGINAL, "draft_vocab_size": DRAFT_VOCAB, "norm_output": False},
    "eagle3-specforge": {**ORIGINAL, "draft_vocab_size": DRAFT_VOCAB, "norm_output": True, "norm_before_fc": True},
    "eagle3-own-embedding": {**ORIGINAL, "norm_output": False, "embed_requires_grad": True},
    "eagle3-other-layers": {**ORIGINAL, "target_layer_ids": [1, 5, 12], "norm_output": False},
    "eagle-bias": {"fusion_bias": True},
    "eagle-hass": {"layernorms": True, "fusion_bias": True},
    "dflash-mixed": {},
    "dspark-later": {"sample_from_anchor": False},
}
"""Beside the cases of all tests: one for each thing that some layout can say and some other cannot."""
FORMATS = {
    "eagle3": ("eagle3", "specforge", "sglang", "safeailab"),
    "peagle": ("peagle", "specforge"),
    "dflash": ("z-lab", "specforge"),
    "dspark": ("dspark", "specforge"),
    "eagle": ("eagle", "safeailab", "sglang"),
    "medusa": ("medusa",),
    "mlp": ("mlp_speculator",),
}
CANNOT_SAY = {
    "specforge": ("eagle3", "eagle3-qwen3", "eagle3-llama-two-aux", "dspark-later"),
    "sglang": ("eagle3", "eagle3-qwen3", "eagle3-llama-two-aux", "eagle3-specforge", "eagle-hass"),
    "safeailab": ("eagle3", "eagle3-qwen3", "eagle3-llama-two-aux", "eagle3-specforge", "eagle3-other-layers"),
}
PAIRS = [(case, layout) for case in DRAFTERS for layout in (SPECULATORS, *FORMATS[case.split("-")[0]])]
TRAINING_ONLY = {"embed_requires_grad", "num_depths", "down_sample_ratio", "down_sample_ratio_min"}


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    """case -> its directory, not to be changed, as older writers leave it: without a record of training."""
    root, made = tmp_path_factory.mktemp("drafters"), {}

    def get(case: str) -> Path:
        if case not in made:
            algorithm, arguments = case.split("-")[0], dict(DRAFTERS[case])
            if case in CASES:
                algorithm = case
            elif algorithm == "dflash":
                algorithm, arguments["num_layers"] = "dflash-sliding", 3
            made[case] = make_checkpoint(algorithm, root / case, **arguments)
            if case == "dflash-mixed":
                edit_config(made[case], mixed_as_published)
            (made[case] / RECORD_FILE).unlink()
        return made[case]

    return get


def mixed_as_published(values: dict) -> None:
    nested = values["transformer_layer_config"]
    nested["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    nested.pop("is_causal", None)


def written(case: str, layout: str, drafter, tmp_path: Path) -> Path:
    path = export_checkpoint(drafter(case), tmp_path / "there", profile=layout, verifier=VERIFIER).path
    assert check_checkpoint(path, verifier=VERIFIER).ok
    return path


def same_tensors(one: Path, other: Path) -> bool:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    same = left.keys() == right.keys()
    return same and all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_a_layout_says_the_whole_drafter_or_refuses_it(case, layout, drafter, tmp_path):
    source = drafter(case)
    if case in CANNOT_SAY.get(layout, ()):
        with pytest.raises(ValueError, match=r"cannot say|does not say|has no such|layers that see"):
            written(case, layout, drafter, tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    if layout == SPECULATORS:
        if case == "dflash-mixed":
            with pytest.raises(ValueError, match="export --engine z-lab, which says both"):
                written(case, layout, drafter, tmp_path)
        else:
            assert same_tensors(written(case, layout, drafter, tmp_path), source)
        return
    there = written(case, layout, drafter, tmp_path)
    back = convert_checkpoint(there, tmp_path / "back", verifier=VERIFIER).path
    assert same_tensors(back, source)
    ours, again = (computed_config(json.loads((path / "config.json").read_text())) for path in (source, back))
    assert {key: again.get(key) for key in ours.keys() - TRAINING_ONLY} == {
        key: ours[key] for key in ours.keys() - TRAINING_ONLY
    }
    again = export_checkpoint(back, tmp_path / "again", profile=layout, verifier=VERIFIER).path
    assert same_tensors(again, there)
    assert (again / "config.json").read_text() == (there / "config.json").read_text()


def test_every_drafter_and_every_layout_were_seen():
    """Counted, so that a case or a layout that falls out of the product is missed."""
    refused = sum(case in CANNOT_SAY.get(layout, ()) for case, layout in PAIRS)
    assert (len(DRAFTERS), len(PAIRS), refused) == (18, 69, 14)
    for name, layouts in FORMATS.items():
        known = SpeculatorModel.get_class(name).contract.formats
        assert {*layouts} == {each for form in known for each in (form.name, *form.aliases)}


def test_layouts_count_layers_as_their_readers_do(drafter, tmp_path):
    ids = "eagle_aux_hidden_state_layer_ids"
    for layout, top, inside in (
        ("eagle3", IDS, IDS),
        ("sglang", None, [1, 5, 8]),
        ("specforge", None, [1, 5, 8]),
        ("safeailab", None, None),
    ):
        path = export_checkpoint(drafter("eagle3-original"), tmp_path / layout, profile=layout).path
        values = json.loads((path / "config.json").read_text())
        assert (values.get(ids), (values.get("eagle_config") or {}).get(ids)) == (top, inside)


def test_vllm_is_not_promised_what_it_cannot_serve(drafter, tmp_path):
    for case, words in (("eagle-bias", "fusion_bias=True"), ("eagle-hass", "fusion_bias=True")):
        with pytest.raises(ValueError, match=rf"{words}.*--engine native"):
            export_checkpoint(drafter(case), tmp_path / "out")
        exported = export_checkpoint(drafter(case), tmp_path / case, profile="native")
        assert exported.serving is None
        assert "cannot serve it: fusion_bias=True" in check_checkpoint(exported.path, verifier=VERIFIER).verdict
        assert json.loads((exported.path / "config.json").read_text())["bias"] is True
        assert load_file(exported.path / "model.safetensors")["fc.bias"].shape == (HIDDEN,)


def test_each_engine_is_asked_whether_it_serves_a_bias(drafter, tmp_path):
    ours = check_checkpoint(drafter("eagle-bias"), engine="vllm-0.33")
    assert [found.code for found in ours.findings if found.code != "record-missing"] == ["not-servable"]
    assert ours.served_by == "nothing: decode here with `speculators generate`, or serve it by sglang-0.5"
    assert "speculators export" in check_checkpoint(drafter("eagle-bias"), engine="sglang-0.5").served_by
    exported = export_checkpoint(drafter("eagle-bias"), tmp_path / "out", engine="sglang-0.5")
    report = check_checkpoint(exported.path, verifier=VERIFIER, engine="sglang-0.5")
    assert not report.findings and report.verdict.startswith("ready to serve") and report.command == exported.command
    normed = check_checkpoint(drafter("eagle-hass"), engine="sglang-0.5")
    assert "layernorms=True" in normed.verdict and normed.served_by.endswith("`speculators generate`")


def test_no_command_starts_vllm_with_what_is_written_for_another_engine(drafter, tmp_path, capsys):
    path, options = str(tmp_path / "out"), ["--engine", "sglang-0.5"]
    assert main(["export", str(drafter("eagle-bias")), "--output", path, *options]) == 0
    assert main(["check", path, "--verifier", VERIFIER, *options]) == 0
    shown = capsys.readouterr().out
    assert "next: speculators serve" not in shown and "sglang.launch_server" in shown


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("layout", ["eagle3", "z-lab", "dspark", "eagle", SPECULATORS])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_written_as_both_generations_of_readers_take_it(rope, layout, tmp_path):
    """transformers 4 knows no rope_parameters: without rope_theta beside it would take 10000 for 500000."""
    case = {"z-lab": "dflash", SPECULATORS: "eagle3"}.get(layout, layout)
    source = make_checkpoint(case, tmp_path / "source")
    (source / RECORD_FILE).unlink()
    edit_config(source, lambda values: values["transformer_layer_config"].update(rope_parameters=ROPES[rope]))
    path = export_checkpoint(source, tmp_path / "out", profile=layout).path
    values = json.loads((path / "config.json").read_text())
    values = values.get("transformer_layer_config", values)
    assert values["rope_theta"] == 5e5
    expected = {key: value for key, value in ROPES[rope].items() if key != "rope_theta"}
    assert values["rope_scaling"] == (expected if rope != "default" else None)
    newer = AutoConfig.for_model(**values)
    assert newer.rope_parameters == ROPES[rope]
    assert {found.code for found in check_checkpoint(path).findings} <= {"record-missing"}


def test_a_mixed_drafter_of_z_lab_is_converted_and_served_as_published(drafter, tmp_path):
    path = export_checkpoint(drafter("dflash-mixed"), tmp_path / "z-lab", profile="z-lab").path
    values = json.loads((path / "config.json").read_text())
    assert values["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert "is_causal" not in values and "causal" not in values["dflash_config"]
    report = check_checkpoint(path, verifier=VERIFIER)
    assert report.ok and report.serving.speculative_config["method"] == "dflash"
    converted = convert_checkpoint(path, tmp_path / "ours", verifier=VERIFIER)
    assert any("one mask for all layers" in note for note in converted.notes)
    config = SpeculatorModel.from_pretrained(converted.path).config
    assert config.trained_causal == [True, False, True]
