"""Decoding with draft and verify. Start at `Engine`; the loop is `engine.Engine._round`."""

from __future__ import annotations

from speculators.utils.names import lazy_attributes

_HOME = {
    "Engine": "engine",
    "SamplingParams": "settings",
    "SpeculativeConfig": "config",
    "DecodeStats": "stats",
    "RequestOutput": "request",
    "StreamEvent": "request",
    "TokenLogprobs": "request",
    "HFVerifier": "verifiers.hf_verifier",
    "DecodingTarget": "target",
    "open_target": "target",
    "parse_method": "method",
    "parse_methods": "method",
}
__all__ = sorted(_HOME)
# Importing on first use lets the command line read small records without importing transformers.
__getattr__, __dir__ = lazy_attributes(__name__, _HOME)
