"""Every fault of a source, in every format: named, exit code 1, and no directory is left."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from deploy_toys import HIDDEN, VERIFIER, as_older_release, edit_config, edit_tensors, save
from mtp_toys import save_verifier

from speculators.cli.app import main
from speculators.deploy.export import export_checkpoint

EAGLE3_IDS = "eagle_aux_hidden_state_layer_ids"
MATRICES = {
    "eagle3": "midlayer.self_attn.k_proj.weight",
    "peagle": "midlayer.mlp.up_proj.weight",
    "dflash": "layers.0.mlp.up_proj.weight",
    "dspark": "markov_head.markov_w2.weight",
    "dspark of SpecForge": "layers.0.self_attn.o_proj.weight",
    "eagle": "layers.0.mlp.down_proj.weight",
    "medusa": "blocks.1.layers.0.weight",
    "medusa as published": "1.0.linear.weight",
    "mlp": "speculator.ln.0.weight",
    "mtp": "model.mtp_layers.0.mlp.up_proj.weight",
    "0.2": "layers.0.self_attn.q_proj.weight",
}
"""A format -> the tensor that is spoiled."""
OPTIONS = {
    "eagle3": ("norm_befor_fc", "norm_before_fc"),
    "peagle": ("mask_tokn_id", "mask_token_id"),
    "dflash": ("mask_tokens_id", "mask_token_id"),
    "dspark": ("aux_hidden_state_layer_id", "aux_hidden_state_layer_ids"),
    "dspark of SpecForge": ("mask_token_ids", "mask_token_id"),
    "eagle": ("norm_before_fc", "it takes none"),
    "medusa": ("num_head", "it takes none"),
    "medusa as published": ("num_head", "it takes none"),
    "mlp": ("n_predict", "it takes none"),
    "mtp": ("num_speculative_step", "num_speculative_steps"),
    "0.2": ("eagle_aux_hidden_state_layer_id", EAGLE3_IDS),
}
"""A format -> an option that it does not have, and what is said."""


def published_medusa(path: Path) -> Path:
    """The file of the heads alone, under the names of their authors."""
    torch.manual_seed(0)
    path.mkdir()
    tensors = {}
    for i in range(2):
        tensors |= {f"{i}.0.linear.weight": torch.randn(HIDDEN, HIDDEN), f"{i}.0.linear.bias": torch.randn(HIDDEN)}
        tensors[f"{i}.1.weight"] = torch.randn(4096, HIDDEN)
    torch.save(tensors, path / "medusa_lm_head.pt")
    (path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    return path


def of_specforge(path: Path) -> None:
    own = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")

    def change(values):
        nested = {key: values.pop(key) for key in (*own, "mask_token_id", "target_layer_ids")}
        values["dflash_config"] = {"projector_type": "dspark", "attention_mode": "gqa", **nested}
        values["architectures"] = ["DSparkDraftModel"]

    edit_config(path, change)


@pytest.fixture(scope="session")
def sources(trained, tmp_path_factory):
    """format -> a right directory, not to be changed, and its verifier"""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def get(name: str) -> tuple[Path, str]:
        if name in made:
            return made[name]
        path, verifier = root / name.replace(" ", "-"), VERIFIER
        if name == "mtp":
            verifier = str(save_verifier("qwen2", path))
        elif name == "0.2":
            as_older_release("eagle3", path)
        elif name == "medusa as published":
            published_medusa(path)
        else:
            export_checkpoint(trained(name.split()[0]), path, profile="native", verifier=VERIFIER)
            (path / "training_record.json").unlink()
            if name == "dspark of SpecForge":
                of_specforge(path)
        made[name] = path, verifier
        return made[name]

    return get


def change_tensors(path: Path, change) -> None:
    file = path / "medusa_lm_head.pt"
    if not file.exists():
        edit_tensors(path, change)
        return
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)


def changed(change):
    """A fault of one tensor: `change` gets it and returns the one to store."""

    def spoil(path, name):
        change_tensors(path, lambda tensors: tensors.update({name: change(tensors[name])}))

    return spoil


def with_value(tensor, value):
    tensor.view(-1)[1:4] = value
    return tensor


def truncate(path, name):
    for file in (*path.glob("*.safetensors"), *path.glob("*.pt")):
        file.write_bytes(file.read_bytes()[:-64])


def spoil_json(path, name):
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text[: len(text) // 2])


FAULTS = {
    "a tensor is missing": lambda path, name: change_tensors(path, lambda tensors: tensors.pop(name)),
    "a tensor more": lambda path, name: change_tensors(
        path, lambda tensors: tensors.update({name.replace(".weight", ".surplus"): torch.ones(3)})
    ),
    "another shape": changed(lambda tensor: tensor[:-1].clone()),
    "NaN": changed(lambda tensor: with_value(tensor, float("nan"))),
    "infinite": changed(lambda tensor: with_value(tensor, float("inf"))),
    "whole numbers": changed(lambda tensor: tensor.mul(100).to(torch.int8)),
    "half a file": truncate,
    "half a config.json": spoil_json,
}
"""What is done to the directory, given the name of its tensor that is spoiled."""
FILES = {"half a file": r"(safetensors|pt)'", "half a config.json": "config.json"}


LAYERED = ("eagle3", "peagle", "dflash", "dspark", "dspark of SpecForge", "eagle")
CONFIG_FAULTS = {
    "hidden_size is text": (LAYERED, {"hidden_size": "wide"}, "hidden_size"),
    "heads that do not divide": (LAYERED, {"num_attention_heads": 7}, "attention heads|self_attn"),
    "no such activation": (LAYERED, {"hidden_act": "sillu"}, "hidden_act|sillu"),
    "an option that changes the function": (LAYERED, {"use_qk_norm": True}, "use_qk_norm"),
    "layers that are not there": (LAYERED, {"num_hidden_layers": 3}, "num_hidden_layers|layers"),
    "block_size is text": (("dflash", "dspark"), {"block_size": "x"}, "block_size"),
    "block_size is zero": (("dflash", "dspark"), {"block_size": 0}, "block_size"),
    "mask token is text": (("peagle", "dspark"), {"mask_token_id": "x"}, "mask_token_id"),
    "ids are text": (("eagle3", "peagle"), {EAGLE3_IDS: ["a", "b", "c"]}, EAGLE3_IDS),
    "ids decrease": (("eagle3", "peagle"), {EAGLE3_IDS: [9, 6, 2]}, "layer ids|" + EAGLE3_IDS),
    "ids are negative": (("eagle3", "peagle"), {EAGLE3_IDS: [-1, 6, 9]}, "-1"),
    "more ids than fc reads": (("eagle3", "peagle"), {EAGLE3_IDS: [2, 4, 6, 9]}, "fc"),
    "ids of blocks are text": (("dspark",), {"target_layer_ids": ["a", "b", "c"]}, "target_layer_ids|layer_ids"),
    "no such Markov head": (("dspark",), {"markov_head_type": "hidden"}, "markov_head_type"),
    "heads that are not there": (("mlp",), {"tie_weights": False}, "emb|head|proj"),
    "n_predict is text": (("mlp",), {"n_predict": "x"}, "n_predict|num_layers"),
    "another inner width": (("mlp",), {"inner_dim": 32}, "intermediate_size|emb|proj"),
    "another vocabulary of the draft": (("eagle3", "peagle"), {"draft_vocab_size": 512}, "lm_head|d2t"),
}
"""What is wrong in config.json -> the formats, the change, and a pattern of what is said."""


@pytest.mark.parametrize(("fault", "kind"), [(f, kind) for f in CONFIG_FAULTS for kind in CONFIG_FAULTS[f][0]])
def test_a_wrong_value_of_config_json_is_refused_by_name(fault, kind, sources, tmp_path, capsys):
    source, verifier = sources(kind)
    path = Path(shutil.copytree(source, tmp_path / "source"))
    _, change, pattern = CONFIG_FAULTS[fault]
    edit_config(path, lambda values: values.update(change))
    said = refused(path, verifier, tmp_path, capsys)
    assert re.search(pattern, said.replace(str(path), "")), said


def name_of(fault: str, name: str) -> str:
    """A pattern of what must be named: the file, or the tensor, whose last parts no format renames."""
    if fault in FILES:
        return FILES[fault]
    if name == MATRICES["medusa as published"]:
        return r"blocks\.1\.layers\.0\.|1\.0\.linear\."
    last = ".".join(name.split(".")[-2:])
    return re.escape(last.replace("weight", "surplus") if fault == "a tensor more" else last)


def refused(path, verifier, tmp_path, capsys, *flags) -> str:
    code = main(["convert", str(path), "--verifier", verifier, "--output", str(tmp_path / "out"), *flags])
    said = capsys.readouterr()
    assert code == 1, said
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, "verifier"}
    assert "may be a defect" not in said.err, said.err
    return " ".join(said.err.split())


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoiled_source_is_refused_by_name(fault, kind, sources, tmp_path, capsys):
    source, verifier = sources(kind)
    path = Path(shutil.copytree(source, tmp_path / "source"))
    FAULTS[fault](path, MATRICES[kind])
    said = refused(path, verifier, tmp_path, capsys)
    assert re.search(name_of(fault, MATRICES[kind]), said), said


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("sizes", [{"vocab_size": 5000}, {"hidden_size": 128}], ids=lambda sizes: next(iter(sizes)))
def test_a_source_of_another_verifier_is_refused(sizes, kind, sources, tmp_path, capsys):
    source, verifier = sources(kind)
    path = Path(shutil.copytree(source, tmp_path / "source"))
    values = {**json.loads((Path(verifier) / "config.json").read_text()), **sizes}
    embedding = torch.ones(values["vocab_size"], values["hidden_size"], dtype=torch.bfloat16)
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    save(tmp_path / "verifier", values, weights | {"model.norm.weight": embedding[0].clone()})
    said = refused(path, str(tmp_path / "verifier"), tmp_path, capsys)
    assert str(next(iter(sizes.values()))) in said


@pytest.mark.parametrize("kind", MATRICES)
def test_an_unknown_option_is_refused_with_what_there_is(kind, sources, tmp_path, capsys):
    source, verifier = sources(kind)
    path = Path(shutil.copytree(source, tmp_path / "source"))
    option, instead = OPTIONS[kind]
    said = refused(path, verifier, tmp_path, capsys, "--algorithm-kwargs", json.dumps({option: 1}))
    assert repr(option) in said and instead in said
