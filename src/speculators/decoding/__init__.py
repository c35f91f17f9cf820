"""Decoding with draft and verify. Start at `Engine`; the loop is `engine.Engine._round`."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Engine": "engine",
    "SamplingParams": "sampling",
    "SpeculativeConfig": "config",
    "DecodeStats": "stats",
    "RequestOutput": "request",
    "StreamEvent": "request",
    "TokenLogprobs": "request",
    "HFVerifier": "hf_verifier",
    "DecodingTarget": "target",
    "open_target": "target",
    "parse_method": "method",
    "parse_methods": "method",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import on first use: the command line asks for small records without wanting transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
