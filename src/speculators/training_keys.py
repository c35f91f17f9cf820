"""Training keys that drafters read, and the base of the keys an algorithm adds. Every default is written here or in an
algorithm's `training_args`, once, and holds by every door: command line, YAML, `TrainConfig`, `from_training_args`,
`get_trainer_kwargs`, `forward`.

What only the trainer reads is in `train.keys`. Imports nothing heavy, for `--help`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from typing_extensions import Self

from speculators.utils.readable import ReadableModel, rule_of, shown

Read = TypeVar("Read", bound=BaseModel)


class Keys(ReadableModel):
    """Base of a group of keys. Values may come as text (a command line), unknown keys never pass."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @classmethod
    def defaults(cls) -> Self:
        return cls.model_validate({})


class VerifierKeys(Keys):
    verifier_name_or_path: str = Field(min_length=1, description="Model the drafter drafts for: Hub id or directory.")
    trust_remote_code: bool = Field(False, description="Run model code shipped with the verifier.")


class DraftKeys(Keys):
    from_pretrained: str = Field(
        "", description="Speculator to fine-tune, or one of the algorithm it builds on: its weights and shape are kept."
    )
    draft_config: str = Field("", description="config.json giving the drafter's shape (a decoder or a speculator).")
    num_layers: int = Field(1, ge=1, description="Decoder layers of the drafter.")
    draft_arch: str = Field("qwen3", description="Decoder architecture of the drafter's layers, e.g. llama, qwen3.")
    draft_hidden_act: str = Field("silu", description="Activation of the drafter's MLP.")
    target_layer_ids: list[int] | None = Field(
        None,
        description="Verifier layers the drafter reads; i = after i layers. "
        "None: 2, n//2, n-3 of n layers; of fewer than 7, three that differ.",
    )
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Keep the most frequent tokens of the data only. None: the verifier's vocabulary."
    )
    token_freq_path: str | None = Field(None, description="Token frequencies. None: token_freq.pt of the data.")
    d2t_path: str | None = Field(None, description="Ready draft-to-verifier map (.npy), together with --t2d-path.")
    t2d_path: str | None = Field(None, description="Ready verifier-to-draft mask (.npy), together with --d2t-path.")
    mask_token_id: int | None = Field(None, ge=0, description="Token of masked slots, for drafters that have them.")
    sliding_window: int = Field(2048, ge=1, description="Attention window of the drafter's layers, in tokens.")
    full_attention_indices: list[int] | None = Field(
        None, description="Draft layers that see everything; all others use the sliding window."
    )
    draft_attn_impl: Literal["simple_flex_attention", "sdpa", "eager"] = Field(
        "simple_flex_attention", description="Attention of the drafter in training."
    )
    block_size: int = Field(8, ge=1, description="Slots of a block, for drafters that fill a block at once.")


class AnchorKeys(Keys):
    max_anchors: int = Field(512, ge=1, description="Training positions sampled in a packed row, where sampled.")


class LossKeys(Keys):
    loss_fn: str | dict[str, float] = Field("kl_div", description='A name, or a JSON object {"name": weight}.')
    loss_implementation: Literal["fused", "eager"] = Field("fused", description="fused: never holds all logits.")


# -- which keys a run reads --------------------------------------------------------------------------------------------

USED, EQUAL, IDLE, REFUSED = "used", "equal", "idle", "refused"
"""What becomes of a key that is given. equal: accepted where it says what is so anyway; idle: of pace alone, accepted
with a line that it has no effect."""
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """Says when keys are not read."""

    keys: tuple[str, ...]
    applies: Callable[[Values], bool]
    because: str
    outcome: str = REFUSED


def reading_of(key: str, values: Values, rules: Iterable[Rule]) -> tuple[str, str]:
    """Returns what becomes of a key, and why. `values`: all keys, resolved. Without a rule that applies it is used."""
    for rule in rules:
        if key in rule.keys and rule.applies(values):
            return rule.outcome, rule.because
    return USED, ""


# -- keys of an algorithm ----------------------------------------------------------------------------------------------

_SHAPES = ("draft_arch", "draft_hidden_act", "sliding_window", "full_attention_indices", "draft_config")
NO_VOCABULARY_OF_ITS_OWN = ("token_freq_path", "d2t_path", "t2d_path")
NO_BLOCKS = ("block_size", "mask_token_id", "max_anchors")
"""Generic keys, for the `unread_keys` of a drafter."""
NOT_APPLICABLE = Field(None, description="Not for this drafter: it has no decoder layers of its own to shape.")


class TrainingArgs(ReadableModel):
    """Base of what an algorithm adds; its fields become flags and YAML keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command_line_only: ClassVar[Collection[str]] = ()
    """Keys that calls by hand may say as they like: nothing reads them."""
    rules: ClassVar[tuple[Rule, ...]] = ()
    """Of keys that mean nothing without another: its own, or generic ones."""


class FixedShapeArgs(TrainingArgs):
    """For drafters whose layers the generic keys cannot shape: such a key is refused, since nothing would read it.

    Only on the command line and in YAML: callers by hand have always been free to pass all keys."""

    command_line_only: ClassVar[Collection[str]] = _SHAPES
    why: ClassVar[str]

    draft_arch: str | None = NOT_APPLICABLE
    draft_hidden_act: str | None = NOT_APPLICABLE
    sliding_window: int | None = NOT_APPLICABLE
    full_attention_indices: list[int] | None = NOT_APPLICABLE
    draft_config: str | None = NOT_APPLICABLE

    @field_validator(*_SHAPES, mode="before")
    @classmethod
    def refuse_shapes(cls, value: Any) -> None:
        if value not in (None, ""):
            raise ValueError(f"{cls.why}; leave this key out")


class NoLayersArgs(FixedShapeArgs):
    """The same for drafters that have no layers to count either."""

    command_line_only = (*_SHAPES, "num_layers")

    num_layers: int | None = NOT_APPLICABLE

    @field_validator("num_layers", mode="before")
    @classmethod
    def refuse_layers(cls, value: Any) -> None:
        cls.refuse_shapes(value)


class HeadLossArgs(TrainingArgs):
    """What drafters with a head per draft add."""

    head_weight_decay: float

    @staticmethod
    def with_one(key: str, what: str) -> Rule:
        """Weights of several are read where `key` counts more than one."""
        return Rule(("head_weight_decay",), lambda values: values[key] == 1, f"there is one {what}")


# -- reading them from the keywords of a call --------------------------------------------------------------------------


def default_of(keys: type[BaseModel], name: str) -> Any:
    """Where a default is needed again, it comes from the field that has it."""
    return keys.model_fields[name].get_default(call_default_factory=True)


def read_keys(keys: type[Read], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Read:
    """The fields of `keys` among the keywords of a call, others are ignored. `defaults` win over the fields' own. None
    means "not given", unless the field can be None. Raises ValueError."""
    left_out = getattr(keys, "command_line_only", ())
    values = {name: value for name, value in (defaults or {}).items() if name in keys.model_fields}
    for name, field in keys.model_fields.items():
        if (
            name in given
            and name not in left_out
            and (given[name] is not None or NoneType in get_args(field.annotation))
        ):
            values[name] = given[name]
    try:
        return keys.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(map(_sentence, error.errors()))) from error


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{name} is required"
    return f"{name}={shown(error['input'])}: {rule_of(error)}"
