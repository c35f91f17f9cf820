"""Makes training data: tokenised rows with loss masks from raw conversations, and the verifier's states for them.

    raw data -> datasets -> conversations -> masks -> prepare -> <directory>   (tokens, loss masks, manifest)
    prompts -> regenerate -> on-policy rows that prepare-data reads unchanged
    tokens -> sources -> VerifierStates                                        (in process, from a server, from disk)

Names are imported on first use, so that `import speculators` stays fast.
"""

from __future__ import annotations

from speculators.utils.names import lazy_attributes

EXPORTS = {
    "DATASET_CONFIGS": "configs",
    "DatasetConfig": "configs",
    "load_raw_dataset": "datasets",
    "MaskSpan": "masks",
    "mask_spans": "masks",
    "InspectedRow": "prepared",
    "inspect_mask": "prepared",
    "build_speculator_training_dataset": "preprocessing",
    "load_and_preprocess_dataset": "preprocessing",
    "Manifest": "prepared",
    "PreparedData": "prepared",
    "prepare_data": "prepare",
    "RegenerateConfig": "configs",
    "RegenerationReport": "regenerate",
    "regenerate_responses": "regenerate",
    "BalancedSource": "sources",
    "CachedSource": "sources",
    "CorruptHiddenStatesError": "sources",
    "HiddenStateStore": "sources",
    "LocalSource": "sources",
    "MemoryCachedSource": "sources",
    "MissingStatesError": "sources",
    "ShardedStore": "sources",
    "StoredOrComputedSource": "sources",
    "VllmSource": "sources",
    "WriteOptions": "sources",
    "origin_of": "sources",
    "InvalidResponseError": "vllm_client",
    "ServerUnavailableError": "vllm_client",
    "generate_hidden_states": "vllm_client",
    "render_conversation": "tokenizing",
    "RenderError": "tokenizing",
    "estimate_bytes": "sources",
    "OfflineConfig": "configs",
    "OfflineReport": "offline_generation",
    "generate_offline_data": "offline_generation",
    "StoreReport": "upkeep",
    "compact_store": "upkeep",
    "inspect_store": "upkeep",
    "verify_store": "upkeep",
    "check_hidden_states": "offline",
    "find_corrupt_hidden_state_indices": "offline",
    "get_existing_hidden_state_indices": "offline",
    "get_indices_to_process": "offline",
}

__all__ = sorted(EXPORTS)

__getattr__, __dir__ = lazy_attributes(__name__, EXPORTS)
