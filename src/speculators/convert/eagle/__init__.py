"""The EAGLE-3 converter of earlier releases."""

from speculators.convert.eagle.eagle3_converter import Eagle3Converter

__all__ = ["Eagle3Converter"]
