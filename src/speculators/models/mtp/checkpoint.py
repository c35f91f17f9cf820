"""MTP on disk: our directory holds the layer alone (embedding, head and final norm are the verifier's and stay there).
vLLM serves the layer inside its verifier's own checkpoint, with method "mtp"."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from speculators.checkpoint.formats import (
    CheckpointContract,
    CheckpointFormat,
    Converted,
    ForeignCheckpoint,
    OurCheckpoint,
    Serving,
    num_speculative_tokens,
)
from speculators.model import SpeculatorModel
from speculators.models.mtp.config import MTPSpeculatorConfig, MTPTrainingArgs
from speculators.models.mtp.families import family_of, native_keys, read_native
from speculators.models.mtp.layer import decoder_shape
from speculators.models.mtp.stitch import stitch
from speculators.training_keys import default_of
from speculators.verifier.config import get_verifier_config, make_speculators_config

STITCHED = "stitched"
CHECKPOINT_KEYS = ("quantization_config",)
"""Keys of a verifier's config that describe its checkpoint, not its layers."""


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

    def write(self, checkpoint: OurCheckpoint, directory: Path, verifier: str | None) -> None:
        if verifier is None:
            raise ValueError("the layer is written into a copy of its verifier: name it with --verifier")
        stitched = stitch(checkpoint.path, verifier, directory / "stitched")
        for file in stitched.path.iterdir():  # `stitch` makes its directory itself
            shutil.move(str(file), directory / file.name)
        stitched.path.rmdir()

    def serving(self, config: Any, directory: str, verifier: str) -> Serving:
        return Serving(directory, {"method": "mtp", "num_speculative_tokens": num_speculative_tokens(config)})


class MTPContract(CheckpointContract):
    formats = (StitchedFormat(),)
    served_format = STITCHED
