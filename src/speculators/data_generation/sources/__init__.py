"""Gives training the verifier's states. Every class is a `speculators.interfaces.HiddenStateSource`.

LocalSource        runs the verifier in this process: no server, no disk
VllmSource         asks a vLLM server that extracts them (`speculators launch-vllm`)
HiddenStateStore   reads and writes files on disk, by row; a source by itself when every row has a file
CachedSource, MemoryCachedSource, StoredOrComputedSource    keep what another source computes (see `cached.py`)
"""

from speculators.data_generation.offline import CorruptHiddenStatesError, estimate_bytes
from speculators.data_generation.sources.cached import CachedSource, MemoryCachedSource, StoredOrComputedSource
from speculators.data_generation.sources.local import LocalSource
from speculators.data_generation.sources.store import HiddenStateStore, StoragePlan
from speculators.data_generation.sources.vllm import VllmSource

__all__ = [
    "CachedSource",
    "CorruptHiddenStatesError",
    "HiddenStateStore",
    "LocalSource",
    "MemoryCachedSource",
    "StoragePlan",
    "StoredOrComputedSource",
    "VllmSource",
    "estimate_bytes",
]
