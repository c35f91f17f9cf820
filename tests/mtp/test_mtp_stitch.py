"""The layer under its family's names, and a verifier's directory with a trained layer in it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from drafter_toys import HIDDEN
from mtp_toys import MIMO_LAYER, make_drafter, save_verifier
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from speculators.cli import app
from speculators.convert import convert_checkpoint
from speculators.models.mtp.checkpoint import stitch
from speculators.models.mtp.families import FAMILIES, export_native, family_of, import_native

NUM_EXPERTS, WIDTH = 3, 5
GATED = "self_attn.q_proj.weight"


def experts(prefix):
    sizes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    return {
        f"{prefix}mlp.experts.{e}.{k}_proj.weight": torch.randn(size)
        for e in range(NUM_EXPERTS)
        for k, size in sizes.items()
    }


def native_layer(prefix, names, decoder=""):
    own = {prefix + name: torch.randn(HIDDEN) for name in names if not name.endswith(("fc.weight", "proj.weight"))}
    own |= {prefix + n: torch.randn(HIDDEN, 2 * HIDDEN) for n in names if n.endswith(("fc.weight", "proj.weight"))}
    return own | {prefix + decoder + GATED: torch.randn(4, HIDDEN)} | experts(prefix + decoder)


QWEN = ["pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight", "norm.weight"]
DEEPSEEK = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"]
MIMO = ["token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight", "final_layernorm.weight"]
OURS = ["token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"]
NATIVE = {
    "qwen3_next": ("mtp.", QWEN, "layers.0."),
    "qwen3_5_moe_text": ("mtp.", QWEN, "layers.0."),
    "deepseek_v3": ("model.layers.7.", DEEPSEEK, ""),
    "glm4_moe": ("model.layers.7.", DEEPSEEK, ""),
    "mimo": ("model.mtp_layers.0.", MIMO, ""),
}


@pytest.mark.parametrize("model_type", NATIVE)
def test_native_names_become_ours_and_come_back_bit_for_bit(model_type):
    prefix, names, decoder = NATIVE[model_type]
    config = SimpleNamespace(model_type=model_type, num_hidden_layers=7)
    native = native_layer(prefix, names, decoder)
    family = family_of(config)
    ours = import_native(native, family, config)
    expected = {f"mtp_layers.0.{name}.weight" for name in OURS} | {f"mtp_layers.0.{GATED}"}
    assert set(ours) == expected | {"mtp_layers.0.mlp.experts.gate_up_proj", "mtp_layers.0.mlp.experts.down_proj"}
    for name, own in zip(names, OURS, strict=True):
        tensor = native[prefix + name]
        if model_type == "mimo" and own == "input_proj":
            tensor = torch.cat((tensor[:, HIDDEN:], tensor[:, :HIDDEN]), dim=1)
        assert torch.equal(ours[f"mtp_layers.0.{own}.weight"], tensor)
    gate_up = ours["mtp_layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.shape == (NUM_EXPERTS, 2 * WIDTH, HIDDEN)
    assert torch.equal(gate_up[2, :WIDTH], native[f"{prefix}{decoder}mlp.experts.2.gate_proj.weight"])
    again = export_native(ours, family, config)
    assert again.keys() == native.keys() and all(torch.equal(again[key], native[key]) for key in native)
    kept = export_native(ours, family, config, fused_experts=True)
    assert prefix + decoder + "mlp.experts.gate_up_proj" in kept and not any(".experts.0." in key for key in kept)


def test_copies_of_embedding_and_head_are_not_part_of_the_layer():
    config = SimpleNamespace(model_type="deepseek_v3", num_hidden_layers=7)
    native = {
        "model.layers.7.embed_tokens.weight": torch.ones(1),
        "model.layers.7.shared_head.head.weight": torch.ones(1),
    }
    assert import_native(native, family_of(config), config) == {}


def test_how_engines_run_each_family():
    """vLLM 0.32: mimo.py, mimo_mtp.py, deepseek_mtp.py, glm4_moe_mtp.py, qwen3_next_mtp.py."""
    flags = {f.name: (f.hidden_first, f.reads_raw_states, f.feeds_back_raw, f.zeroes_first_embedding) for f in FAMILIES}
    assert flags == {
        "qwen": (False, False, False, False),
        "deepseek_v3": (False, False, False, True),
        "glm4_moe": (False, False, True, True),
        "mimo": (True, True, False, True),
        "plain": (False,) * 4,
    }


def test_a_gap_among_the_experts_is_an_error():
    config = SimpleNamespace(model_type="qwen3_next", num_hidden_layers=7)
    native = native_layer("mtp.", QWEN, "layers.0.")
    del native["mtp.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"up_proj of experts \[0, 2\]"):
        import_native(native, family_of(config), config)


# -- stitching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mimo(tmp_path):
    """A verifier in bf16 with notes in its file, and a drafter trained for it."""
    path = save_verifier("qwen2", tmp_path / "mimo")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    (path / "tokenizer.json").write_text("{}")
    drafter = make_drafter(path)
    drafter.save_pretrained(tmp_path / "drafter")
    return path, tmp_path / "drafter", drafter


def shard(path):
    """The same verifier in two files with an index; the MTP layer lies in both."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    weight_map = {}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, path / file, metadata={"format": "pt", "note": "kept"})
        weight_map |= dict.fromkeys(keys, file)
    (path / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(path):
    return {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_mtp_tensors_of_the_copy_differ(mimo, tmp_path, sharded):
    path, trained, drafter = mimo
    if sharded:
        shard(path)
    result = stitch(trained, path, tmp_path / "out")
    before, after = tensors_of(path), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    layer = {key for key in before if key.startswith(MIMO_LAYER)}
    assert set(result.keys) == layer
    assert {key for key in before if not torch.equal(before[key], after[key])} == layer
    ours = {MIMO_LAYER + name: tensor for name, tensor in drafter.mtp_layers[0].state_dict().items()}
    weight = ours[MIMO_LAYER + "input_proj.weight"]
    ours[MIMO_LAYER + "input_proj.weight"] = torch.cat((weight[:, HIDDEN:], weight[:, :HIDDEN]), dim=1)
    for key in layer:
        assert after[key].dtype == torch.bfloat16 and torch.equal(after[key], ours[key].bfloat16()), key
    names = sorted(file.name for file in path.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "out").iterdir())
    for name in set(names) - set(result.files):
        assert (path / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    for name in result.files:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "note": "kept"}


@pytest.mark.parametrize("victim", ["../victim.safetensors", "{folder}/victim.safetensors"])
def test_an_index_names_no_file_outside_that_is_written_to(mimo, tmp_path, victim):
    path, trained, _ = mimo
    shutil.copy(path / "model.safetensors", tmp_path / "victim.safetensors")
    before = (tmp_path / "victim.safetensors").read_bytes()
    shard(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    named = dict.fromkeys(index["weight_map"], victim.format(folder=tmp_path))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(ValueError, match="outside the checkpoint"):
        stitch(trained, path, tmp_path / "out")
    assert (tmp_path / "victim.safetensors").read_bytes() == before and not (tmp_path / "out").exists()


def test_the_command_line_stitches(mimo, tmp_path, capsys):
    path, trained, _ = mimo
    assert app.main(["stitch-mtp", str(trained), str(path), "--output-path", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["verb"] == "stitch-mtp" and record["path"] == str(tmp_path / "out")
    assert len(record["tensors"]) == 16 and record["files"] == ["model.safetensors"]
    assert app.main(["stitch-mtp", str(trained), str(path), "--output-path", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_training_again_starts_from_the_stitched_layer(mimo, tmp_path):
    path, trained, drafter = mimo
    stitch(trained, path, tmp_path / "out")
    again = make_drafter(tmp_path / "out", random=False)
    for name, tensor in drafter.mtp_layers[0].state_dict().items():
        assert torch.equal(again.mtp_layers[0].state_dict()[name], tensor.bfloat16().float())


def test_what_cannot_be_stitched_is_refused_and_leaves_nothing(mimo, tmp_path, verifier_paths):
    path, trained, _ = mimo
    out = tmp_path / "out"

    def refused(match, verifier, finetuned=trained):
        with pytest.raises(ValueError, match=match):
            stitch(finetuned, verifier, out)
        assert not out.exists()

    refused("trained for model_type='qwen2', but .* is 'llama'", verifier_paths["llama"])
    make_drafter(verifier_paths["llama"]).save_pretrained(tmp_path / "plain")
    refused("have no MTP layer of their own", verifier_paths["llama"], tmp_path / "plain")

    bare = tmp_path / "bare"
    shutil.copytree(path, bare)
    tensors = load_file(path / "model.safetensors")
    missing = MIMO_LAYER + "mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != missing}, bare / "model.safetensors")
    refused(r"it lacks \['model.mtp_layers.0.mlp.up_proj.weight'\]", bare)
    save_file({**tensors, MIMO_LAYER + "extra.weight": torch.ones(1)}, bare / "model.safetensors")
    refused(r"the trained layer lacks \['model.mtp_layers.0.extra.weight'\]", bare)
    save_file({**tensors, missing: torch.ones(2, 2)}, bare / "model.safetensors")
    refused(r"up_proj.weight is \[2, 2\] in the verifier", bare)
    save_file({**tensors, missing: tensors[missing].to(torch.float8_e4m3fn)}, bare / "model.safetensors")
    refused("stored as F8_E4M3", bare)
    values = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "fp8"}}))
    refused("is quantised", bare)

    out.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        stitch(trained, path, out)


def test_a_verifier_that_calls_itself_mimo_converts_as_published(tmp_path):
    """transformers has no `mimo`: its layers are Qwen2's."""
    path = save_verifier("qwen2", tmp_path / "mimo")
    values = json.loads((path / "config.json").read_text())
    values |= {"model_type": "mimo", "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}}
    (path / "config.json").write_text(json.dumps(values))
    native = load_file(path / "model.safetensors")
    ours = load_file(convert_checkpoint(path, tmp_path / "out", verifier=str(path)).path / "model.safetensors")
    assert torch.equal(ours["mtp_layers.0.token_layernorm.weight"], native[MIMO_LAYER + "token_layernorm.weight"])
    swapped = native[MIMO_LAYER + "input_proj.weight"].chunk(2, dim=1)
    assert torch.equal(ours["mtp_layers.0.input_proj.weight"], torch.cat(swapped[::-1], dim=1))


def test_the_layer_of_an_fp8_verifier_is_dequantised(tmp_path):
    plain = save_verifier("qwen2", tmp_path / "plain")
    before = convert_checkpoint(plain, tmp_path / "before", verifier=str(plain))
    fp8 = shutil.copytree(plain, tmp_path / "fp8")
    tensors = load_file(fp8 / "model.safetensors")
    name = f"{MIMO_LAYER}mlp.down_proj.weight"
    stored, scale = (tensors[name] * 50).to(torch.float8_e4m3fn), torch.tensor([[0.02]])
    save_file({**tensors, name: stored, name + "_scale_inv": scale}, fp8 / "model.safetensors", {"format": "pt"})
    values = json.loads((fp8 / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (fp8 / "config.json").write_text(json.dumps({**values, "quantization_config": settings}))
    after = convert_checkpoint(fp8, tmp_path / "after", verifier=str(fp8))
    expected, found = (load_file(written.path / "model.safetensors") for written in (before, after))
    expected["mtp_layers.0.mlp.down_proj.weight"] = stored.float() * 0.02
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
