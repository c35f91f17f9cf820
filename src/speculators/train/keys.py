"""The keys of a training run, in groups. The groups that drafters read are in `training_keys`, every other generic
default of `train` is written here, once.

A key is one name everywhere: the flag `--draft-vocab-size`, the YAML key `draft_vocab_size` (bare, or under its group's
heading) and the keyword an algorithm's `from_training_args` receives. What one algorithm adds is in its own
`training_args`; what it wants otherwise than here is in its `training_defaults`. Imports nothing heavy, for `--help`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from speculators.data_generation.configs import DEFAULT_STATES_DIRECTORY, parse_bytes
from speculators.training_keys import (
    EQUAL,
    IDLE,
    REFUSED,
    USED,
    AnchorKeys,
    DraftKeys,
    Keys,
    LossKeys,
    Rule,
    Values,
    VerifierKeys,
)

__all__ = ["EQUAL", "GROUPS", "IDLE", "REFUSED", "RULES", "USED", "DataKeys", "DraftKeys", "LossKeys", "RunKeys"]


class DataKeys(AnchorKeys):
    data_path: str = Field("./output", description="Prepared dataset (the output of prepare-data).")
    total_seq_len: int = Field(8192, ge=8, description="Tokens of a packed row; documents are clipped to it.")
    train_data_ratio: float = Field(
        0.9, gt=0.0, le=1.0, description="Share of rows trained on; the tail validates. 1.0: no validation."
    )
    hidden_states_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Type of verifier states and of autocast. float32 turns autocast off."
    )
    cache_hidden_states: bool = Field(
        False, description="Keep computed verifier states in --hidden-states-path; default: compute, use, forget."
    )
    hidden_states_path: str | None = Field(
        None, description="Where stored verifier states are. None: DATA_PATH/hidden_states."
    )
    vllm_endpoint: str | None = Field(
        None,
        description="Compute verifier states on this server (launch-vllm), e.g. http://localhost:8000/v1; several, "
        "with commas, share the rows and stand in for each other. None: in process.",
    )
    verifier_device: str | None = Field(
        None, description="Device of the verifier in process, e.g. cuda:1. None: the drafter's."
    )
    verifier_device_map: str | None = Field(
        None, description="Spread a verifier larger than a card over devices: auto, or a JSON file (module: device)."
    )
    verifier_tp: bool = Field(
        False,
        description="Split a verifier larger than a card over the ranks of torchrun: each holds a slice of every layer "
        "(transformers' tensor-parallel plan), and all compute the states of each rank's rows together.",
    )
    server_states_path: str = Field(
        str(DEFAULT_STATES_DIRECTORY),
        description="Directory that this server writes to: its --hidden-states-path (of several servers: one for each, "
        "with commas, or one for all). Files elsewhere are not touched.",
    )
    request_timeout: float = Field(120.0, gt=0.0, description="Seconds the server may take for one row.")
    max_retries: int = Field(3, ge=0, description="Tries after a failed request, 1, 2, 4, ... seconds apart.")
    generation_validation_retries: int = Field(
        2, ge=0, description="Further requests for a row whose states came damaged."
    )
    hidden_states_memory_gb: float = Field(
        1.0, ge=0.0, description="Keep computed verifier states in memory up to this, for later epochs. 0: never."
    )
    on_missing: Literal["generate", "skip", "warn", "raise"] = Field(
        "generate", description="A row has no stored states: compute them, skip it (quietly or not), or stop."
    )
    num_workers: int = Field(
        12, ge=0, description="Threads that read stored or served states ahead. Unused in process."
    )
    prefetch_factor: int = Field(4, ge=1, description="Packed rows read ahead by these threads.")
    prefetch_in_process: bool | None = Field(
        None,
        description="Compute the next row's verifier states in process while this row trains. None: on an accelerator; "
        "on a CPU both want the same cores.",
    )


class OptimizerKeys(Keys):
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon: Muon for matrices, AdamW for the rest.")
    lr: float = Field(1e-3, gt=0.0, description="Peak learning rate (of AdamW).")
    weight_decay: float = Field(0.01, ge=0.0, description="Decoupled weight decay (of AdamW).")
    muon_lr: float | None = Field(None, gt=0.0, description="Peak learning rate of Muon. None: --lr.")
    muon_momentum: float = Field(0.95, ge=0.0, lt=1.0, description="Momentum of Muon.")
    muon_weight_decay: float = Field(0.1, ge=0.0, description="Decoupled weight decay of Muon.")
    muon_ns_steps: int = Field(5, ge=1, lt=100, description="Newton-Schulz iterations of Muon.")
    muon_adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        "match_rms_adamw", description="How Muon scales its step with the matrix shape."
    )


class SchedulerKeys(Keys):
    scheduler_type: Literal["linear", "cosine", "none"] = Field("linear", description="Decay after warm-up.")
    scheduler_warmup_steps: int | None = Field(None, ge=0, description="None: see ratio, else 1 % of all steps.")
    scheduler_warmup_ratio: float | None = Field(None, ge=0.0, le=1.0, description="Warm-up as a share of all steps.")
    scheduler_total_steps: int | None = Field(None, ge=1, description="None: the steps of the run.")
    scheduler_num_cosine_cycles: float = Field(0.5, gt=0.0, description="0.5: from the peak to zero once.")


class TrainerKeys(Keys):
    epochs: int = Field(20, ge=1, description="Passes over the training split.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps.")
    checkpoint_freq: float = Field(1.0, gt=0.0, description="Epochs between checkpoints; 0.25: four per epoch.")
    save_best: bool = Field(False, description="Keep only the checkpoint with the lowest validation loss.")
    resume_from_checkpoint: bool = Field(True, description="Continue from the newest checkpoint in --output.")
    allow_changed_settings: bool = Field(
        False, description="Continue even if settings that shape the result differ from those the run began with."
    )
    rank_timeout: float = Field(600.0, gt=0.0, description="Seconds without an answer of another rank that end a run.")
    max_memory: str | None = Field(
        None,
        description="Most memory of each rank, e.g. 20GB, as --estimate measures it. Where a step takes more, its "
        "losses are computed in smaller chunks of logits and then with --gradient-checkpointing: time and the last "
        "bits of sums change, nothing else. What still takes more is refused before the run.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute what feed-forward layers keep: less memory, more time, the same bits."
    )
    fsdp_shard: bool = Field(
        False, description="Split trained weights, gradients and optimizer state over the ranks of torchrun (FSDP2)."
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="Packed rows of each rank in an optimizer step.")
    log_freq: int = Field(1, ge=1, description="Steps between reports to the bar, metrics.jsonl and loggers.")
    log_every: int | None = Field(
        None, ge=1, description="Steps between lines where stderr is no terminal. None: a line every 30 seconds."
    )
    peak_tflops: float | None = Field(
        None,
        gt=0.0,
        description="Peak TFLOP/s of a rank's card for the products of training, of which the log says the share that "
        "was used (MFU). None: of a known card in bfloat16; of others no share is said.",
    )
    eval_prompts: int = Field(
        0, ge=0, description="Held-out prompts decoded in each validation: the acceptance length that serving has."
    )
    save_path: str = Field("./output/checkpoints", description="Run directory.")
    contract_check: bool = Field(True, description="At the end, check that vLLM would serve the checkpoint as trained.")
    parity_gate: bool = Field(True, description="At the end, check that the checkpoint drafts what it was trained to.")

    @field_validator("max_memory")
    @classmethod
    def is_number_of_bytes(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


class LoggingKeys(Keys):
    logger: str = Field("", description="trackio, wandb, tensorboard, mlflow, or several with commas.")
    log_dir: str = Field("./logs", description="Where loggers that write files write them.")
    run_name: str | None = Field(None, description="Name of the run in the loggers.")


class RunKeys(Keys):
    """Keys without a heading."""

    speculator_type: str = Field(
        "eagle3", description="Algorithm, by its registered name; several, with commas, are trained side by side."
    )
    plugins: list[str] = Field(
        [], description="Python modules to import first: the algorithms they register train too."
    )
    dry_run: bool = Field(False, description="Build everything, estimate memory, save once, stop.")
    estimate: bool = Field(
        False, description="Say what the run needs (memory, time, disk, tokens) and what such data gave, and stop."
    )
    estimate_ranks: int | None = Field(
        None, ge=1, description="Estimate what each of so many ranks needs, in one process. None: those of torchrun."
    )
    seed: int = Field(42, ge=0, description="Seed of initial weights, shuffling and sampling.")
    deterministic_cuda: bool = Field(False, description="Only deterministic kernels on an accelerator.")


GROUPS: dict[str, type[Keys]] = {
    "verifier": VerifierKeys,
    "draft": DraftKeys,
    "data": DataKeys,
    "loss": LossKeys,
    "optimizer": OptimizerKeys,
    "scheduler": SchedulerKeys,
    "trainer": TrainerKeys,
    "logging": LoggingKeys,
}

SHAPING_KEYS = ("num_layers", "draft_arch", "draft_hidden_act", "sliding_window", "full_attention_indices")
"""They shape a drafter synthesised from the verifier, and mean nothing when its shape comes from a file."""


RETIRED_KEYS = {
    "on_generate": "computed states are forgotten after use; --cache-hidden-states keeps them",
    "max_consecutive_generation_failures": "no row is skipped: one that fails after --max-retries saves the run and "
    "ends it, and the same command continues",
    "hidden_states_backend": "states of a server travel as files: leave it out",
    "noise_std": "verifier states are trained on as they are: leave it out",
    "draft_mrope_full_head_hack": "the drafter's rope is computed as configured: leave it out",
}
"""Keys of earlier releases -> what is done now, and what to use instead."""


# -- which keys a run reads --------------------------------------------------------------------------------------------

MUON_KEYS = tuple(name for name in OptimizerKeys.model_fields if name.startswith("muon_"))
SERVER_KEYS = ("server_states_path", "request_timeout", "max_retries", "generation_validation_retries")
RECORDED_KEYS = ("target_layer_ids", "draft_vocab_size", "d2t_path", "t2d_path", "mask_token_id", "block_size")
"""A checkpoint records them, beside the keys of its algorithm."""


def reads_states_alone(values: Values) -> bool:
    """Every state is read from a file; none is computed, here or by a server."""
    return values["on_missing"] != "generate" and not values["cache_hidden_states"]


def computes_in_process(values: Values) -> bool:
    return not values["vllm_endpoint"] and not reads_states_alone(values)


RULES = (
    Rule(
        ("draft_config", *SHAPING_KEYS),
        lambda values: bool(values["from_pretrained"]),
        "--from-pretrained already fixes the drafter's shape",
    ),
    Rule(
        ("token_freq_path",), lambda values: bool(values["from_pretrained"]), "--from-pretrained keeps its vocabulary"
    ),
    Rule(RECORDED_KEYS, lambda values: bool(values["from_pretrained"]), "--from-pretrained keeps its own", EQUAL),
    Rule(SHAPING_KEYS, lambda values: bool(values["draft_config"]), "--draft-config already fixes the drafter's shape"),
    Rule(
        ("sliding_window",),
        lambda values: set(range(values["num_layers"] or 0)) <= set(values["full_attention_indices"] or ()),
        "every layer has full attention",
    ),
    Rule(("token_freq_path",), lambda values: bool(values["d2t_path"]), "--d2t-path is the vocabulary already"),
    Rule(
        ("token_freq_path",), lambda values: not values["draft_vocab_size"], "without --draft-vocab-size none are read"
    ),
    Rule(MUON_KEYS, lambda values: values["optimizer"] != "muon", "the optimizer is adamw"),
    Rule(
        ("scheduler_num_cosine_cycles",),
        lambda values: values["scheduler_type"] != "cosine",
        "--scheduler-type is not cosine",
    ),
    Rule(
        ("scheduler_warmup_ratio",),
        lambda values: values["scheduler_warmup_steps"] is not None,
        "--scheduler-warmup-steps says it already",
    ),
    Rule(
        ("vllm_endpoint",),
        reads_states_alone,
        "with --on-missing skip, warn or raise all states are read from files and none are asked of a server",
    ),
    Rule(
        ("verifier_device", "verifier_device_map", "verifier_tp"),
        lambda values: not computes_in_process(values) and not values["eval_prompts"],
        "the verifier is not loaded: its states come from elsewhere",
    ),
    Rule(
        ("on_missing",), lambda values: values["cache_hidden_states"], "--cache-hidden-states computes what is missing"
    ),
    Rule(SERVER_KEYS, lambda values: not values["vllm_endpoint"], "no server is asked without --vllm-endpoint", IDLE),
    Rule(("num_workers", "prefetch_factor"), computes_in_process, "states are computed in process", IDLE),
    Rule(
        ("prefetch_in_process",),
        lambda values: not computes_in_process(values),
        "states are not computed in process",
        IDLE,
    ),
    Rule(
        ("hidden_states_memory_gb",),
        lambda values: values["cache_hidden_states"] or reads_states_alone(values),
        "states are kept in files",
        IDLE,
    ),
    Rule(("estimate_ranks",), lambda values: not values["estimate"], "nothing is estimated without --estimate"),
    Rule(("log_dir", "run_name"), lambda values: not values["logger"], "there is no --logger", IDLE),
)
"""The first rule that applies counts; without one a key is used."""


def group_of() -> dict[str, str]:
    """Generic key -> the group it belongs to; keys of the run itself belong to ''."""
    keys = dict.fromkeys(RunKeys.model_fields, "")
    return keys | {name: group for group, model in GROUPS.items() for name in model.model_fields}
