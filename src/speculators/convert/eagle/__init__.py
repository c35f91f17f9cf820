"""Public path of earlier releases: the EAGLE-3 converter."""

from speculators.convert.eagle.utils import Eagle3Converter

__all__ = ["Eagle3Converter"]
