"""The EAGLE-3 converter of earlier releases."""

from speculators.convert.eagle.utils import Eagle3Converter

__all__ = ["Eagle3Converter"]
