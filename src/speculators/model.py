"""`SpeculatorModel`, the base of every drafter: found by name, loaded and saved, trained and served through its hooks.

A checkpoint is a Hugging Face directory. Loading builds the model for real and copies the tensors in, so whatever a
checkpoint leaves out keeps the value its constructor gave it (transformers' own loader fills it with noise).
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from speculators.checkpoint.formats import SPECULATORS, CheckpointContract, build_without_data
from speculators.config import SpeculatorModelConfig
from speculators.draft_vocab import DraftVocabMixin
from speculators.interfaces import CaptureSpec, VerifierStates
from speculators.model_loading import LoadOptions, cast_parameters, copy_tensors, load_tensors, refuse_other_sizes
from speculators.model_training import NoTrainingArgs, TrainingDoors
from speculators.utils.names import did_you_mean
from speculators.utils.registry import ClassRegistryMixin
from speculators.utils.util import bounded_build, reading
from speculators.verifier.config import first_line

if TYPE_CHECKING:
    from speculators.interfaces import Proposer, TreeDrafter

__all__ = ["DraftVocabMixin", "NoTrainingArgs", "SpeculatorModel"]


class SpeculatorModel(ClassRegistryMixin, TrainingDoors, PreTrainedModel):
    """Base of the drafters. To add one, see `speculators.models`."""

    auto_package: ClassVar[str] = "speculators.models"
    entry_point_group: ClassVar[str] = "speculators.models"
    registry_auto_discovery: ClassVar[bool] = True

    config_class = SpeculatorModelConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_missing: list[str] = []
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    all_tied_weights_keys: dict[str, str] = {}  # for classes that do not call post_init

    # What an algorithm may say about itself, beside what it says of its training; each has a working default.
    contract: ClassVar[CheckpointContract] = CheckpointContract()
    """What a checkpoint must hold, what vLLM makes of it, and the formats of other projects."""
    checkpoint_formats: ClassVar[tuple[str, ...]] = (SPECULATORS,)
    """Names of the checkpoint formats the algorithm reads or writes: ours and those of its contract."""
    uses_every_weight: ClassVar[bool] = False
    """Every row gives every trained weight a gradient, if only zeros, so that no rank has to look for those without."""
    layer_methods: ClassVar[tuple[str, ...]] = ()
    """Methods of its `layers`, beside `forward`, whose products its training reads: FSDP gathers weights for them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.checkpoint_formats = (SPECULATORS, *(known.name for known in cls.contract.formats))

    def __init__(self, config: SpeculatorModelConfig, **kwargs: Any) -> None:
        if not config:
            raise ValueError(f"Config must be provided to initialize a SpeculatorModel, got {config!r}")
        _check_is_config(config)
        config.tie_word_embeddings = False
        super().__init__(config)
        self.config = config

    # -- finding classes ---------------------------------------------------------------------------------------------

    @classmethod
    def get_class(cls, name: str) -> type[SpeculatorModel]:
        """The model class of an algorithm, imported if need be."""
        found = SpeculatorModel.find(name)
        if found is None:
            available = SpeculatorModel.available_names()
            hint = did_you_mean(name, available) if isinstance(name, str) else ""
            raise ValueError(f"Unknown speculator type: {name!r}. Available: {available}.{hint}")
        return found

    @classmethod
    def registered_model_class_from_config(cls, config: SpeculatorModelConfig) -> type[SpeculatorModel]:
        """The registered class whose `config_class` is exactly the config's type."""
        _check_is_config(config)
        if type(config) is SpeculatorModelConfig:
            raise TypeError(
                "Received a SpeculatorModelConfig instance but expected a subclass of it; build the config with its "
                "own class or with SpeculatorModelConfig.from_dict, which picks it"
            )
        SpeculatorModel.find(config.speculators_model_type)
        registry = SpeculatorModel.registry or {}
        if not registry:
            raise ValueError("No registered model classes found; import the module that registers your model")
        for model_class in registry.values():
            if model_class.config_class is type(config):
                return model_class
        raise ValueError(
            f"No registered model class found for config type {type(config).__name__}; registered: {list(registry)}"
        )

    @classmethod
    def verify_training_compatible(cls, model: nn.Module) -> None:
        """Raise unless the trainer can train `model`."""
        if not isinstance(model, SpeculatorModel):
            raise TypeError(f"Expected a SpeculatorModel to train, got {type(model).__name__}")
        registry = SpeculatorModel.registry or {}
        if type(model) not in registry.values():
            raise ValueError(f"{type(model).__name__} is not a registered speculator; registered: {list(registry)}")
        if not hasattr(model, "layers"):
            raise AttributeError(f"{type(model).__name__} has no attribute 'layers': the ModuleList of its layers")

    # -- hooks of an algorithm ---------------------------------------------------------------------------------------

    @property
    def capture(self) -> CaptureSpec:
        """Says which verifier states the drafter reads; by default those of its `target_layer_ids`, and the last."""
        return CaptureSpec(aux_layer_ids=tuple(getattr(self, "target_layer_ids", None) or ()), last_hidden=True)

    @staticmethod
    def align(sample: dict[str, Any]) -> dict[str, Any]:
        """Shift one sample's columns as `forward` expects them, before samples are packed."""
        return sample

    def make_tree_drafter(
        self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int
    ) -> TreeDrafter:
        """Builds what grows draft trees at decode time."""
        raise ValueError(f"{type(self).__name__} drafts chains only; leave out speculative_token_tree and dynamic_tree")

    def make_proposer(self, verifier_model: PreTrainedModel, *, max_batch_size: int, max_length: int) -> Proposer:
        """Builds what drafts with this model at decode time."""
        raise NotImplementedError(f"{type(self).__name__} does not implement make_proposer: it can only be trained")

    def draft_logits(self, states: VerifierStates, num_drafts: int) -> Tensor | None:
        """What the training forward predicts in the places of the last `num_drafts` tokens, each on the tokens before
        it: [K, V] logits over the verifier's vocabulary, -inf for tokens that cannot be drafted. States are zeros from
        the last token before the drafts on: nobody knows them when drafting. The parity gate compares this with what
        the proposer drafted; None: the algorithm has no such answer, and the gate says that nothing was compared."""
        return None

    def training_row(self, states: VerifierStates, loss_mask_T: Tensor | None = None) -> dict[str, Tensor]:
        """One sequence as the trainer hands it to `forward`: aligned, packed alone, without padding. `loss_mask_T`:
        int64, 1 where a token is supervised; None: everywhere."""
        num_tokens, last_TH = len(states.token_ids_T), states.last_hidden_TH
        assert last_TH is not None
        sample = self.align(
            {
                "hidden_states": last_TH[:, :0] if states.aux_TD is None else states.aux_TD,
                "verifier_last_hidden_states": last_TH,
                "input_ids": states.token_ids_T,
                "loss_mask": torch.ones_like(states.token_ids_T) if loss_mask_T is None else loss_mask_T,
                "position_ids": torch.arange(num_tokens, device=last_TH.device),
            }
        )
        row = {"document_ids": torch.zeros_like(sample["input_ids"]), **sample}
        return {key: values[None] for key, values in row.items()}

    def load_vocab_mappings(self, t2d: Tensor | None, d2t: Tensor | None) -> None:
        """Set the draft vocabulary; nothing to do for a model without one."""

    def load_verifier_weights(self) -> None:
        """Fill the weights that are the verifier's; nothing to do for a model without any."""

    # -- saving and loading --------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # type: ignore[override]
        """Saves as transformers does, after the contract's check: engines do not report missing tensors."""
        self.contract.check_before_saving(self, kwargs.get("state_dict") or self.state_dict())
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def to_be_loaded(cls, config: SpeculatorModelConfig, *args: Any, **kwargs: Any) -> SpeculatorModel:
        """The model a checkpoint's tensors are copied into. What the constructor would fetch from elsewhere can wait:
        `load_verifier_weights` is called at the end."""
        return cls(config, *args, **kwargs)

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *,
        output_loading_info: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Self: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        verifier: str | os.PathLike | None = None,
        config: SpeculatorModelConfig | None = None,
        cache_dir: str | os.PathLike | None = None,
        ignore_mismatched_sizes: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        use_safetensors: bool | None = None,
        weights_only: bool = True,
        t2d: Tensor | None = None,
        d2t: Tensor | None = None,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """The model of a checkpoint directory, a hub id, or a config and a `state_dict`.

        `verifier` says where the verifier lies now, if not where the checkpoint recorded it. `dtype` ("auto": as
        stored), `device_map` (one device) and `output_loading_info` work as in transformers. Called on
        `SpeculatorModel`, the checkpoint decides the class."""
        path, state_dict = pretrained_model_name_or_path, kwargs.pop("state_dict", None)
        hub = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": kwargs.pop("subfolder", ""),
        }
        if config is None:
            if path is None:
                raise ValueError("Either `config` or `pretrained_model_name_or_path` must be provided to load a model")
            config = SpeculatorModelConfig.from_pretrained(path, **hub)
        _check_is_config(config)
        if path is None and state_dict is None:
            raise ValueError("Either `pretrained_model_name_or_path` or `state_dict` must be provided to load a model")
        model_class = cls._class_to_load(config)

        config.tie_word_embeddings = False
        config = copy.deepcopy(config)
        config.name_or_path = str(path or "")
        if verifier is not None and config.speculators_config is not None:
            config.speculators_config.verifier.name_or_path = str(verifier)
        options = LoadOptions(kwargs)
        if options.attn_implementation is not None and hasattr(config, "transformer_layer_config"):
            config.transformer_layer_config._attn_implementation = options.attn_implementation

        tensors = state_dict if state_dict is not None else load_tensors(path, hub)
        if not ignore_mismatched_sizes:
            refuse_other_sizes(build_without_data(model_class, config), tensors)
        with bounded_build("config.json"), reading("config.json"):
            model = model_class.to_be_loaded(config, *model_args, **kwargs)
        cast_parameters(model, options.dtype_for(config, tensors))
        loading_info = copy_tensors(model, tensors, ignore_mismatched_sizes)
        nn.Module.to(model, options.device)
        model.eval()
        model.load_vocab_mappings(t2d, d2t)
        try:
            model.load_verifier_weights()
        except OSError as error:
            raise ValueError(
                f"the verifier {config.recorded_verifier!r} that the checkpoint names cannot be read "
                f"({first_line(error)}); name its directory or hub id with verifier=..."
            ) from error
        loaded = cast("Self", model)
        return (loaded, loading_info) if options.output_loading_info else loaded

    @classmethod
    def expected_tensors(cls, config: SpeculatorModelConfig) -> dict[str, Tensor]:
        """Returns name, shape and dtype of every tensor on disk, without data, for a checkpoint with this config."""
        model_class = cls._class_to_load(config)
        return model_class.contract.expected_tensors(model_class, config)

    @classmethod
    def _class_to_load(cls, config: SpeculatorModelConfig) -> type[SpeculatorModel]:
        if cls is SpeculatorModel:
            return cls.registered_model_class_from_config(config)
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"{cls.__name__} cannot load a '{config.speculators_model_type}' checkpoint "
                f"({type(config).__name__}); use SpeculatorModel.from_pretrained, which picks the class"
            )
        return cls


def _check_is_config(config: Any) -> None:
    if not isinstance(config, SpeculatorModelConfig):
        raise TypeError(f"Expected config to be an instance of SpeculatorModelConfig, got {type(config).__name__}")
