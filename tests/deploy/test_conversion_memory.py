"""Tensors of checkpoints are read when they are needed: a large checkpoint is converted with little memory, and what is
written is what safetensors writes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deploy_toys import HIDDEN, LAYERS, VERIFIER, VOCAB, WIDTH, edit_tensors, layer
from safetensors.torch import load_file, save_file

from speculators.checkpoint.tensors import StoredTensor, stored_tensors, values_of, write_tensors
from speculators.cli.app import run
from speculators.convert import convert_checkpoint
from speculators.deploy.export import export_checkpoint, plan_export
from speculators.utils.loading import load_model_layers

NUM_SHARDS, WIDE = 10, 3072
PEAKS = """
import sys
from pathlib import Path
from speculators.convert import convert_checkpoint
from speculators.deploy.export import export_checkpoint

def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

*sources, out, verifier = sys.argv[1:]
for source in sources:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, name = memory("VmRSS"), Path(source).name
    written = convert_checkpoint(source, f"{out}/{name}-ours", verifier=verifier)
    export_checkpoint(written.path, f"{out}/{name}-native", profile="native", dtype="float32")
    print(name, memory("VmHWM") - before)
"""


def block_drafter(path: Path, num_layers: int, kind: str) -> Path:
    """A z-lab drafter with one layer per shard."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(WIDE * HIDDEN, generator=generator).bfloat16()
    weight_map, suffix = {}, ".bin" if kind == "bin" else ".safetensors"
    for i in range(num_layers):
        tensors = {name: tensor.bfloat16() for name, tensor in layer(f"layers.{i}.", HIDDEN).items()}
        tensors |= {f"layers.{i}.self_attn.{part}_norm.weight": torch.ones(WIDTH).bfloat16() for part in "qk"}
        parts = [tensors.pop(f"layers.{i}.self_attn.{part}_proj.weight") for part in "qkv"]
        tensors[f"layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(parts)
        for part in ("gate", "up"):
            tensors[f"layers.{i}.mlp.{part}_proj.weight"] = wide.reshape(WIDE, HIDDEN).clone()
        tensors[f"layers.{i}.mlp.down_proj.weight"] = wide.reshape(HIDDEN, WIDE).clone()
        if i == 0:
            tensors |= {"fc.weight": torch.randn(HIDDEN, 2 * HIDDEN).bfloat16()}
            tensors |= {f"{name}.weight": torch.ones(HIDDEN).bfloat16() for name in ("hidden_norm", "norm")}
        file = f"shard-{i}{suffix}"
        (torch.save if kind == "bin" else save_file)(tensors, path / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (path / index).write_text(json.dumps({"weight_map": weight_map}))
    values = {
        **LAYERS,
        "intermediate_size": WIDE,
        "num_hidden_layers": num_layers,
        "model_type": "qwen3",
        "architectures": ["DFlashDraftModel"],
        "vocab_size": VOCAB,
        "block_size": 6,
        "dflash_config": {"target_layer_ids": [1, 8], "mask_token_id": 7},
    }
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_conversion_and_an_export_hold_less_than_half_of_the_checkpoint(tmp_path):
    """A shard at a time takes some two of ten; the allocator keeps up to two more from run to run."""
    sources = [block_drafter(tmp_path / name, 1, "bin") for name in ("imports", "base")]
    sources += [block_drafter(tmp_path / kind, NUM_SHARDS, kind) for kind in ("safetensors", "bin")]
    command = [sys.executable, "-c", PEAKS, *map(str, sources), str(tmp_path), VERIFIER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = {name: int(peak) for name, peak in map(str.split, done.stdout.splitlines())}
    shard = max(file.stat().st_size for file in sources[-1].glob("shard-*"))
    assert max(peaks["safetensors"], peaks["bin"]) - peaks["base"] < NUM_SHARDS // 2 * shard, peaks


EVERY_TYPE = {
    "half": torch.arange(6).half().reshape(2, 3),
    "brain": torch.randn(4, 2).bfloat16(),
    "single": torch.randn(3, 2),
    "double": torch.randn(1).double(),
    "ids": torch.arange(5),
    "kept": torch.tensor([True, False, True]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "short": torch.arange(3, dtype=torch.int16),
    "int": torch.arange(3, dtype=torch.int32),
    "narrow": torch.randn(3).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
    "a number": torch.tensor(2.5),
    "ä": torch.ones(1),
    "turned": torch.randn(3, 4).t(),
}


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    names = list(EVERY_TYPE)
    random.Random(0).shuffle(names)
    write_tensors(tmp_path, {name: EVERY_TYPE[name] for name in names})
    whole = {name: tensor.contiguous() for name, tensor in EVERY_TYPE.items()}
    save_file(whole, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"odd is torch\.complex128"):
        write_tensors(tmp_path, {"odd": torch.ones(1, dtype=torch.complex128)})


@pytest.mark.parametrize("is_zip", [True, False, None], ids=["bin", "bin of old releases", "safetensors"])
def test_stored_tensors_compute_as_those_in_memory_and_know_where_they_come_from(is_zip, tmp_path):
    torch.manual_seed(0)
    whole = {"a": torch.randn(4, 6), "b": torch.randn(4, 6), "ids": torch.arange(3)}
    if is_zip is None:
        save_file(whole, tmp_path / "model.safetensors")
    else:
        torch.save(whole, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    found = stored_tensors(tmp_path)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in whole.items()
    }
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert found["ids"].any() and found["a"].device.type == "cpu"
    a, b = found["a"], found["b"]
    moves = {
        ("split",): (a.split([1, 3])[1], whole["a"][1:]),
        ("cast from float32",): (a.to(torch.bfloat16), whole["a"].bfloat16()),
        ("joined",): (torch.cat([a, b], dim=1), torch.cat([whole["a"], whole["b"]], dim=1)),
        ("split", "cast from float32", "joined"): (
            torch.stack([a.chunk(2)[0].to(torch.float16), b.chunk(2)[1].to(torch.float16)]),
            torch.stack([whole["a"][:2], whole["b"][2:]]).half(),
        ),
        (): (a.contiguous(), whole["a"]),
    }
    for steps, (moved, expected) in moves.items():
        assert moved.shape == expected.shape and moved.dtype == expected.dtype
        assert torch.equal(values_of(moved), expected)
        if isinstance(moved, StoredTensor):
            assert moved.origin.steps == steps
    assert a.to(torch.float32) is a and isinstance(moves["joined",][0], StoredTensor)
    assert moves["joined",][0].origin.names == ("a", "b")
    (tmp_path / "out").mkdir()
    write_tensors(tmp_path / "out", {"x": moves["joined",][0], "y": moves["cast from float32",][0]})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["x"], moves["joined",][1]) and torch.equal(written["y"], moves["cast from float32",][1])
    assert stored_tensors(tmp_path, ["b", "none"]).keys() == {"b"}


# -- what would be written


def planned(source: Path, tmp_path: Path, verifier: str = VERIFIER) -> dict:
    before = sorted(tmp_path.rglob("*"))
    record = run(["convert", str(source), "--verifier", verifier, "--output", str(tmp_path / "out"), "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
    return record


def test_a_dry_run_says_of_each_tensor_what_becomes_of_it_and_writes_nothing(eagle3_head, tmp_path):
    theirs = load_model_layers(["embed_tokens.weight", "lm_head.weight"], VERIFIER)
    inv_freq = 5e5 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    extra = {
        "midlayer.self_attn.q_proj.bias": torch.ones(HIDDEN),
        "midlayer.self_attn.rotary_emb.inv_freq": inv_freq,
        "verifier_lm_head.weight": theirs.get("lm_head.weight", theirs["embed_tokens.weight"]),
    }
    edit_tensors(eagle3_head, lambda tensors: tensors.update(extra))
    record = planned(eagle3_head, tmp_path)
    assert record["dry_run"] and (record["source_format"], record["format"]) == ("eagle3", "speculators")
    by_name = {entry["written"] or entry["source"][0]: entry for entry in record["tensors"]}
    how = {name: entry["how"] for name, entry in by_name.items()}
    assert how["fc.weight"] == "copied" and how["embed_tokens.weight"].startswith("copied from the verifier's")
    assert by_name["layers.0.self_attn.q_proj.weight"] == {
        "source": ["midlayer.self_attn.q_proj.weight"],
        "written": "layers.0.self_attn.q_proj.weight",
        "shape": [HIDDEN, 2 * HIDDEN],
        "dtype": "float32",
        "how": "renamed",
    }
    assert how["layers.0.self_attn.o_proj.bias"] == "zeros, which the source leaves out"
    assert how["verifier_lm_head.weight"] == "left out: a copy of the verifier's, compared value by value"
    assert how["midlayer.self_attn.rotary_emb.inv_freq"] == "left out: it follows from config.json"
    written = convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER)
    assert load_file(written.path / "model.safetensors").keys() == {
        entry["written"] for entry in record["tensors"] if entry["written"]
    }


def test_a_dry_run_refuses_what_the_conversion_would(eagle3_head, tmp_path):
    edit_tensors(eagle3_head, lambda tensors: tensors["fc.weight"][0].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"fc\.weight: 256|fc\.weight.*NaN"):
        planned(eagle3_head, tmp_path)


def test_a_plan_names_what_is_split(tmp_path):
    source = block_drafter(tmp_path / "fused", 1, "bin")
    how = {entry["written"]: (entry["source"], entry["how"]) for entry in planned(source, tmp_path)["tensors"]}
    fused = ["layers.0.self_attn.qkv_proj.weight"]
    assert how["layers.0.self_attn.k_proj.weight"] == (fused, "renamed, split")


@pytest.mark.parametrize(("case", "engine"), [("eagle3", "speculators"), ("eagle3", "native"), ("medusa", "vllm-0.32")])
def test_the_dry_run_of_an_export_is_what_the_export_writes(case, engine, copy_of, tmp_path):
    source = copy_of(case)
    before = sorted(tmp_path.rglob("*"))
    command = ["export", str(source), "--output", str(tmp_path / "out"), "--engine", engine, "--dtype", "float16"]
    record = run([*command, "--dry-run"])
    assert record["dry_run"] and sorted(tmp_path.rglob("*")) == before
    written = run(command)
    assert (record["format"], record["source_format"]) == (written["format"], "speculators")
    tensors = {name: (list(t.shape), t.dtype) for name, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    plan = [entry for entry in record["tensors"] if entry["written"]]
    assert {entry["written"]: (entry["shape"], getattr(torch, entry["dtype"])) for entry in plan} == tensors
    assert {name for entry in plan for name in entry["source"]} <= load_file(source / "model.safetensors").keys()
    assert all("cast from" in entry["how"] for entry in plan if entry["dtype"] == "float16" and entry["source"])
    left_out = {entry["source"][0] for entry in record["tensors"] if not entry["written"]}
    assert left_out == set(load_file(source / "model.safetensors")) - {n for entry in plan for n in entry["source"]}


def test_the_dry_run_of_an_export_refuses_what_the_export_would(copy_of, tmp_path):
    source = copy_of("eagle3")
    edit_tensors(source, lambda tensors: tensors["fc.weight"][0].fill_(float("nan")))
    for engine in ("speculators", "native"):
        with pytest.raises(ValueError, match=r"(?s)nothing was written.*NaN") as planned:
            plan_export(source, tmp_path / "out", engine=engine)
        with pytest.raises(ValueError) as exported:
            export_checkpoint(source, tmp_path / "out", engine=engine)
        assert "fc.weight" in str(planned.value) and str(planned.value) == str(exported.value)
    assert not (tmp_path / "out").exists()
