"""One training run from a config: look everything up, check it, build it, train it, leave a run directory.

    config -> algorithm -> data -> draft vocabulary -> drafter -> verifier states -> rows -> Trainer
    -> contract check -> parity gate

What can be wrong is looked at in the order of its cost: names first, then files, then weights, then forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from speculators.data_generation import LocalSource
from speculators.deploy.check import check_checkpoint
from speculators.model import SpeculatorModel
from speculators.provenance import as_json, output_lock
from speculators.train.checkpointer import DRY_RUN
from speculators.train.config import TrainConfig
from speculators.train.data import ArrowDataset, CollateFn, PackedLoader
from speculators.train.distributed import Ranks, ranks_from_environment, ranks_to_estimate
from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2
from speculators.train.draft_shape import build_model, check_heads, load_verifier_config
from speculators.train.estimate import RunEstimate, estimate_run
from speculators.train.events import Listener, Note, as_notes, ignore, telling
from speculators.train.flags import flag_of
from speculators.train.logger import CurveFile, trackers_of
from speculators.train.recipe import (
    CHECK_NAME,
    check_recipe,
    command,
    is_closed,
    loads_verifier,
    recipe_of,
    write_provenance,
)
from speculators.train.records import TrainerConfig, TrainResult, check_disk_space, checkpoint_bytes
from speculators.train.side_by_side import Drafter, shared, take_turns, union_of
from speculators.train.sources import (
    ask_server,
    computes_in_process,
    make_source,
    open_splits,
    open_store,
    placement_of,
    reading_ahead,
    rows_to_use,
)
from speculators.train.trainer import Trainer
from speculators.train.validation import run_gate
from speculators.train.vocab_mapping import coverage
from speculators.utils.files import absolute_if_directory, atomic_write
from speculators.utils.progress import no_progress_bars
from speculators.utils.report import work
from speculators.verifier import check_reproduces_logits, load_verifier, text_config

LOCK_FILE = ".run.lock"


def train(config: TrainConfig, *, verifier: PreTrainedModel | None = None, on_event: Listener = ignore) -> TrainResult:
    """Train what `config` describes. `on_event` hears of every step, validation and checkpoint.

    `verifier`: the model that `config` names, when it is loaded already.
    """
    [result] = train_side_by_side([config], verifier=verifier, listen=lambda name: on_event)
    return result


@no_progress_bars()
def train_side_by_side(
    configs: Sequence[TrainConfig],
    *,
    verifier: PreTrainedModel | None = None,
    listen: Callable[[str], Listener] = lambda name: ignore,
) -> list[TrainResult]:
    """Trains a drafter per config, in turns on the same verifier states, and returns their results in this order.

    They have directories of their own and the same verifier, data and seed (`drafters.resolve_all` sees to it). Each
    ends as it would alone. `listen`: returns the listener of a drafter, by its algorithm. `verifier`: see `train`.
    """
    if any(config.estimate for config in configs):
        raise ValueError("estimate=True trains nothing: call speculators.train.run.estimate(config) in place of this")
    with ranks_from_environment(configs[0].trainer.rank_timeout) as ranks, ExitStack() as stack:
        drafters = []
        for config, trackers in zip(
            configs, trackers_of(configs) if ranks.is_main else [[]] * len(configs), strict=True
        ):
            on_event, save_path = listen(config.speculator_type), Path(config.trainer.save_path)
            lock = output_lock(save_path / LOCK_FILE, f"run directory {save_path}", as_notes(on_event))
            ranks.main_first(partial(stack.enter_context, lock))
            tell = telling([on_event, CurveFile(save_path), *trackers]) if ranks.is_main else ignore
            drafters.append(build_drafter(config, ranks, tell))
        give_states(drafters, ranks, verifier)
        if configs[0].dry_run:
            return [dry_run(drafter) for drafter in drafters]
        with work():
            results = take_turns(drafters, ranks)
    if not ranks.is_main:
        return results
    closing = zip(drafters, results, strict=True)
    return [close(drafter.config, result, listen(drafter.name), ranks, verifier) for drafter, result in closing]


def dry_run(drafter: Drafter) -> TrainResult:
    num_ranks = drafter.trainer.ranks.world_size
    which = f"each of {num_ranks} ranks: " if num_ranks > 1 else ""
    drafter.on_event(Note(which + str(drafter.memory())))
    drafter.trainer.save(name=DRY_RUN)
    return TrainResult(Path(drafter.config.trainer.save_path) / DRY_RUN, {}, None, 0)


def close(
    config: TrainConfig, result: TrainResult, on_event: Listener, ranks: Ranks, verifier: PreTrainedModel | None
) -> TrainResult:
    """Checks the checkpoint of a run that is over, and writes what was found beside it."""
    if result.finished_before and is_closed(config, result):
        return result
    if config.trainer.contract_check:
        check = check_checkpoint(result.checkpoint)
        result = replace(result, check=check)
        with atomic_write(result.checkpoint / CHECK_NAME) as file:
            file.write(as_json(check.as_dict()) + "\n")
    if not config.trainer.parity_gate:
        return result
    if not loads_verifier(config):
        how = f"speculators verify {result.checkpoint}"
        on_event(Note(f"no parity gate: the verifier was not here, on one device; where it can be, run `{how}`"))
        return result
    return replace(result, parity=run_gate(config, verifier_name(config), result.checkpoint, ranks.device, verifier))


def build(config: TrainConfig, ranks: Ranks, on_event: Listener, verifier: PreTrainedModel | None = None) -> Drafter:
    """Builds everything of a run of one drafter but its first step, and writes what makes it into its directory."""
    drafter = build_drafter(config, ranks, on_event)
    give_states([drafter], ranks, verifier)
    return drafter


def estimate(config: TrainConfig, on_event: Listener = ignore) -> RunEstimate:
    """Says what a run needs and what it may give. Trains nothing, writes nothing and does not load the verifier."""
    with ranks_to_estimate(config.estimate_ranks, config.trainer.rank_timeout) as ranks:
        return estimate_run(build_drafter(config, ranks, on_event if ranks.is_main else ignore))


def build_drafter(config: TrainConfig, ranks: Ranks, on_event: Listener) -> Drafter:
    """Builds everything of a run but what gives it verifier states."""
    torch.manual_seed(config.seed)
    if config.deterministic_cuda:
        torch.use_deterministic_algorithms(True)
    data, name, note = config.data, verifier_name(config), as_notes(on_event)
    verifier_config = load_verifier_config(name, config.verifier.trust_remote_code)
    check_heads(config, verifier_config)
    placement_of(data, ranks, verifier_config)  # refuses what cannot be, before weights are read
    dtype = getattr(torch, data.hidden_states_dtype)
    datasets = open_splits(data, dtype, text_config(verifier_config).vocab_size, note)
    train_set = datasets[0]
    for key, because in config.idle.items():
        note(f"{flag_of(key)} has no effect: {because}")
    model = build_model(config, verifier_config)
    t2d = getattr(model, "t2d", None)
    if t2d is not None:
        note(coverage(train_set.trained_tokens(), t2d))
    model.attention_route(ranks.device.type)  # refuses what this device cannot

    store = open_store(data, model.capture, name, note)
    usable = rows_to_use(data, store, note)
    hidden_size = text_config(verifier_config).hidden_size
    loaders = []
    for dataset in datasets:
        dataset.keep_rows(usable)
        loaders.append(make_loader(config, dataset, model, hidden_size, ranks))
    recipe = recipe_of(config, ranks, model, usable)
    ranks.main_first(lambda: check_recipe(config, recipe, on_event))
    torch.manual_seed(config.seed + ranks.rank)
    trainer = Trainer(
        model,
        trainer_config(config, model),
        *loaders,
        ranks=ranks,
        on_event=on_event,
        num_documents=len(train_set),
        num_tokens=sum(train_set.lengths),
    )
    closed = trainer.is_finished() and not config.dry_run and is_closed(config, trainer.result())
    drafter = Drafter(
        config=config,
        trainer=trainer,
        datasets=datasets,
        store=store,
        reads_files_alone=usable is not None,
        on_event=on_event,
        recipe=recipe,
        is_closed=closed,
        random_state=ranks.random_state(),
        hidden_size=hidden_size,
        verifier_config=verifier_config,
    )
    drafter.fit_into_memory()
    return drafter


def give_states(drafters: Sequence[Drafter], ranks: Ranks, verifier: PreTrainedModel | None) -> None:
    """Gives the drafters that have steps left their verifier states: those of all of them are computed together."""
    going = [drafter for drafter in drafters if not drafter.is_closed]
    if not going:
        return
    first, config = going[0], going[0].config
    data, name, note = config.data, verifier_name(config), as_notes(first.on_event)
    capture = union_of([drafter.trainer.model.capture for drafter in going])
    store = first.store if len(going) == 1 else open_store(data, capture, name, note)
    dtype = getattr(torch, data.hidden_states_dtype)
    verifier_model, computing = None, None
    if computes_in_process(data):
        verifier_model = checked_verifier(config, ranks, dtype, verifier)
        computing = LocalSource(verifier_model, capture)
    elif not first.reads_files_alone:
        computing = ask_server(data, capture, name, first.hidden_size, note)
    for drafter in going:
        if drafter.config.trainer.eval_prompts:
            if verifier_model is None:
                note("the verifier is loaded to decode --eval-prompts; its states come from elsewhere")
                verifier_model = checked_verifier(config, ranks, dtype, verifier)
            drafter.decode_prompts(verifier_model)
    source = make_source(data, store, computing, first.hidden_size, ranks)
    for drafter, readable in zip(going, shared(source, going), strict=True):
        for dataset in drafter.datasets:
            dataset.source = readable
    ranks.set_random_state(first.random_state)  # of the checkpoint: the verifier's proof draws numbers too
    for drafter in going:
        drafter.verifier = verifier_model
        check_disk_space(Path(drafter.config.trainer.save_path), checkpoint_bytes(drafter.trainer.model))
        if ranks.is_main and not drafter.trainer.is_finished() and not config.dry_run:
            write_provenance(drafter.config, drafter.recipe)


def verifier_name(config: TrainConfig) -> str:
    """As the checkpoint records it, and everything that is compared with it."""
    return absolute_if_directory(config.verifier.verifier_name_or_path)


def checked_verifier(
    config: TrainConfig, ranks: Ranks, dtype: torch.dtype, loaded: PreTrainedModel | None
) -> PreTrainedModel:
    """The verifier, whose captured states were shown to give its logits."""
    keys, place = config.verifier, placement_of(config.data, ranks)
    name, trusts = keys.verifier_name_or_path, keys.trust_remote_code
    model = load_verifier(name, dtype=dtype, trust_remote_code=trusts, **place) if loaded is None else loaded
    check_reproduces_logits(model)
    return model


def make_loader(
    config: TrainConfig, dataset: ArrowDataset, model: SpeculatorModel, hidden_size: int, ranks: Ranks
) -> PackedLoader:
    data, capture = config.data, model.capture
    sampler = MultipackDistributedBatchSamplerV2(
        data.total_seq_len,
        dataset.lengths,
        num_replicas=ranks.world_size,
        rank=ranks.rank,
        seed=config.seed,
        drop_last=dataset.split == "train",  # every validation row counts, once
    )
    collate = CollateFn(data.total_seq_len, hidden_size, len(capture.aux_layer_ids), dataset.dtype, model.align)
    num_threads, num_ahead = reading_ahead(data, ranks.device)
    return PackedLoader(
        dataset.read,
        sampler,
        collate,
        num_threads=num_threads,
        num_ahead=num_ahead,
        device=ranks.device,
        on_host=model.columns_on_host,
    )


def trainer_config(config: TrainConfig, model: SpeculatorModel) -> TrainerConfig:
    flat = config.flatten()
    train_kwargs, val_kwargs = type(model).get_trainer_kwargs(**flat)
    shared = {field: flat[field] for field in TrainerConfig.__dataclass_fields__ if field in flat}
    return TrainerConfig(
        **{
            **shared,
            "num_epochs": config.trainer.epochs,
            "train_call_kwargs": train_kwargs,
            "val_call_kwargs": val_kwargs,
            "hidden_states_dtype": getattr(torch, config.data.hidden_states_dtype),
            "train_command": command(config),
        }
    )
