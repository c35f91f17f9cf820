"""MTP on disk: our directory holds the layer alone (embedding, head and final norm are the verifier's and stay there).
vLLM serves the layer inside its verifier's own checkpoint, with method "mtp": `stitch` writes it into a copy of it.

The native tensors are overwritten in place in the copied files: same names, shapes and types, so that every other byte
of the directory (other tensors, metadata, index, config) is the verifier's.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speculators.checkpoint.formats import (
    CheckpointContract,
    CheckpointFormat,
    Converted,
    DirectoryContents,
    ForeignCheckpoint,
    OurCheckpoint,
    Serving,
    num_speculative_tokens,
)
from speculators.checkpoint.tensors import SIZE_BYTES, WRITTEN_TYPES, bytes_of, stored_tensors
from speculators.model import SpeculatorModel
from speculators.models.mtp.config import MTPSpeculatorConfig, MTPTrainingArgs
from speculators.models.mtp.families import GATE_UP, LAYER, export_native, family_of, native_keys, read_native
from speculators.models.mtp.network import decoder_shape
from speculators.training_keys import default_of
from speculators.utils.files import atomic_directory
from speculators.utils.loading import SAFETENSORS, SAFETENSORS_INDEX, read_index
from speculators.verifier.config import get_verifier_config, make_speculators_config, open_verifier_config, text_config

STITCHED = "stitched"
CHECKPOINT_KEYS = ("quantization_config",)
"""Keys of a verifier's config that describe its checkpoint, not its layers."""
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
"""What a verifier has in common with the model that an MTP layer was made for."""
DTYPES = {name: dtype for dtype, name in WRITTEN_TYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}
"""Types of stored weights that can be written."""


def verifier_layer_config(verifier_config: Any) -> Any:
    """Copies the verifier's text config as our config.json holds it."""
    config = copy.deepcopy(verifier_config)
    decoder_shape(config)  # refuses families without layers here
    for key in CHECKPOINT_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    return config


class StitchedFormat(CheckpointFormat):
    name = STITCHED
    needs_verifier = True
    options = ("num_speculative_steps",)

    def recognises(self, source: ForeignCheckpoint) -> bool:
        """A whole verifier that ships an MTP layer, or the layer's tensors with the verifier's config."""
        if not source.values.get("model_type"):
            return False
        try:
            config = get_verifier_config(str(source.path))
            return bool(native_keys(source.tensor_names, family_of(config), config))
        except ValueError:  # a family without MTP layers, or no language model
            return False

    def read(self, source: ForeignCheckpoint, verifier: str | None, **options: Any) -> Converted:
        nested = verifier_layer_config(get_verifier_config(verifier or str(source.path)))
        refuse_other_sizes(get_verifier_config(str(source.path)), nested, verifier)
        family = family_of(nested)
        tensors = read_native(str(source.path), family, nested)
        if not tensors:
            raise ValueError(
                f"'{source.path}' has no tensors under {family.native_prefix(nested)}: it ships no MTP layer"
            )
        config = MTPSpeculatorConfig(
            transformer_layer_config=nested,
            speculators_config=make_speculators_config(
                "mtp",
                options.get("num_speculative_steps", default_of(MTPTrainingArgs, "num_speculative_steps")),
                verifier or str(source.path),
            ),
        )
        odd = sorted(SpeculatorModel.expected_tensors(config).keys() ^ tensors.keys())
        if odd:
            raise ValueError(f"the MTP layer of '{source.path}' is not of its family: {odd} do not belong or lack")
        return Converted(config, tensors)

    def contents(self, checkpoint: OurCheckpoint, verifier: str | None) -> DirectoryContents:
        if verifier is None:
            raise ValueError("the layer is written into a copy of its verifier: name it with --verifier")
        return stitched_contents(*read_layer(checkpoint.path), local_directory(verifier))

    def serving(self, config: Any, directory: str, verifier: str) -> Serving:
        return Serving(directory, {"method": "mtp", "num_speculative_tokens": num_speculative_tokens(config)})


def refuse_other_sizes(own: Any, nested: Any, verifier: str | None) -> None:
    """Raises `ValueError` when the verifier is not of the kind that the layer is a part of."""
    for key in SIZES:
        here, there = getattr(own, key, None), getattr(nested, key, None)
        if here != there:
            raise ValueError(
                f"{key} of the checkpoint is {here!r}, and {there!r} of the verifier {verifier!r}: its MTP layer is of "
                "another model; name the verifier that it was made for"
            )


class MTPContract(CheckpointContract):
    formats = (StitchedFormat(),)
    served_format = STITCHED


@dataclass(frozen=True)
class StitchedContents(DirectoryContents):
    """A verifier's directory, with the layer's tensors over its own."""

    source: Path
    """The verifier's directory."""
    places: Mapping[str, tuple[dict[str, Any], int]]
    """Of each file with tensors of the layer: their entries, and the byte where data start."""

    def write(self, directory: Path) -> None:
        shutil.copytree(self.source, directory, dirs_exist_ok=True)
        for name, (entries, start) in self.places.items():
            overwrite(directory / name, self.tensors, entries, start)


@dataclass(frozen=True)
class Stitched:
    """The written directory."""

    path: Path
    keys: tuple[str, ...]
    """Native tensors that were replaced."""
    files: tuple[str, ...]
    """Files they lie in; all others are the verifier's, byte for byte."""


def stitch(
    finetuned: str | os.PathLike, verifier: str | os.PathLike, output_path: str | os.PathLike | None = None
) -> Stitched:
    """Copies the directory of `verifier` to `output_path` (default: `<verifier's name>-stitched` here) and writes the
    layer of the MTP checkpoint `finetuned` into it."""
    config, layer = read_layer(finetuned)
    source = local_directory(verifier)
    output = Path(output_path) if output_path is not None else Path(f"{source.name}-stitched")
    if output.exists():
        raise ValueError(f"output path {output} exists already; name a new directory")
    contents = stitched_contents(config, layer, source)
    with atomic_directory(output) as folder:
        contents.write(folder)
    return Stitched(output, tuple(sorted(contents.tensors)), tuple(contents.places))


def read_layer(finetuned: str | os.PathLike) -> tuple[MTPSpeculatorConfig, dict[str, Tensor]]:
    config = MTPSpeculatorConfig.from_pretrained(finetuned)
    if not isinstance(config, MTPSpeculatorConfig):
        raise ValueError(f"'{finetuned}' is a speculator of another kind; only an MTP layer is part of a verifier")
    return config, {key: tensor for key, tensor in stored_tensors(finetuned).items() if key.startswith(LAYER)}


def stitched_contents(config: MTPSpeculatorConfig, layer: Mapping[str, Tensor], source: Path) -> StitchedContents:
    """Puts a layer into the verifier of the directory `source`, under its names and in its types. Raises `ValueError`
    unless the verifier has a place for each tensor."""
    file_of = weight_map(source)
    native = native_layer(layer, config, source, set(file_of))
    headers = {name: read_header(source / name) for name in sorted({file_of[key] for key in native})}
    absent = sorted(key for key in native if key not in headers[file_of[key]][0])
    if absent:
        raise ValueError(f"the index of verifier '{source}' names files that lack {absent}: fetch the verifier again")
    entries = {key: headers[file_of[key]][0][key] for key in native}
    tensors = {key: fitted(key, tensor, entries[key]) for key, tensor in native.items()}
    places = {name: ({k: e for k, e in entries.items() if file_of[k] == name}, headers[name][1]) for name in headers}
    return StitchedContents(tensors, ForeignCheckpoint(source).values, source, places)


def local_directory(verifier: str | os.PathLike) -> Path:
    return Path(verifier).resolve() if Path(verifier).is_dir() else Path(snapshot_download(str(verifier)))


def weight_map(directory: Path) -> dict[str, str]:
    """tensor name -> file name"""
    if (directory / SAFETENSORS_INDEX).is_file():
        return read_index(directory / SAFETENSORS_INDEX)
    if (directory / SAFETENSORS).is_file():
        return dict.fromkeys(read_header(directory / SAFETENSORS)[0], SAFETENSORS)
    raise ValueError(f"verifier '{directory}' has no {SAFETENSORS}: only safetensors can be written into")


def native_layer(
    layer: Mapping[str, Tensor], config: MTPSpeculatorConfig, directory: Path, keys: set[str]
) -> dict[str, Tensor]:
    """Renames the layer to the verifier's names. Raises `ValueError` unless the verifier has exactly these tensors."""
    whole_config = open_verifier_config(str(directory))
    verifier_config: Any = text_config(whole_config)
    if any(getattr(part, "quantization_config", None) for part in (whole_config, verifier_config)):
        raise ValueError(f"verifier '{directory}' is quantised: weights cannot replace its scaled ones")
    trained_for = config.transformer_layer_config.model_type
    if verifier_config.model_type != trained_for:
        raise ValueError(
            f"the MTP layer was trained for model_type={trained_for!r}, but '{directory}' is "
            f"{verifier_config.model_type!r}; stitch it into the verifier it was trained for"
        )
    family = family_of(verifier_config)
    is_fused = any(key.endswith(GATE_UP) for key in native_keys(keys, family, verifier_config))
    native = export_native(layer, family, verifier_config, fused_experts=is_fused)
    there = set(native_keys(keys, family, verifier_config))
    if native.keys() != there:
        raise ValueError(
            f"verifier '{directory}' has not the MTP tensors of the trained layer: it lacks "
            f"{sorted(native.keys() - there)}, the trained layer lacks {sorted(there - native.keys())}"
        )
    return native


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns the entry of each tensor and the byte where data start. Raises `ValueError` for a damaged file."""
    try:
        with safe_open(file, framework="pt"):  # checks every entry against the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"'{file}' cannot be read ({error}); it is incomplete or damaged, fetch it again") from error
    with file.open("rb") as reader:
        size = int.from_bytes(reader.read(SIZE_BYTES), "little")
        header = json.loads(reader.read(size))
    header.pop("__metadata__", None)
    return header, SIZE_BYTES + size


def fitted(key: str, tensor: Tensor, entry: dict[str, Any]) -> Tensor:
    """Returns a tensor in the type of its place. Raises `ValueError` for one of another shape, or a place for scaled
    values."""
    if list(tensor.shape) != entry["shape"]:
        raise ValueError(
            f"{key} is {entry['shape']} in the verifier and {list(tensor.shape)} in the trained layer; stitch it into "
            "the verifier it was trained for"
        )
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key} is stored as {entry['dtype']}; only {sorted(DTYPES)} can be written (not quantised)")
    return tensor.to(DTYPES[entry["dtype"]])


def overwrite(file: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Any], start: int) -> None:
    with file.open("r+b") as writer:
        for key, entry in entries.items():
            begin, end = entry["data_offsets"]
            writer.seek(start + begin)
            num_bytes = sum(writer.write(block) for block in bytes_of(tensors[key]))
            assert num_bytes == end - begin
