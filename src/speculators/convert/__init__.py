"""Converts checkpoints of other projects. Each algorithm's folder reads its own formats; nothing here names an
algorithm except the file that keeps the public names of earlier releases."""

from speculators.convert.entrypoints import (
    ConvertedCheckpoint,
    convert_checkpoint,
    convert_model,
    maybe_convert_external_checkpoint,
    plan_conversion,
)

__all__ = [
    "ConvertedCheckpoint",
    "convert_checkpoint",
    "convert_model",
    "maybe_convert_external_checkpoint",
    "plan_conversion",
]
