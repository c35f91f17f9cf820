"""One training run from a config: look everything up, check it, build it, train it, leave a run directory.

    config -> algorithm -> data -> draft vocabulary -> drafter -> verifier states -> rows -> Trainer
    -> contract check -> parity gate

What can be wrong is looked at in the order of its cost: names first, then files, then weights, then forwards.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from speculators.data_generation import LocalSource, PreparedData
from speculators.deploy.check import check_checkpoint
from speculators.evaluation.config import ParityConfig
from speculators.evaluation.parity import REPORT_NAME, ParityReport, check_parity
from speculators.model import SpeculatorModel
from speculators.provenance import as_json, output_lock
from speculators.train.checkpointer import DRY_RUN
from speculators.train.config import TrainConfig
from speculators.train.data import ArrowDataset, CollateFn, PackedLoader
from speculators.train.distributed import Ranks, ranks_from_environment
from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2
from speculators.train.draft_shape import build_model, check_heads, load_verifier_config
from speculators.train.events import Event, Listener, Note, ignore
from speculators.train.flags import flag_of
from speculators.train.logger import own_listeners
from speculators.train.recipe import (
    CHECK_NAME,
    check_recipe,
    command,
    is_closed,
    loads_verifier,
    recipe_of,
    write_provenance,
)
from speculators.train.records import MemoryEstimate, TrainerConfig, TrainResult, check_disk_space, estimate_memory
from speculators.train.sources import (
    ask_server,
    check_supervised,
    check_token_ids,
    computes_in_process,
    leave_out_untrained,
    make_source,
    open_store,
    rows_to_use,
)
from speculators.train.trainer import Trainer
from speculators.train.validation import PromptDecoder, prompts_of
from speculators.train.vocab_mapping import coverage
from speculators.utils.files import absolute_if_directory, atomic_write
from speculators.utils.progress import no_progress_bars
from speculators.utils.report import work
from speculators.verifier import check_reproduces_logits, load_verifier, text_config

LOCK_FILE = ".run.lock"
NUM_PROMPTS, MAX_PROMPT_TOKENS, MAX_TOKENS = 4, 64, 32
"""A wrong drafter shows within a few rounds."""


@no_progress_bars()
def train(config: TrainConfig, *, verifier: PreTrainedModel | None = None, on_event: Listener = ignore) -> TrainResult:
    """Train what `config` describes. `on_event` hears of every step, validation and checkpoint.

    `verifier`: the model that `config` names, when it is loaded already.
    """
    save_path = Path(config.trainer.save_path)
    with ranks_from_environment(config.trainer.rank_timeout) as ranks, ExitStack() as stack:
        lock = output_lock(save_path / LOCK_FILE, f"run directory {save_path}", lambda text: on_event(Note(text)))
        ranks.main_first(lambda: stack.enter_context(lock))
        listeners = [on_event, *(own_listeners(config) if ranks.is_main else [])]

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        trainer, estimate = build(config, ranks, tell if ranks.is_main else ignore, verifier)
        if config.dry_run:
            tell(Note(str(estimate)))
            trainer.save(name=DRY_RUN)
            return TrainResult(save_path / DRY_RUN, {}, None, 0)
        with work():
            result = trainer.run_training()
        device = trainer.ranks.device
    if not ranks.is_main or (result.finished_before and is_closed(config, result)):
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
        on_event(Note(f"no parity gate: the verifier was not in this process; where it can be, run `{how}`"))
        return result
    return replace(result, parity=run_gate(config, verifier_name(config), result.checkpoint, device, verifier))


def build(
    config: TrainConfig, ranks: Ranks, on_event: Listener, verifier: PreTrainedModel | None = None
) -> tuple[Trainer, MemoryEstimate]:
    """Builds everything of a run but its first step, and writes what makes it into its directory."""
    torch.manual_seed(config.seed)
    if config.deterministic_cuda:
        torch.use_deterministic_algorithms(True)
    data, name = config.data, verifier_name(config)
    dtype = getattr(torch, data.hidden_states_dtype)

    def note(text: str) -> None:
        on_event(Note(text))

    verifier_config = load_verifier_config(name, config.verifier.trust_remote_code)
    check_heads(config, verifier_config)
    train_set, val_set = open_splits(config, dtype, text_config(verifier_config).vocab_size)
    for dataset in (train_set, val_set):
        said = None if dataset is None else leave_out_untrained(dataset)
        if said is not None:
            note(said)
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
    for dataset in (train_set, val_set):
        if dataset is not None:
            dataset.keep_rows(usable)
            num_threads = 0 if computes_in_process(data) else data.num_workers  # one verifier, one thread
            loaders.append(make_loader(config, dataset, model, hidden_size, ranks, num_threads))
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
    if trainer.is_finished() and not config.dry_run and is_closed(config, trainer.result()):
        return trainer, estimate(config, model, None, hidden_size)
    random_state = ranks.random_state()  # of the checkpoint: the verifier's proof draws numbers too
    verifier_model, computing = None, None
    if computes_in_process(data):
        verifier_model = checked_verifier(config, ranks, dtype, verifier)
        computing = LocalSource(verifier_model, model.capture)
    elif usable is None:
        computing = ask_server(data, model.capture, name, hidden_size, note)
    if config.trainer.eval_prompts:
        if verifier_model is None:
            note("the verifier is loaded to decode --eval-prompts; its states come from elsewhere")
            verifier_model = checked_verifier(config, ranks, dtype, verifier)
        assert val_set is not None
        trainer.decoder = PromptDecoder.of(model, verifier_model, val_set.rows, config.trainer.eval_prompts)
    source = make_source(data, store, computing, hidden_size)
    for dataset in (train_set, val_set):
        if dataset is not None:
            dataset.source = source
    ranks.set_random_state(random_state)
    memory = estimate(config, model, verifier_model, hidden_size)
    check_disk_space(Path(config.trainer.save_path), memory.checkpoint_bytes)
    if ranks.is_main and not trainer.is_finished() and not config.dry_run:
        write_provenance(config, recipe)
    return trainer, memory


def verifier_name(config: TrainConfig) -> str:
    """As the checkpoint records it, and everything that is compared with it."""
    return absolute_if_directory(config.verifier.verifier_name_or_path)


def open_splits(config: TrainConfig, dtype: torch.dtype, vocab_size: int) -> tuple[ArrowDataset, ArrowDataset | None]:
    """Training and validation rows, checked: there are some, with something to learn, in the verifier's vocabulary."""
    keys = config.data
    ratio = keys.train_data_ratio

    def split(name: Any) -> ArrowDataset:
        return ArrowDataset(
            keys.total_seq_len, keys.data_path, train_ratio=ratio, split=name, hidden_states_dtype=dtype
        )

    train_set = split("train")
    check_supervised(train_set, keys.data_path)
    check_token_ids(train_set, keys.data_path, vocab_size)
    val_set = split("val") if ratio < 1.0 else None
    if val_set is not None:
        check_supervised(val_set, keys.data_path)
    return train_set, val_set


def checked_verifier(
    config: TrainConfig, ranks: Ranks, dtype: torch.dtype, loaded: PreTrainedModel | None
) -> PreTrainedModel:
    """The verifier, whose captured states were shown to give its logits."""
    keys = config.verifier
    model = (
        loaded
        if loaded is not None
        else load_verifier(
            keys.verifier_name_or_path, dtype=dtype, device=ranks.device, trust_remote_code=keys.trust_remote_code
        )
    )
    check_reproduces_logits(model)
    return model


def make_loader(
    config: TrainConfig, dataset: ArrowDataset, model: SpeculatorModel, hidden_size: int, ranks: Ranks, num_threads: int
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
    return PackedLoader(dataset.read, sampler, collate, num_threads=num_threads, num_ahead=data.prefetch_factor)


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


def estimate(
    config: TrainConfig, model: SpeculatorModel, verifier_model: PreTrainedModel | None, hidden_size: int
) -> MemoryEstimate:
    methods = model.config.speculators_config.proposal_methods if model.config.speculators_config else []
    num_unrolls = max([getattr(method, "speculative_tokens", 1) for method in methods], default=1)
    params = [] if verifier_model is None else list(verifier_model.parameters())
    return estimate_memory(
        model,
        num_tokens=config.data.total_seq_len,
        hidden_size=hidden_size,
        num_states=len(model.capture.aux_layer_ids) + 1,
        num_unrolls=num_unrolls,
        verifier_bytes=sum(param.numel() * param.element_size() for param in params),
    )


def run_gate(
    config: TrainConfig, verifier: str, checkpoint: Path, device: torch.device, loaded: PreTrainedModel | None = None
) -> ParityReport:
    """Runs the parity gate: the checkpoint on prompts of the run's own data. Writes the report beside its weights.

    `loaded`: the verifier, when the run was given it. One that is loaded here has the run's own precision on an
    accelerator: a second verifier in fp32 may not fit.
    """
    report = check_parity(
        ParityConfig(
            checkpoint=str(checkpoint),
            verifier=verifier,
            max_tokens=MAX_TOKENS,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            dtype="float32" if device.type == "cpu" else config.data.hidden_states_dtype,
            device=str(device),
            trust_remote_code=config.verifier.trust_remote_code,
        ),
        gate_prompts(config),
        verifier=loaded,
    )
    report.save(checkpoint / REPORT_NAME)
    return report


def gate_prompts(config: TrainConfig) -> list[list[int]]:
    """Returns the prompts of the last rows of the data: the held-out ones, if there are any."""
    rows = PreparedData.open(config.data.data_path).dataset()
    return prompts_of(rows.select(range(max(0, len(rows) - NUM_PROMPTS), len(rows))))
