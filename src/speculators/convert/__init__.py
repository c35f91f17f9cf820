"""Checkpoints of other projects, as speculators. Formats are read by their algorithms' folders; nothing here names one
but the modules that keep the public names of earlier releases (`eagle`, `mtp`, `dflash`)."""

from speculators.convert.entrypoints import (
    ConvertedCheckpoint,
    convert_checkpoint,
    convert_model,
    maybe_convert_external_checkpoint,
)

__all__ = ["ConvertedCheckpoint", "convert_checkpoint", "convert_model", "maybe_convert_external_checkpoint"]
