"""Builds and trains every drafter: the open doors that callers use, written once over the typed hooks that an
algorithm fills in.

    from_training_args(config, t2d, d2t, **keys)   ->  DrafterArgs  ->  config_values
    get_trainer_kwargs(**keys)                     ->  keywords of forward, for training and for validation
    forward(**tensors, **keywords)                 ->  PackedBatch, LossArgs  ->  train_on  ->  (output, loss, metrics)

A class of a third party may override hooks or whole doors. Values that a call leaves out are those of the command line,
`called_by_hand` aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import Self

from speculators.interfaces import LossOutput, PackedBatch
from speculators.losses.metrics import as_pairs, ratio
from speculators.losses.registry import LossConfig, choose_loss_config, loss_keywords
from speculators.nn.packed_row import pack_row, padded_row
from speculators.nn.rope import head_dim
from speculators.nn.routes import DENSE, Route, choose_route
from speculators.training_keys import DraftKeys, LossKeys, TrainingArgs, VerifierKeys, default_of, read_keys
from speculators.verifier.config import make_speculators_config

Own = TypeVar("Own", bound=BaseModel)


class NoTrainingArgs(TrainingArgs):
    """The training arguments of an algorithm that adds none."""


@dataclass(frozen=True)
class DrafterArgs(Generic[Own]):
    """Holds what a new drafter is made of, beside the config of its layers."""

    own: Own
    """The algorithm's `training_args`."""
    draft: DraftKeys
    verifier: VerifierKeys

    def choose_attention(self, layer_config: PretrainedConfig) -> None:
        """Write down the attention of training: the one asked for, else the config's, else the default."""
        if "draft_attn_impl" in self.draft.model_fields_set or layer_config._attn_implementation is None:
            layer_config._attn_implementation = self.draft.draft_attn_impl


@dataclass(frozen=True)
class LossArgs(Generic[Own]):
    """Holds the settings of one training forward."""

    own: Own
    """The algorithm's `training_args`."""
    loss_config: LossConfig
    attention: Route
    max_anchors: int | None
    """Most positions sampled in a row; None: nothing was said."""
    generator: torch.Generator | None
    """Of what is sampled; None: torch's own."""


class TrainingDoors:
    """The part of `SpeculatorModel` that trains."""

    config: Any
    config_class: Any
    training: bool
    device: torch.device

    training_args: ClassVar[type[BaseModel]] = NoTrainingArgs
    """Keys the algorithm adds to the training command line and YAML."""
    training_defaults: ClassVar[Mapping[str, Any]] = {}
    """Generic training keys for which this algorithm wants another default."""
    called_by_hand: ClassVar[Mapping[str, Any]] = {}
    """Keys for which the contract names another default where Python calls a door than on the command line."""
    has_chosen_layers: ClassVar[bool] = True
    """Whether it is made of decoder layers that the draft keys shape (how many, which architecture, what window):
    `from_training_args` is then given their config, else the verifier's own."""
    unread_keys: ClassVar[tuple[str, ...]] = ()
    """Generic training keys that mean nothing here: giving one on the command line is an error."""
    recorded_keys: ClassVar[Mapping[str, str]] = {}
    """Training key -> the field of the config that records it, where that has another name."""
    chosen_anew: ClassVar[tuple[str, ...]] = ()
    """Training keys that it does not take over from a checkpoint of the algorithm it builds on."""
    columns_on_host: ClassVar[tuple[str, ...]] = ()
    """Tensors of a batch that the trainer leaves in the host's memory: choosing from them then waits for no device."""
    takes_routes: ClassVar[bool] = False
    """Whether its layers attend by `LossArgs.attention`, which `draft_attn_impl` and the device choose."""
    forward_keys: ClassVar[Mapping[str, str] | None] = None
    """Own training keys that forwards read -> the keyword of `forward`. None: all, by their own names."""
    forward_columns: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "input_ids",
        "document_ids",
        "loss_mask",
        "position_ids",
        "verifier_last_hidden_states",
    )
    """Tensors of a batch that `packed_batch` takes, in the order in which `forward` takes them by position."""
    first_position: ClassVar[int] = 0
    """Position of the first column, where a batch says none."""
    row_flop: int | None = None
    """Model FLOPs of the newest row that `forward` trained on, backward included; None: the algorithm counts none."""

    # -- hooks of an algorithm ---------------------------------------------------------------------------------------

    @classmethod
    def config_values(cls, layer_config: PretrainedConfig, args: DrafterArgs[Any]) -> dict[str, Any]:
        """Fields of a new drafter's config beside `speculators_config`, which records the verifier and the drafts per
        round. `layer_config`: see `has_chosen_layers`."""
        raise NotImplementedError(f"{cls.__name__} does not implement from_training_args")

    @classmethod
    def drafts_per_round(cls, args: DrafterArgs[Any]) -> int:
        """Tokens that a new drafter is trained to draft per round, as its config records it."""
        return 1

    def initialise(self, args: DrafterArgs[Any]) -> None:
        """Give a new drafter weights to start from; nothing to do where the constructor's are right."""

    @classmethod
    def trainer_keywords(cls, own: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `forward` beside the loss. `keys`: all training keys."""
        return {keyword: getattr(own, name) for name, keyword in cls.keys_of_forward().items()}

    @classmethod
    def check_loss(cls, own: Any, loss_config: LossConfig) -> None:
        """Raise ValueError where its keys and the losses do not go together."""

    def packed_batch(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        verifier_last_hidden_states: Tensor | None = None,
    ) -> PackedBatch:
        """The batch of one packed row [1, S], as the trainer hands it over."""
        return pack_row(
            input_ids,
            aux=hidden_states,
            last_hidden=verifier_last_hidden_states,
            document_ids=document_ids,
            loss_mask=loss_mask,
            position_ids=position_ids,
            first_position=self.first_position,
        )

    def loss_args(self, keywords: Mapping[str, Any]) -> LossArgs[Any]:
        """Reads the keywords of `forward`, the rest by default."""
        own = self.read_own({key: keywords[word] for key, word in self.keys_of_forward().items() if word in keywords})
        default = self.generic_key({}, LossKeys, "loss_fn")
        loss_config = choose_loss_config(keywords.get("loss_config"), keywords.get("loss_fn"), default)
        self.check_loss(own, loss_config)
        generator = keywords.get("generator")
        return LossArgs(
            own=own,
            loss_config=loss_config,
            attention=keywords.get("attention_route") or self.attention_route(self.device.type),
            max_anchors=keywords.get("max_anchors"),
            generator=validation_generator() if generator is None and not self.training else generator,
        )

    def attention_route(self, device_kind: str) -> Route:
        """How its layers attend in training on such a device. Raises ValueError where they cannot; `forward` takes
        another one as `attention_route`."""
        if not self.takes_routes:
            return DENSE  # any: it is not asked
        layers = self.config.transformer_layer_config
        return choose_route(layers._attn_implementation, device_kind, head_dim(layers))

    def train_on(self, batch: PackedBatch, args: LossArgs[Any]) -> LossOutput:
        """Loss and metrics of one row."""
        raise NotImplementedError("The forward method is only supported on concrete speculator models")

    def forward_output(
        self, batch: PackedBatch, args: LossArgs[Any], result: LossOutput, given: Mapping[str, Any]
    ) -> Any:
        """Returns what `forward` gives beside loss and metrics: the draft ids of each step, [1, S], if there are any.
        `given`: tensors and keywords as `forward` got them."""
        if result.draft_ids is None:
            return None
        return [padded_row(draft_ids_T, batch.row_length) for draft_ids_T in result.draft_ids]

    def forward_without_targets(self, batch: PackedBatch, args: LossArgs[Any]) -> Any:
        """For batches without the verifier's last states."""
        raise ValueError("verifier_last_hidden_states is None, but the targets of training are made of them")

    # -- the doors ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_training_args(
        cls, verifier_config: Any, t2d: Tensor | None = None, d2t: Tensor | None = None, **keys: Any
    ) -> Self:
        """A new drafter from the config of its layers (see `has_chosen_layers`), the draft vocabulary, if there is one,
        and training keys; those that it does not read are ignored. Raises ValueError for a value that is wrong."""
        if cls.config_values.__func__ is TrainingDoors.config_values.__func__:  # type: ignore[attr-defined]
            raise NotImplementedError(f"{cls.__name__} does not implement from_training_args")
        args = DrafterArgs(cls.read_own(keys), cls.read_generic(DraftKeys, keys), read_keys(VerifierKeys, keys))
        values = cls.config_values(verifier_config, args)
        recorded = make_speculators_config(
            cls.config_class.model_fields["speculators_model_type"].default,
            cls.drafts_per_round(args),
            args.verifier.verifier_name_or_path,
            args.verifier.trust_remote_code,
        )
        model: Any = cls.to_be_loaded(cls.config_class(**{"speculators_config": recorded, **values}))  # type: ignore[attr-defined]
        model.load_vocab_mappings(t2d, d2t)
        model.load_verifier_weights()
        model.initialise(args)
        return model

    @classmethod
    def get_trainer_kwargs(cls, **keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keywords of `forward` beside the batch: (training, validation), made of training keys."""
        if cls.train_on is TrainingDoors.train_on:
            raise NotImplementedError(f"{cls.__name__} does not implement get_trainer_kwargs")
        own = cls.read_own(keys)
        loss_fn, implementation = (cls.generic_key(keys, LossKeys, name) for name in ("loss_fn", "loss_implementation"))
        loss = loss_keywords(loss_fn, implementation)
        cls.check_loss(own, loss["loss_config"])
        shared = {**loss, **cls.trainer_keywords(own, keys)}
        return shared, {**shared, "loss_config": dict(shared["loss_config"])}

    def forward(self, *columns: Any, **keywords: Any) -> Any:
        """(output, loss, metrics) of a batch as the trainer collates it: tensors named by `forward_columns`, keywords
        as `get_trainer_kwargs` makes them. What is left out has its default, what is unknown is ignored."""
        if type(self).train_on is TrainingDoors.train_on:
            raise NotImplementedError("The forward method is only supported on concrete speculator models")
        given = {**dict(zip(self.forward_columns, columns, strict=False)), **keywords}
        batch = self.packed_batch(**{name: given[name] for name in self.forward_columns if name in given})
        args = self.loss_args(given)
        if batch.last_hidden_TH is None:
            return self.forward_without_targets(batch, args)
        result = self.train_on(batch, args)
        self.row_flop = result.model_flop
        pairs = as_pairs({"loss": ratio(result.loss), **result.metrics})
        metrics = {"loss": result.loss.detach(), **pairs}
        return self.forward_output(batch, args, result, given), result.loss, metrics

    # -- reading keywords --------------------------------------------------------------------------------------------

    @classmethod
    def read_own(cls, given: Mapping[str, Any]) -> Any:
        """Its `training_args`, of keywords."""
        return cls.read_generic(cls.training_args, given)

    @classmethod
    def read_generic(cls, keys: type[Own], given: Mapping[str, Any]) -> Own:
        return read_keys(keys, given, {**cls.training_defaults, **cls.called_by_hand})

    @classmethod
    def generic_key(cls, given: Mapping[str, Any], keys: type[BaseModel], name: str) -> Any:
        """One generic key, as it was given or by default."""
        if given.get(name) is not None:
            return given[name]
        return {**cls.training_defaults, **cls.called_by_hand}.get(name, default_of(keys, name))

    @classmethod
    def keys_of_forward(cls) -> Mapping[str, str]:
        """Its own training keys that forwards read -> the keyword of `forward`."""
        if cls.forward_keys is not None:
            return cls.forward_keys
        return {name: name for name in cls.training_args.model_fields}


def validation_generator() -> torch.Generator:
    """The same samples in every validation: losses of epochs are compared."""
    return torch.Generator().manual_seed(0)
