"""Exports: every format says the same drafter, nothing is half-written, nothing broken is passed on."""

import json
from pathlib import Path

import pytest
import torch
from deploy_toys import CASES, HIDDEN, VERIFIER, VOCAB, edit_config, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from speculators import SpeculatorModel
from speculators.checkpoint.engine_profile import releases
from speculators.checkpoint.record import RECORD_FILE, computed_config
from speculators.cli.app import run
from speculators.convert import convert_checkpoint
from speculators.deploy.check import check_checkpoint
from speculators.deploy.engine import serving_of_export
from speculators.deploy.export import export_checkpoint, plan_export

SERVED_AS = {"eagle": "eagle", "medusa": "medusa", "mtp": "stitched"}
WITH_OTHER_FORMATS = [case for case in CASES if case != "mtp"]
NOT_SERVED = ("mlp",)


def values_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("case", WITH_OTHER_FORMATS)
def test_what_export_writes_has_no_findings_in_any_format(case, trained, tmp_path):
    for profile in ("native", "speculators", *([] if case in NOT_SERVED else ["vllm-0.32"])):
        exported = export_checkpoint(trained(case), tmp_path / profile, profile=profile)
        report = check_checkpoint(exported.path)
        assert report.format == exported.format
        assert not report.findings, [str(found) for found in report.findings]
        assert "as it was trained" in report.done
    if case not in NOT_SERVED:
        assert check_checkpoint(tmp_path / "vllm-0.32").format == SERVED_AS.get(case, "speculators")


SERVED_BY_VLLM = [(p.name, case) for p in releases("vllm") for case in p.drafters if case != "mtp"]


@pytest.mark.parametrize(("engine", "case"), SERVED_BY_VLLM)
def test_what_is_written_for_a_release_is_what_its_profile_says(engine, case, trained, tmp_path):
    """mtp: inside a verifier that ships such layers, in a test of its own."""
    exported = export_checkpoint(trained(case), tmp_path / "out", engine=engine)
    said = exported.engine.profile.drafters[case]
    assert exported.format == said.format and exported.serving.model == VERIFIER
    drafts = exported.serving.speculative_config["num_speculative_tokens"]
    settings = {**said.settings, "model": str(exported.path), "num_speculative_tokens": drafts}
    assert exported.serving.speculative_config == settings and f"{drafts}" in exported.command
    names = load_file(exported.path / "model.safetensors").keys()
    assert all(set(either.split("|")) & names for either in said.tensors)
    assert not check_checkpoint(exported.path, verifier=VERIFIER, algorithm=case, engine=engine).errors


@pytest.mark.parametrize("case", WITH_OTHER_FORMATS)
def test_through_another_format_and_back_it_is_the_same_drafter(case, trained, tmp_path):
    native = export_checkpoint(trained(case), tmp_path / "native", profile="native").path
    back = convert_checkpoint(native, tmp_path / "back", verifier=VERIFIER).path
    before, after = load_file(trained(case) / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    ours, again = computed_config(values_of(trained(case))), computed_config(values_of(back))
    training_only = {"embed_requires_grad", "num_depths", "down_sample_ratio", "down_sample_ratio_min"}
    assert {key: again.get(key) for key in ours if key not in training_only} == {
        key: value for key, value in ours.items() if key not in training_only
    }
    assert type(SpeculatorModel.from_pretrained(back)) is type(SpeculatorModel.from_pretrained(trained(case)))


def test_a_dense_dspark_says_where_it_drafts_as_engines_read_it(trained, tmp_path):
    """vLLM reads dspark_bonus_anchor; files of DSpark's authors have neither key and draft at the anchor."""
    path = export_checkpoint(trained("dspark"), tmp_path / "dense", profile="native").path
    assert values_of(path)["dspark_bonus_anchor"] is False
    assert values_of(path)["target_layer_ids"] == [1, 5, 8]
    (path / RECORD_FILE).unlink()  # which says how many tokens this one drafts
    for keys, drafts_at_anchor in (({}, True), ({"dspark_bonus_anchor": True}, False)):
        edit_config(
            path, lambda values: [values.pop(key, None) for key in ("sample_from_anchor", "dspark_bonus_anchor")]
        )
        edit_config(path, lambda values, keys=keys: values.update(keys))
        back = convert_checkpoint(path, tmp_path / "back", verifier=VERIFIER, overwrite=True).path
        assert values_of(back)["sample_from_anchor"] is drafts_at_anchor


def test_an_mlp_speculator_has_the_names_of_its_authors(trained, tmp_path):
    path = export_checkpoint(trained("mlp"), tmp_path / "fms", profile="mlp_speculator").path
    assert values_of(path) == {
        "model_type": "mlp_speculator",
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "vocab_size": VOCAB,
        "emb_dim": HIDDEN,
        "inner_dim": 64,
        "n_predict": 3,
        "tie_weights": True,
        "scale_input": False,
        "top_k_tokens_per_head": [5, 4, 3],
        "n_candidates": 5,
        "torch_dtype": "bfloat16",
    }
    assert set(load_file(path / "model.safetensors")) == {
        f"speculator.{name}"
        for name in ("emb.0.weight", "head.0.weight", "ln.0.weight", "ln.0.bias", "proj.0.weight", "proj.1.weight")
    }


def test_drafters_without_an_engine_or_another_format_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"vllm-0\.33 serves no 'mlp' drafter; --engine speculators writes"):
        export_checkpoint(trained("mlp"), tmp_path / "out", engine="vllm-0.33")
    with pytest.raises(ValueError, match=r"vllm-0\.33 serves no 'medusa' drafter.* vllm-0\.32 serves"):
        export_checkpoint(trained("medusa"), tmp_path / "out", engine="vllm-0.33")
    with pytest.raises(ValueError, match=r"'eagle3' can be written as .*speculators"):
        export_checkpoint(trained("eagle3"), tmp_path / "out", profile="medusa")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_asked(trained, tmp_path):
    output = tmp_path / "out"
    export_checkpoint(trained("eagle"), output)
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(trained("eagle3"), output)
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    export_checkpoint(trained("eagle3"), output, overwrite=True)
    assert json.loads((output / "config.json").read_text())["speculators_model_type"] == "eagle3"


def test_what_is_not_as_trained_is_not_exported(copy_of, tmp_path):
    path = copy_of("eagle")
    edit_config(path, lambda v: v["transformer_layer_config"]["rope_parameters"].update(rope_theta=5.0))
    with pytest.raises(ValueError, match=r"rope_theta: 5.0; it was 10000.0 in training"):
        export_checkpoint(path, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["eagle"]


def test_small_mends_are_made(copy_of, tmp_path):
    """Of a checkpoint that others wrote: layers to read where one runner looks, keys that have no default."""
    path, ids = copy_of("eagle3-llama-two-aux"), "eagle_aux_hidden_state_layer_ids"
    (path / RECORD_FILE).unlink()

    def as_others_write(values):
        layers = values["transformer_layer_config"]
        layers["eagle_config"] = {ids: values.pop(ids)}
        for key in ("num_aux_hidden_states", "layer_types", "mlp_bias"):
            del layers[key]
        values["auto_map"] = {"": "config.Eagle3SpeculatorConfig"}

    edit_config(path, as_others_write)
    assert {found.code for found in check_checkpoint(path).findings} >= {"aux-ids-nested", "auto-map"}
    exported = export_checkpoint(path, tmp_path / "out")
    values = values_of(exported.path)
    assert values[ids] == [3, 9] and "auto_map" not in values
    assert values["transformer_layer_config"]["num_aux_hidden_states"] == 2
    assert [found.code for found in check_checkpoint(exported.path).findings] == ["record-missing"]


def test_full_layers_are_written_as_engines_must_serve_them(copy_of, tmp_path):
    """Upstream's config says nothing: vLLM would serve causal what was trained to see its whole block."""
    path = copy_of("dflash")
    (path / RECORD_FILE).unlink()
    edit_config(path, lambda values: values["transformer_layer_config"].pop("is_causal"))
    assert [found.code for found in check_checkpoint(path).errors] == ["mask-differs"]
    exported = export_checkpoint(path, tmp_path / "out")
    assert values_of(exported.path)["transformer_layer_config"]["is_causal"] is False
    assert [found.code for found in check_checkpoint(exported.path).findings] == ["record-missing"]


def test_the_card_says_how_to_serve_and_what_was_measured(trained, tmp_path):
    estimate = {"value": 3.05, "low": 2.7, "high": 3.4}
    row = {
        "method": "eagle",
        "num_speculative_tokens": 4,
        "acceptance_length": estimate,
        "speedup": estimate,
        "num_prompts": 20,
    }
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"verifier": "v", "dataset": "d", "rows": [row]}))
    exported = export_checkpoint(trained("eagle"), tmp_path / "out", report=report)
    card = (exported.path / "README.md").read_text()
    assert exported.serving.speculative_config["method"] == "eagle"
    shown = exported.command.replace(str(exported.path), "./out").replace(VERIFIER, Path(VERIFIER).name)
    assert shown in card and f"vllm serve {Path(VERIFIER).name} --spec" in card
    assert "| 4 | 3.05 | 3.05 | 20 |" in card
    assert "Not measured" in (export_checkpoint(trained("eagle"), tmp_path / "two").path / "README.md").read_text()
    with pytest.raises(ValueError, match=r"measured \['eagle'\], neither .* nor another 'medusa'"):
        export_checkpoint(trained("medusa"), tmp_path / "three", engine="vllm-0.32", report=report)


def test_a_report_that_lies_near_is_quoted_for_the_checkpoint_it_measured_alone(copy_of, tmp_path):
    estimate = {"value": 3.05, "low": 2.7, "high": 3.4}
    row = {
        "method": "eagle",
        "num_speculative_tokens": 4,
        "acceptance_length": estimate,
        "speedup": estimate,
        "num_prompts": 20,
    }
    checkpoint = copy_of("eagle")
    (tmp_path / "checkpoint_best").symlink_to(checkpoint)
    quoted = {}
    for model in ("checkpoint_best", "another"):
        configs = {"none": None, "eagle": {"method": "eagle", "model": str(tmp_path / model)}}
        found = {"verifier": "v", "dataset": "d", "rows": [row], "settings": {"speculative_configs": configs}}
        (tmp_path / "report.json").write_text(json.dumps(found))
        card = (export_checkpoint(checkpoint, tmp_path / "out", overwrite=True).path / "README.md").read_text()
        quoted[model] = "| 4 | 3.05 | 3.05 | 20 |" in card
    assert quoted == {"checkpoint_best": True, "another": False}
    (tmp_path / "report.json").write_text('{"verb": "verify"}')
    export_checkpoint(checkpoint, tmp_path / "out", overwrite=True)


def test_verifier_and_type_can_be_chosen(trained, tmp_path):
    result = run(
        [
            "export",
            str(trained("eagle3")),
            "--output",
            str(tmp_path / "out"),
            "--dtype",
            "float32",
            "--verifier",
            VERIFIER,
        ]
    )
    assert result["format"] == "speculators" and result["model"] == VERIFIER
    said = {"method": "eagle3", "model": str(tmp_path / "out"), "num_speculative_tokens": 3}
    assert result["speculative_config"] == said
    assert values_of(tmp_path / "out")["dtype"] == "float32"
    assert load_file(tmp_path / "out" / "model.safetensors")["fc.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='int64' is not a floating type"):
        export_checkpoint(trained("eagle3"), tmp_path / "other", dtype="int64")


def mimo_verifier(path: Path) -> Path:
    """A tiny MiMo: Qwen2 whose checkpoint ships an MTP layer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tensors, layer = load_file(path / "model.safetensors"), "model.layers.0."
    native = {key.replace(layer, "model.mtp_layers.0."): t.clone() for key, t in tensors.items() if layer in key}
    native |= {f"model.mtp_layers.0.{name}_layernorm.weight": torch.ones(16) for name in ("token", "hidden", "final")}
    native["model.mtp_layers.0.input_proj.weight"] = torch.randn(16, 32)
    save_file({**tensors, **native}, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, lambda values: values.update(architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1))
    return path


def test_an_mtp_layer_is_exported_inside_its_verifier(tmp_path):
    verifier = str(mimo_verifier(tmp_path / "mimo"))
    path = make_checkpoint("mtp", tmp_path / "mtp", verifier=verifier)
    assert not check_checkpoint(path).findings
    plan = plan_export(path, tmp_path / "stitched")
    assert not (tmp_path / "stitched").exists()
    exported = export_checkpoint(path, tmp_path / "stitched")
    assert exported.serving.model == str(tmp_path / "stitched")
    assert exported.serving.speculative_config == {"method": "mtp", "num_speculative_tokens": 2}
    before = load_file(tmp_path / "mimo" / "model.safetensors")
    after = load_file(exported.path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.mtp_layers.0.") for name in changed)
    planned = {t.written: (t.shape, t.dtype) for t in plan.tensors}
    assert planned.keys() >= changed and all(name.startswith("model.mtp_layers.0.") for name in planned)
    assert all(planned[name] == (tuple(after[name].shape), str(after[name].dtype)[6:]) for name in planned)
    report = check_checkpoint(exported.path)
    assert report.format == "stitched" and not report.findings, [str(found) for found in report.findings]
    assert serving_of_export(exported.path) == exported.serving
    again = convert_checkpoint(exported.path, tmp_path / "again", verifier=verifier).path
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (path, again))
    assert all(torch.allclose(ours[name].float(), theirs[name].float()) for name in ours)


def test_overwriting_deletes_neither_other_directories_nor_the_source(copy_of, tmp_path):
    checkpoint, home = copy_of("eagle"), tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    (tmp_path / "link").symlink_to(checkpoint)
    for output, words in (
        (home, "thesis.txt.*did not write there"),
        (home / "thesis.txt", "is a file"),
        (tmp_path / "link", "is the source itself"),
    ):
        with pytest.raises(ValueError, match=words):
            export_checkpoint(checkpoint, output, overwrite=True)
    assert (home / "thesis.txt").read_text() == "precious"
    assert (checkpoint / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["thesis.txt", ".git/config", "notes/draft.md", "model-2.safetensors", "link"])
def test_overwriting_deletes_nothing_that_was_not_exported(trained, tmp_path, name):
    output = export_checkpoint(trained("eagle"), tmp_path / "out").path
    added = output / name
    added.parent.mkdir(exist_ok=True)
    if name == "link":
        added.symlink_to(tmp_path, target_is_directory=True)
    else:
        added.write_text("precious")
    with pytest.raises(ValueError, match=rf"{name}.*did not write there"):
        export_checkpoint(trained("eagle"), output, overwrite=True)
    assert added.exists()
    added.unlink()
    export_checkpoint(trained("eagle"), output, overwrite=True)
    assert not added.exists()


def test_a_checkpoint_that_nobody_recorded_is_not_replaced(copy_of, trained, tmp_path):
    mine = copy_of("eagle")  # a training's own checkpoint: config.json and all
    (mine / ".speculators.json").write_text('{"files": 3}')
    with pytest.raises(ValueError, match=r"config\.json.*did not write there"):
        export_checkpoint(trained("eagle"), mine, overwrite=True)
    with pytest.raises(ValueError, match=r"config\.json.*did not write there"):
        convert_checkpoint(trained("eagle"), mine, verifier=VERIFIER, overwrite=True)
    assert (mine / "model.safetensors").is_file()


def test_a_verifier_or_report_that_cannot_be_read_is_named_with_its_flag(trained, tmp_path):
    with pytest.raises(ValueError, match=r"no verifier at './nowhere'"):
        export_checkpoint(trained("eagle"), tmp_path / "out", verifier="./nowhere")
    for text, words in (("{", "is not JSON"), ("{}", "it has no rows")):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=rf"report.json (is not an evaluation: )?{words}.*--report"):
            export_checkpoint(trained("eagle"), tmp_path / "out", report=tmp_path / "report.json")
    assert not (tmp_path / "out").exists()


def test_a_relative_verifier_is_recorded_by_its_absolute_path(trained, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(VERIFIER)
    monkeypatch.chdir(tmp_path)
    for given, recorded in (("./link", str(link)), (str(link), str(link))):
        exported = export_checkpoint(trained("eagle3"), tmp_path / "out", verifier=given, overwrite=True)
        values = json.loads((exported.path / "config.json").read_text())
        assert values["speculators_config"]["verifier"]["name_or_path"] == recorded


@pytest.mark.parametrize("case", ["eagle", "medusa"])
def test_an_export_in_another_layout_still_says_how_it_is_served(case, trained, tmp_path):
    exported = export_checkpoint(trained(case), tmp_path / "out", engine="vllm-0.32")
    assert serving_of_export(exported.path, None, exported.engine.profile) == exported.serving
