"""The recipe of a run: every setting that shapes its result, resolved, with hashes of what it reads. A run directory
takes in no second recipe.

    recipe.json      compared when a run is continued
    run.yaml         the configuration, train_command.txt the command, speculators.patch changes that no commit holds
    <checkpoint>/check.json, parity.json     what the contract check and the parity gate said of it when the run ended
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from speculators.checkpoint.record import computed_config, verifier_facts
from speculators.data_generation import PreparedData
from speculators.evaluation.parity import REPORT_NAME
from speculators.model import SpeculatorModel
from speculators.provenance import (
    as_json,
    changed_settings,
    columns,
    find_package_repo,
    git_diff,
    git_sha,
    package_versions,
    read_recipe,
    refuse_changes,
    write_recipe,
)
from speculators.train.checkpointer import Checkpointer, DamagedCheckpointError, read_position
from speculators.train.config import TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.events import Listener, Note
from speculators.train.records import TrainResult
from speculators.train.sources import computes_in_process
from speculators.utils.files import absolute_if_directory, atomic_write, read_json_object

RECIPE_FILE = "recipe.json"
CHECK_NAME = "check.json"
FREE_KEYS = frozenset(
    [
        "allow_changed_settings",
        "cache_hidden_states",
        "checkpoint_freq",
        "contract_check",
        "deterministic_cuda",
        "dry_run",
        "estimate",
        "estimate_ranks",
        "eval_prompts",
        "fsdp_shard",
        "generation_validation_retries",
        "gradient_checkpointing",
        "hidden_states_memory_gb",
        "hidden_states_path",
        "log_dir",
        "log_every",
        "log_freq",
        "logger",
        "max_memory",
        "max_retries",
        "num_workers",
        "on_missing",
        "parity_gate",
        "peak_tflops",
        "plugins",
        "prefetch_factor",
        "prefetch_in_process",
        "rank_timeout",
        "request_timeout",
        "resume_from_checkpoint",
        "run_name",
        "save_best",
        "save_path",
        "trust_remote_code",
        "verifier_device",
        "verifier_device_map",
        "verifier_tp",
        "vllm_endpoint",
    ]
)
"""They may change between two parts of a run: they say where and how it is computed, shown or saved."""
HASHED_KEYS = frozenset(
    ["d2t_path", "data_path", "draft_config", "t2d_path", "token_freq_path", "verifier_name_or_path"]
)
"""Paths, in whose place the recipe holds what was found there."""
LENGTH_KEYS = ("epochs", "max_steps")
"""They shape the learning rate unless the schedule has a length of its own."""
ROW_KEYS = frozenset(["data", "rows", "seed", "total_seq_len", "train_data_ratio"])
"""They decide which rows an epoch has and in which order, so inside an epoch nothing can allow their change."""
RANKS_KEY, ACCUMULATION_KEY = "num_ranks", "gradient_accumulation_steps"
THREADS_KEY = "num_threads"
"""Of a run on a CPU: what its sums were split into. Another number is no other recipe, but changes the last bits."""
BLOCK_ROWS = 1000


def recipe_of(
    config: TrainConfig, ranks: Ranks, model: SpeculatorModel, usable: Collection[int] | None
) -> dict[str, Any]:
    """Returns setting -> value. `usable`: the rows that have verifier states, None for all."""
    flat = config.flatten()
    left_out = FREE_KEYS | HASHED_KEYS | (set() if follows_length(flat) else set(LENGTH_KEYS))
    verifier = absolute_if_directory(config.verifier.verifier_name_or_path)
    facts = {key: value for key, value in verifier_facts(verifier).items() if key != "name_or_path"}
    t2d = getattr(model, "t2d", None)
    drafter = computed_config(json.loads(as_json(model.config.to_dict())))
    return {
        **{key: value for key, value in flat.items() if key not in left_out},
        "verifier": f"{verifier} {short_hash(repr(sorted(facts.items())).encode())}",
        "data": data_hash(PreparedData.open(config.data.data_path).dataset()),
        "rows": "all" if usable is None else f"{len(usable)} {short_hash(repr(sorted(usable)).encode())}",
        "draft_vocabulary": "whole" if t2d is None else f"{int(t2d.sum())} tokens {tensor_hash(t2d)}",
        **{f"drafter.{key}": value for key, value in drafter.items()},
        "aux_layer_ids": list(model.capture.aux_layer_ids),
        RANKS_KEY: ranks.world_size,
        **({THREADS_KEY: torch.get_num_threads()} if ranks.device.type == "cpu" else {}),
    }


def begun_threads(configs: Sequence[TrainConfig]) -> int | None:
    """Returns the number of CPU threads that the run to be continued was begun with; None for a new one."""
    for keys in (config.trainer for config in configs):
        root = Path(keys.save_path)
        if keys.resume_from_checkpoint and Checkpointer(root).newest() is not None:
            return (read_recipe(root / RECIPE_FILE) or {}).get(THREADS_KEY)
    return None


def follows_length(flat: dict[str, Any]) -> bool:
    """Says whether the learning rate depends on how long the run is."""
    has_own_warmup = flat["scheduler_warmup_steps"] is not None
    return flat["scheduler_total_steps"] is None and (flat["scheduler_type"] != "none" or not has_own_warmup)


def data_hash(rows: Dataset) -> str:
    """Hashes tokens and masks in their order, however the files are cut."""
    digest = hashlib.sha256()
    for block in rows.with_format("numpy").iter(batch_size=BLOCK_ROWS):
        for name in ("input_ids", "loss_mask"):
            for values in block[name]:
                digest.update(len(values).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(values, dtype=np.int64).data)
    return f"{len(rows)} rows {digest.hexdigest()[:12]}"


def tensor_hash(tensor: torch.Tensor) -> str:
    return short_hash(tensor.cpu().numpy().tobytes())


def short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def check_recipe(config: TrainConfig, recipe: dict[str, Any], on_event: Listener) -> None:
    """Raises `ValueError` when the run directory holds a run of another recipe, unless that was allowed."""
    root = Path(config.trainer.save_path)
    checkpointer = Checkpointer(root)
    for text in checkpointer.recover():
        on_event(Note(text))
    newest = checkpointer.newest()
    if newest is None or not config.trainer.resume_from_checkpoint:
        return
    before = read_recipe(root / RECIPE_FILE)
    if before is None:
        on_event(Note(f"{root} has no {RECIPE_FILE}: an earlier release began it, so its settings are not compared"))
        return
    changes = changed_settings(before, recipe)
    if changes.pop(RANKS_KEY, None) is not None and rows_a_step(before) == rows_a_step(recipe):
        changes.pop(ACCUMULATION_KEY, None)  # another number of ranks is no other recipe: a step keeps its rows
    threads = changes.pop(THREADS_KEY, None)
    if threads is not None and before.get(THREADS_KEY) is not None:
        on_event(Note(f"threads: {threads}; the result may differ in its last bits from that of one uninterrupted run"))
    ways_out = "continue with the settings before, or name another --output"
    if not config.trainer.allow_changed_settings:
        refuse_changes(changes, f"the run in {root}", f"{ways_out}; --allow-changed-settings mixes both in one result")
    if is_inside_epoch(newest):
        rows = {name: change for name, change in changes.items() if name in ROW_KEYS}
        refuse_changes(rows, f"{newest} is inside an epoch, whose rows", f"{ways_out}; nothing else would be exact")
    if changes:
        on_event(Note(f"continuing with changed settings:\n{columns(changes)}"))


def rows_a_step(recipe: dict[str, Any]) -> int:
    return recipe[RANKS_KEY] * recipe[ACCUMULATION_KEY]


def is_inside_epoch(checkpoint: Path) -> bool:
    try:
        return read_position(checkpoint).local_step > 0
    except DamagedCheckpointError:  # set aside, with a line, before the run continues
        return False


def command(config: TrainConfig) -> str:
    return shlex.join(["speculators", "train", *config.argv])


def write_provenance(config: TrainConfig, recipe: dict[str, Any]) -> None:
    """Writes what makes the run: its recipe, configuration and command, and source changes that no commit holds."""
    save_path = Path(config.trainer.save_path)
    save_path.mkdir(parents=True, exist_ok=True)
    repo = find_package_repo()
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items() if version)
    write_recipe(save_path / RECIPE_FILE, recipe)
    with atomic_write(save_path / "run.yaml") as file:
        file.write(f"# {versions}; commit {git_sha(repo) or 'unknown'}\n{config.dump_yaml()}")
    with atomic_write(save_path / "train_command.txt") as file:
        file.write(command(config) + "\n")
    patch = git_diff(repo)
    if patch:
        with atomic_write(save_path / "speculators.patch") as file:
            file.write(patch)


def loads_verifier(config: TrainConfig) -> bool:
    """Says whether the run has the verifier, on one device: to compute states, or to decode `--eval-prompts`."""
    has_it = computes_in_process(config.data) or bool(config.trainer.eval_prompts)
    return has_it and config.data.verifier_device_map is None and not config.data.verifier_tp


def is_closed(config: TrainConfig, result: TrainResult) -> bool:
    """Says whether the checkpoint passed every check that the run ends with, by the reports beside its weights."""
    keys, folder = config.trainer, result.checkpoint
    asked = {
        folder / CHECK_NAME: ("ok", keys.contract_check),
        folder / REPORT_NAME: ("passed", keys.parity_gate and loads_verifier(config)),
    }
    return all(
        file.is_file() and read_json_object(file, "delete it").get(verdict) is True
        for file, (verdict, is_asked) in asked.items()
        if is_asked
    )
