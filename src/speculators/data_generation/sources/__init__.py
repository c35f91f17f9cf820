"""Where training gets the verifier's states from. All are `speculators.interfaces.HiddenStateSource`s.

LocalSource        runs the verifier in this process: no server, no disk
CachedSource       the same, each row computed once and kept in a HiddenStateStore
VllmSource         asks a vLLM server that extracts them (`speculators launch-vllm`)
HiddenStateStore   files on disk, by row; also a source by itself when every row is there
"""

from speculators.data_generation.sources.cached import CachedSource
from speculators.data_generation.sources.codec import CorruptHiddenStatesError, estimate_bytes
from speculators.data_generation.sources.local import LocalSource
from speculators.data_generation.sources.store import HiddenStateStore, StoragePlan
from speculators.data_generation.sources.vllm import VllmSource

__all__ = [
    "CachedSource",
    "CorruptHiddenStatesError",
    "HiddenStateStore",
    "LocalSource",
    "StoragePlan",
    "VllmSource",
    "estimate_bytes",
]
