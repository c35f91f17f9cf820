"""Reading named tensors from checkpoints, and writing files whole or not at all."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from speculators.utils.files import atomic_directory, atomic_write, finish_dead_writes
from speculators.utils.loading import find_key, is_config_only_dir, list_checkpoint_keys, load_model_layers
from speculators.utils.names import did_you_mean, lazy_attributes, nearest


@pytest.mark.parametrize(
    ("name", "keys", "found"),
    [
        ("lm_head.weight", ["lm_head.weight", "model.lm_head.weight"], "lm_head.weight"),
        ("embed_tokens.weight", ["model.embed_tokens.weight"], "model.embed_tokens.weight"),
        (
            "embed_tokens.weight",
            ["model.language_model.embed_tokens.weight", "model.embed_tokens.weight"],
            "model.embed_tokens.weight",
        ),
        ("embed_tokens.weight", ["mtp.embed_tokens.weight", "model.embed_tokens.weight"], "model.embed_tokens.weight"),
        ("embed_tokens.weight", ["tok_embeddings.weight"], "tok_embeddings.weight"),
        ("embed_tokens.weight", ["backbone.embeddings.weight"], "backbone.embeddings.weight"),
        ("lm_head.weight", ["output.weight"], "output.weight"),
        ("lm_head.weight", ["model.layers.0.attention.output.weight"], None),
        ("lm_head.weight", ["my_lm_head.weight"], None),
        ("model.norm.weight", ["model.layers.0.norm.weight", "model.norm.weight"], "model.norm.weight"),
        ("model.norm.weight", ["language_model.model.norm.weight"], "language_model.model.norm.weight"),
        (
            "model.norm.weight",
            ["layers.0.input_layernorm.weight", "layers.0.norm.weight", "norm.weight"],
            "norm.weight",
        ),
        ("model.norm.weight", ["model.layers.0.input_layernorm.weight"], None),
        ("model.norm.weight", ["llm.backbone.norm_f.weight"], "llm.backbone.norm_f.weight"),
        ("layers.0.norm.weight", ["model.layers.0.norm.weight"], "model.layers.0.norm.weight"),
    ],
)
def test_a_weight_is_found_under_the_names_families_give_it(name, keys, found):
    assert find_key(name, keys) == found


def test_layers_come_back_under_the_names_asked_for(tmp_path, caplog):
    save_file({"model.norm.weight": torch.ones(2), "other": torch.zeros(1)}, tmp_path / "model.safetensors")
    found = load_model_layers(["norm.weight", "lm_head.weight"], tmp_path)
    assert list(found) == ["norm.weight"] and torch.equal(found["norm.weight"], torch.ones(2))
    assert "lm_head.weight" in caplog.text
    with pytest.raises(ValueError, match="has none of the tensors"):
        load_model_layers(["lm_head.weight"], tmp_path)


def test_an_index_whose_shard_is_gone_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="model-00001-of-00001"):
        load_model_layers(["a"], tmp_path)


def test_what_a_checkpoint_directory_holds(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_checkpoint_keys(tmp_path)
    assert not is_config_only_dir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert is_config_only_dir(tmp_path)
    assert not is_config_only_dir("org/name")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert not is_config_only_dir(tmp_path)
    assert sorted(list_checkpoint_keys(tmp_path)) == ["a", "b"]


def test_a_file_is_replaced_only_when_its_block_ends_well(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_write(path, "wb") as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(ValueError, match="mode='a'"), atomic_write(path, "a"):
        pass


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "atomic") as file:
        file.write("")
    with atomic_directory(tmp_path / "folder") as folder:
        save_file({"weight": torch.zeros(2)}, folder / "weights")  # for its owner alone, by itself
    os.mkdir(tmp_path / "plain_folder")
    names = ("plain", "atomic", "folder/weights", "folder", "plain_folder")
    mode = {name: (tmp_path / name).stat().st_mode for name in names}
    assert mode["atomic"] == mode["folder/weights"] == mode["plain"] and mode["folder"] == mode["plain_folder"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt), atomic_directory(path) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_directory(path) as folder:
            (folder / content).write_text("")
    assert [entry.name for entry in path.iterdir()] == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_the_nearest_name():
    assert nearest("Eagel3", ["eagle3", "dflash"]) == "eagle3"
    assert nearest("zzz", ["eagle3"]) is None
    assert did_you_mean("dflsh", ["eagle3", "dflash"]) == " Did you mean 'dflash'?"
    assert did_you_mean("zzz", []) == ""


def test_names_of_a_package_are_imported_on_first_use():
    get, names = lazy_attributes("json", {"JSONDecoder": "decoder", "scanstring": "scanner"})
    assert get("JSONDecoder") is json.decoder.JSONDecoder
    assert names() == ["JSONDecoder", "scanstring"]
    with pytest.raises(AttributeError, match="module 'json' has no attribute 'decoder_of'"):
        get("decoder_of")


@pytest.mark.parametrize(
    "shard",
    [
        "../victim.safetensors",
        "/etc/victim.safetensors",
        "a/../../victim.safetensors",
        "C:\\victim.safetensors",
        "a.py",
    ],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_no_file_outside_its_directory(tmp_path, index, shard):
    save_file({"a": torch.ones(2)}, tmp_path / "victim.safetensors")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / index).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"outside the checkpoint|its shards end in"):
        load_model_layers(["a"], checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{" * 90_000,
        "\xff",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"index\.json"):
        list_checkpoint_keys(tmp_path)


KILLED = """
import os, signal, sys
from speculators.utils.files import atomic_directory, atomic_write
with {how}(sys.argv[1]) as target:
    (target / "half").touch() if isinstance(target, os.PathLike) else target.write("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["atomic_write", "atomic_directory"])
def test_what_a_killed_writer_left_is_written_over_by_the_next(tmp_path, how):
    path = tmp_path / "out"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED.format(how=how), str(path)], check=False)
        assert done.returncode == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.partial"]
    if how == "atomic_write":
        with atomic_write(path) as file:
            file.write("whole")
        assert path.read_text() == "whole"
    else:
        with atomic_directory(path) as folder:
            (folder / "whole").touch()
        assert [entry.name for entry in path.iterdir()] == ["whole"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    with atomic_write(tmp_path / "out") as first, atomic_write(tmp_path / "out") as second:
        first.write("first " * 3)
        second.write("second")
    assert (tmp_path / "out").read_text() == "first first first "
    with atomic_directory(tmp_path / "folder") as one, atomic_directory(tmp_path / "folder") as other:
        assert one != other
        (one / "one").touch()
        (other / "other").touch()
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["one"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "out"]


def kill_in(tmp_path, patched: str, code: str) -> None:
    """Runs `code` in a process that dies, as by `kill -9`, when it would call `patched`."""
    script = (
        "import os, shutil, signal, sys\n"
        "from pathlib import Path\n"
        "from speculators.utils.files import atomic_directory, atomic_write\n"
        "root = Path(sys.argv[1])\n"
        "def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{patched} = die\n{code}\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


FILL = "with atomic_directory(root / 'd') as folder:\n    (folder / 'x').write_text('new')\n"
DIE_AT_SECOND_RENAME = (
    "real = os.rename\n"
    "def rename(source, target):\n"
    "    if Path(target).name == 'd': die()\n"
    "    real(source, target)\n"
    "os.rename = rename\n"
)


def test_a_kill_between_the_two_renames_loses_neither_the_name_nor_the_new_contents(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("old")
    kill_in(tmp_path, "unused", DIE_AT_SECOND_RENAME + FILL)
    assert not (tmp_path / "d").exists()
    [line, removed] = finish_dead_writes(tmp_path, lambda name: name == "d")
    assert "completed" in line and "removed" in removed
    assert (tmp_path / "d" / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("patched", ["shutil.rmtree", "os.fsync", "os.chmod"])
def test_a_kill_anywhere_else_leaves_the_old_or_the_new(tmp_path, patched):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("old")
    kill_in(tmp_path, patched, FILL)
    kill_in(tmp_path, "os.replace", "with atomic_write(root / 'f') as file: file.write('half')")
    finish_dead_writes(tmp_path, lambda name: name in ("d", "f"))
    assert (tmp_path / "d" / "x").read_text() == ("new" if patched == "shutil.rmtree" else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_a_living_process_or_somebody_else_writes_is_left_alone(tmp_path):
    (tmp_path / ".theirs.abcdefgh").write_text("x")
    with atomic_directory(tmp_path / "d") as folder, atomic_write(tmp_path / "f") as file:
        (folder / "x").write_text("new")
        assert finish_dead_writes(tmp_path, lambda name: name in ("d", "f")) == []
        file.write("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".theirs.abcdefgh", "d", "f"]


def test_names_are_on_disk_before_the_next_step(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "x").write_text("new")
    assert [os.path.basename(path) for path in flushed] == ["x", folder.name, tmp_path.name]
