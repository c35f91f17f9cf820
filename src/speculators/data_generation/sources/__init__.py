"""Gives training the verifier's states. Every class is a `speculators.interfaces.HiddenStateSource`.

LocalSource        runs the verifier in this process: no server, no disk
VllmSource         asks a vLLM server that extracts them (`speculators launch-vllm`)
BalancedSource     asks several of them, and another one where one fails
ShardedStore       reads and writes large shards on disk; a source by itself when every row is stored
HiddenStateStore   the same with a file per row, as earlier releases and other tools write them
CachedSource, MemoryCachedSource, StoredOrComputedSource    keep what another source computes
"""

from speculators.data_generation.offline import CorruptHiddenStatesError, estimate_bytes
from speculators.data_generation.sources.cached import CachedSource, MemoryCachedSource, StoredOrComputedSource
from speculators.data_generation.sources.local import LocalSource
from speculators.data_generation.sources.samples import origin_of
from speculators.data_generation.sources.servers import BalancedSource
from speculators.data_generation.sources.shard_writer import WriteOptions
from speculators.data_generation.sources.sharded import ShardedStore
from speculators.data_generation.sources.store import HiddenStateStore, MissingStatesError, StoragePlan
from speculators.data_generation.sources.vllm import VllmSource

__all__ = [
    "BalancedSource",
    "CachedSource",
    "CorruptHiddenStatesError",
    "HiddenStateStore",
    "LocalSource",
    "MemoryCachedSource",
    "MissingStatesError",
    "ShardedStore",
    "StoragePlan",
    "StoredOrComputedSource",
    "VllmSource",
    "WriteOptions",
    "estimate_bytes",
    "origin_of",
]
