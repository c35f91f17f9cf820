"""Conversion of checkpoints as other projects write them; names and errors are those of the public contract."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from deploy_toys import DRAFT_VOCAB, HIDDEN, VERIFIER, VOCAB, WIDTH, edit_config, edit_tensors, save
from quantised_toys import compressed, config_values, plain_tensors, quantised_fp8, write_directory, write_gguf
from safetensors.torch import load_file, save_file
from speculators.convert.dflash import DFlashConverter
from speculators.convert.eagle import Eagle3Converter
from speculators.convert.eagle.utils import detect_fusion_bias_and_layernorms, find_vocab_size
from speculators.convert.mtp import MTPConverter
from speculators.convert.utils import ensure_checkpoint_is_local, load_checkpoint_config, load_checkpoint_weights

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.cli.app import run
from speculators.convert import convert_checkpoint, convert_model, maybe_convert_external_checkpoint
from speculators.deploy.check import check_checkpoint
from speculators.deploy.export import export_checkpoint
from speculators.utils.loading import load_model_layers


def test_an_eagle3_head_is_converted(eagle3_head, tmp_path):
    written = convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER)
    assert (written.speculators_model_type, written.source_format) == ("eagle3", "eagle3")
    assert any("[2, 6, 9]" in note for note in written.notes)
    config = SpeculatorModelConfig.from_pretrained(written.path)
    nested = config.transformer_layer_config
    assert (nested.vocab_size, nested.max_position_embeddings) == (VOCAB, 1024)  # of t2d; of the verifier
    assert nested.rope_parameters["rope_theta"] == 5e5
    assert config.eagle_aux_hidden_state_layer_ids == [2, 6, 9]
    assert not any((config.norm_before_residual, config.norm_before_fc, config.fc_norm, config.norm_output))
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 3
    source, tensors = load_file(eagle3_head / "model.safetensors"), load_file(written.path / "model.safetensors")
    assert torch.equal(tensors["layers.0.self_attn.q_proj.weight"], source["midlayer.self_attn.q_proj.weight"])
    assert torch.equal(tensors["d2t"], source["d2t"])
    embedding = load_model_layers(["embed_tokens.weight"], VERIFIER)["embed_tokens.weight"]
    assert torch.equal(tensors["embed_tokens.weight"], embedding)
    report = check_checkpoint(written.path)
    assert not [found for found in report.findings if found.code != "dtype-differs"]


@pytest.mark.parametrize("kind", ["GGUF file", "GGUF directory", "FP8"])
def test_an_embedding_of_a_quantised_verifier_is_dequantised(kind, eagle3_head, tmp_path):
    name, tensors = "model.embed_tokens.weight", plain_tensors()
    verifier = tmp_path / "verifier"
    if kind == "FP8":
        stored, scale = quantised_fp8(tensors[name])
        expected = stored.float() * scale
        fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
        scheme = compressed(fp8, "float-quantized")
        write_directory(verifier, {**tensors, name: stored, name + "_scale": scale}, **scheme)
    elif find_spec("gguf") is None or find_spec("accelerate") is None:
        pytest.skip("gguf is of the extra `quantized`, which is not installed")
    else:
        from gguf import GGMLQuantizationType, quants

        verifier.mkdir()
        file = write_gguf(verifier / "tiny.gguf", tokenizer=False)
        data = quants.quantize(tensors[name].numpy(), GGMLQuantizationType.Q8_0)
        expected = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType.Q8_0)).float()
        verifier = file if kind == "GGUF file" else verifier
    assert expected.shape == (config_values()["vocab_size"], HIDDEN) and not torch.equal(expected, tensors[name])
    written = convert_checkpoint(eagle3_head, tmp_path / "out", verifier=str(verifier))
    assert torch.equal(load_file(written.path / "model.safetensors")["embed_tokens.weight"].float(), expected)
    assert SpeculatorModelConfig.from_pretrained(written.path).recorded_verifier == str(verifier)


def test_what_the_source_does_not_say_can_be_said(eagle3_head, tmp_path):
    edit_tensors(eagle3_head, lambda tensors: tensors.update({"input_norm.weight": torch.ones(3 * HIDDEN)}))
    options = {"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    Eagle3Converter().convert(eagle3_head, tmp_path / "out", VERIFIER, **options)
    config = SpeculatorModelConfig.from_pretrained(tmp_path / "out")
    assert config.norm_before_residual and config.norm_before_fc  # the second is inferred from its tensor
    assert config.eagle_aux_hidden_state_layer_ids == [1, 2, 3]
    with pytest.raises(TypeError, match="no argument 'norm_befor'"):
        Eagle3Converter().convert(eagle3_head, tmp_path / "out", VERIFIER, norm_befor=True)


def test_missing_and_unknown_tensors_of_a_head(eagle3_head, tmp_path):
    inv_freq = 5e5 ** -(torch.arange(0, WIDTH, 2) / WIDTH)  # as old releases of transformers saved it
    edit_tensors(eagle3_head, lambda tensors: tensors.update({"midlayer.self_attn.rotary_emb.inv_freq": inv_freq}))
    notes = convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER).notes
    assert any("inv_freq" in note for note in notes)
    for name in ("midlayer.self_attn.gate.weight", "layers.1.mlp.up_proj.weight", "verifier_norm.weight"):
        edit_tensors(eagle3_head, lambda tensors, name=name: tensors.update({name: torch.ones(HIDDEN)}))
        with pytest.raises(ValueError, match=r"has no place for.*would draft something else"):
            convert_checkpoint(eagle3_head, tmp_path / "two", verifier=VERIFIER)
        edit_tensors(eagle3_head, lambda tensors, name=name: tensors.pop(name))
    edit_tensors(eagle3_head, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(ValueError, match=r"lacks \['norm.weight'\]"):
        convert_checkpoint(eagle3_head, tmp_path / "two", verifier=VERIFIER)
    assert not (tmp_path / "two").exists()


def test_a_zlab_drafter_is_converted(zlab_drafter, tmp_path):
    DFlashConverter().convert(zlab_drafter, tmp_path / "out", VERIFIER)
    config = SpeculatorModelConfig.from_pretrained(tmp_path / "out")
    assert config.aux_hidden_state_layer_ids == [2, 9] and config.mask_token_id == 7
    assert (config.block_size, config.draft_vocab_size) == (6, VOCAB)
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 5
    assert config.sliding_window_non_causal and config.served_causal == [False, False]
    assert not check_checkpoint(tmp_path / "out").findings
    export_checkpoint(tmp_path / "out", tmp_path / "back", profile="native")
    before, after = (load_file(path / "model.safetensors") for path in (zlab_drafter, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_fused_projections_are_split(zlab_drafter, tmp_path):
    whole = load_file(zlab_drafter / "model.safetensors")

    def fuse(tensors):
        for i in range(2):
            parts = [tensors.pop(f"layers.{i}.self_attn.{kind}_proj.weight") for kind in "qkv"]
            tensors[f"layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(parts)

    edit_tensors(zlab_drafter, fuse)
    convert_checkpoint(zlab_drafter, tmp_path / "out", verifier=VERIFIER)
    split = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(split[name], whole[name]) for name in split)
    edit_tensors(zlab_drafter, lambda t: t.update({"layers.0.self_attn.q_proj.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="both fused qkv_proj and q_proj"):
        convert_checkpoint(zlab_drafter, tmp_path / "two", verifier=VERIFIER)


def test_layers_not_named_are_the_formats_default(zlab_drafter, tmp_path):
    edit_config(zlab_drafter, lambda values: values["dflash_config"].pop("target_layer_ids"))
    convert_checkpoint(zlab_drafter, tmp_path / "out", verifier=VERIFIER)
    # evenly from 1 to n - 3 = 9, as outputs of layers: one more as we count
    assert SpeculatorModelConfig.from_pretrained(tmp_path / "out").aux_hidden_state_layer_ids == [2, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("fc.weight"), "Draft weights missing"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "Unexpected keys"),
        (lambda tensors: tensors.update({"layers.0.g_proj.weight": torch.ones(1)}), "computes another function"),
        (lambda tensors: tensors.update({"fc.weight": torch.ones(HIDDEN, 9)}), "Architecture mismatch"),
    ],
)
def test_other_drafters_than_the_formats_are_refused(change, message, zlab_drafter, tmp_path):
    edit_tensors(zlab_drafter, change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(zlab_drafter, tmp_path / "out", verifier=VERIFIER)
    assert not (tmp_path / "out").exists()


def test_a_block_size_beside_the_other_values_of_dflash_is_read_where_the_top_has_null(zlab_drafter, tmp_path):
    def moved(values):
        values["dflash_config"]["block_size"], values["block_size"] = values["block_size"], None

    edit_config(zlab_drafter, moved)
    written = convert_checkpoint(zlab_drafter, tmp_path / "out", verifier=VERIFIER)
    config = json.loads((zlab_drafter / "config.json").read_text())
    assert SpeculatorModelConfig.from_pretrained(written.path).block_size == config["dflash_config"]["block_size"]


def test_a_block_size_is_needed(zlab_drafter, tmp_path):
    edit_config(zlab_drafter, lambda values: values.pop("block_size"))
    with pytest.raises(ValueError, match="block_size"):
        convert_checkpoint(zlab_drafter, tmp_path / "out", verifier=VERIFIER)


def test_a_specforge_dspark_is_converted(zlab_drafter, tmp_path):
    def as_dspark(values):
        values["architectures"] = ["DSparkDraftModel"]
        values["dflash_config"] |= {"projector_type": "dspark", "markov_rank": 4, "markov_head_type": "vanilla"}

    edit_config(zlab_drafter, as_dspark)
    heads = {"logit_head.markov_w1.weight": torch.randn(VOCAB, 4), "logit_head.markov_w2.weight": torch.randn(VOCAB, 4)}
    edit_tensors(zlab_drafter, lambda tensors: tensors.update(heads))
    convert_checkpoint(zlab_drafter, tmp_path / "out", verifier=VERIFIER)
    config = SpeculatorModelConfig.from_pretrained(tmp_path / "out")
    assert config.speculators_model_type == "dspark" and config.aux_hidden_state_layer_ids == [2, 9]
    assert config.sample_from_anchor and not config.enable_confidence_head
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 6
    assert not check_checkpoint(tmp_path / "out").findings


def test_an_mlp_speculator_is_converted(tmp_path, trained):
    source = load_file(trained("mlp") / "model.safetensors")
    config = SpeculatorModelConfig.from_pretrained(trained("mlp"))
    values = {
        "model_type": "mlp_speculator",
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "vocab_size": VOCAB,
        "emb_dim": HIDDEN,
        "inner_dim": 64,
        "n_predict": 3,
        "tie_weights": config.tie_weights,
    }
    path = save(tmp_path / "fms", values, {f"speculator.{name}": tensor for name, tensor in source.items()})
    written = convert_checkpoint(path, tmp_path / "out", verifier=VERIFIER)
    assert written.speculators_model_type == "mlp" and not check_checkpoint(written.path).findings
    assert load_file(written.path / "model.safetensors").keys() == source.keys()


def test_tied_weights_that_a_file_repeats_are_taken_once_and_must_be_equal(tmp_path, trained):
    path = export_checkpoint(trained("mlp"), tmp_path / "fms", profile="native").path
    once = load_file(path / "model.safetensors")
    again = {name.replace(".0.", ".2."): t.clone() for name, t in once.items() if not name.endswith("proj.0.weight")}
    save_file({**once, **again}, path / "model.safetensors", metadata={"format": "pt"})
    back = load_file(convert_checkpoint(path, tmp_path / "out", verifier=VERIFIER).path / "model.safetensors")
    assert {f"speculator.{name}" for name in back} == set(once)
    again["speculator.head.2.weight"] += 1
    save_file({**once, **again}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"says tie_weights, and head\.2\.weight is not head\.0\.weight"):
        convert_checkpoint(path, tmp_path / "other", verifier=VERIFIER)


# -- a source of another verifier, or with values that no drafter has


def sized(tmp_path, **changes):
    """A verifier of other sizes, by its config alone."""
    path = tmp_path / "sized"
    path.mkdir()
    values = json.loads((Path(VERIFIER) / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **changes}))
    return str(path)


def first_weight(change):
    def spoil(tensors):
        name = next(name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].ndim == 2)
        change(tensors[name])

    return lambda path: edit_tensors(path, spoil)


def native(trained, tmp_path, case):
    path = export_checkpoint(trained(case), tmp_path / "native", profile="native", verifier=VERIFIER).path
    (path / "training_record.json").unlink()
    return path


NATIVE = ("eagle3", "peagle", "dflash", "dspark", "eagle", "medusa", "mlp")


@pytest.mark.parametrize("case", NATIVE)
def test_a_source_is_converted_as_it_came_but_not_with_weights_that_are_no_numbers(case, trained, tmp_path):
    path = native(trained, tmp_path, case)
    convert_checkpoint(path, tmp_path / "right", verifier=VERIFIER)
    first_weight(lambda weight: weight.view(-1)[:3].fill_(float("nan")))(path)
    with pytest.raises(ValueError, match=r"NaN or infinite.*(?s:.)*|3 values") as refused:
        convert_checkpoint(path, tmp_path / "out", verifier=VERIFIER)
    assert "nothing was written" in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", NATIVE)
@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 5000}, {"hidden_size": 128}], ids=["another vocabulary", "another width"]
)
def test_a_source_for_a_verifier_of_other_sizes_is_refused(case, sizes, trained, tmp_path):
    path = native(trained, tmp_path, case)
    if case in ("eagle", "dflash", "dspark") and "vocab_size" in sizes:
        pytest.skip("the source has no table of the vocabulary, and its config names one that is compared elsewhere")
    with pytest.raises(ValueError):
        convert_checkpoint(path, tmp_path / "out", verifier=sized(tmp_path, **sizes))
    assert not (tmp_path / "out").exists()


def absolute_ids(tensors):
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


REFUSED = {
    "layers beyond its depth, eagle3": (
        "eagle3",
        lambda path: edit_config(path, lambda v: v.update(eagle_aux_hidden_state_layer_ids=[2, 6, 40])),
        r"the verifier has 12 layers",
    ),
    "layers beyond its depth, z-lab": (
        "dflash",
        lambda path: edit_config(path, lambda v: v["dflash_config"].update(target_layer_ids=[1, 5, 40])),
        r"the verifier has 12 layers",
    ),
    "layers beyond its depth, dense": (
        "dspark",
        lambda path: edit_config(path, lambda v: v.update(target_layer_ids=[1, 5, 40])),
        r"the verifier has 12 layers",
    ),
    "d2t of absolute ids": ("eagle3", lambda path: edit_tensors(path, absolute_ids), "d2t"),
    "t2d against d2t": (
        "eagle3",
        lambda path: edit_tensors(path, lambda tensors: tensors.update(t2d=tensors["t2d"].roll(1))),
        "they disagree on",
    ),
    "mask token outside, z-lab": (
        "dflash",
        lambda path: edit_config(path, lambda v: v["dflash_config"].update(mask_token_id=99999)),
        "mask_token_id: 99999",
    ),
    "mask token outside, dense": (
        "dspark",
        lambda path: edit_config(path, lambda v: v.update(mask_token_id=99999)),
        "mask_token_id: 99999",
    ),
    "mask token outside, SpecForge": (
        "peagle",
        lambda path: edit_config(path, lambda v: v.update(mask_token_id=99999)),
        "mask_token_id: 99999",
    ),
    "the head's rows one token further": (
        "eagle3",
        lambda path: edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].roll(1, 0)})),
        "from theirs",
    ),
    "rope said twice": ("eagle3", lambda path: edit_config(path, lambda v: v.update(rope_theta=5e5)), "said twice"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_wrong_in_a_source_is_refused_and_leaves_nothing(fault, trained, tmp_path):
    case, spoil, message = REFUSED[fault]
    path = native(trained, tmp_path, case)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, tmp_path / "out", verifier=VERIFIER)
    assert not (tmp_path / "out").exists()


def test_a_result_that_does_not_load_on_a_device_leaves_nothing(eagle3_head, tmp_path):
    with pytest.raises(ValueError, match="torch sees"):
        convert_model(str(eagle3_head), VERIFIER, None, tmp_path / "out", validate_device="cuda:99")
    assert not (tmp_path / "out").exists()


def test_the_contracts_entry_points(eagle3_head, trained, tmp_path):
    with pytest.raises(ValueError, match="Unsupported algorithm: 'mamba'"):
        convert_model(str(eagle3_head), VERIFIER, "mamba", tmp_path / "out")
    with pytest.raises(RuntimeError, match="cannot be read"):
        convert_model(str(eagle3_head), str(tmp_path / "none"), "eagle3", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="Checkpoint not found"):
        convert_model(str(tmp_path / "none"), VERIFIER, "eagle3", tmp_path / "out")
    with pytest.raises(ValueError, match="no checkpoint format that 'mtp' reads"):
        MTPConverter().convert(eagle3_head, tmp_path / "out", VERIFIER)
    convert_model(str(eagle3_head), VERIFIER, "eagle3", tmp_path / "out", validate_device="cpu")
    assert SpeculatorModel.from_pretrained(tmp_path / "out").fc.in_features == 3 * HIDDEN
    with pytest.raises(ValueError, match="is a speculator already"):
        convert_model(str(tmp_path / "out"), VERIFIER, "eagle3", tmp_path / "two")
    with pytest.raises(ValueError, match="exists already"):
        convert_model(str(eagle3_head), VERIFIER, "eagle3", tmp_path / "out")


def test_conversion_on_demand(eagle3_head, trained, tmp_path):
    ours = str(trained("eagle3"))
    assert maybe_convert_external_checkpoint(ours) == ours
    with pytest.raises(ValueError, match="name it"):
        maybe_convert_external_checkpoint(str(eagle3_head))
    converted = maybe_convert_external_checkpoint(str(eagle3_head), VERIFIER)
    assert SpeculatorModelConfig.from_pretrained(converted).speculators_model_type == "eagle3"
    (tmp_path / "odd").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "odd" / "model.safetensors")
    (tmp_path / "odd" / "config.json").write_text("{}")
    with pytest.raises(NotImplementedError, match="Cannot auto-convert"):
        maybe_convert_external_checkpoint(str(tmp_path / "odd"), VERIFIER)


def test_the_helpers_of_earlier_releases(eagle3_head, tmp_path):
    assert ensure_checkpoint_is_local(eagle3_head) == eagle3_head
    assert load_checkpoint_config(eagle3_head)["draft_vocab_size"] == DRAFT_VOCAB
    assert "midlayer.hidden_norm.weight" in load_checkpoint_weights(eagle3_head)
    with pytest.raises(FileNotFoundError):
        load_checkpoint_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(NotImplementedError, match="Sharded checkpoint detected"):
        load_checkpoint_weights(tmp_path)
    assert find_vocab_size({"a": {"vocab_size": 7}}) == 7 and find_vocab_size({"a": {}}) is None
    assert detect_fusion_bias_and_layernorms(["fc.bias", "fc.weight"]) == (True, False)
    assert detect_fusion_bias_and_layernorms(["embed_layernorm.weight"]) == (False, True)


def test_the_command(eagle3_head, tmp_path):
    result = run(
        [
            "convert",
            str(eagle3_head),
            "--verifier",
            VERIFIER,
            "--output",
            str(tmp_path / "out"),
            "--algorithm-kwargs",
            '{"norm_before_residual": true}',
        ]
    )
    assert result["speculators_model_type"] == "eagle3" and result["notes"]
    assert SpeculatorModelConfig.from_pretrained(tmp_path / "out").norm_before_residual
