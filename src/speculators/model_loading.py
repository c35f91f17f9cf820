"""Copying a checkpoint's tensors into a model that was built for real, and the loader's options that mean something."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.config import SpeculatorModelConfig
from speculators.utils.loading import load_checkpoint
from speculators.utils.util import get_current_device

logger = logging.getLogger(__name__)

# Options of transformers' loader that mean nothing here: drafters are small and loaded in one piece.
_LOADER_OPTIONS_WITHOUT_EFFECT = (
    "low_cpu_mem_usage",
    "trust_remote_code",
    "proxies",
    "variant",
    "max_memory",
    "offload_folder",
    "tqdm_class",
    "_fast_init",
    "use_kernels",
)


MOST_VALUES = 1 << 32
"""Values of the largest tensor that is taken from the verifier: a vocabulary of 262,144 at a width of 16,384."""


class LoadOptions:
    """The options of transformers' `from_pretrained` that mean something here, taken out of its keyword arguments."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        for name in _LOADER_OPTIONS_WITHOUT_EFFECT:
            kwargs.pop(name, None)
        torch_dtype = kwargs.pop("torch_dtype", None)  # the name before transformers 5
        self.dtype = kwargs.pop("dtype", None) or torch_dtype or "auto"
        self.output_loading_info = kwargs.pop("output_loading_info", False)
        self.attn_implementation = kwargs.pop("attn_implementation", None)
        self.device = _single_device(kwargs.pop("device_map", None))

    def dtype_for(self, config: SpeculatorModelConfig, tensors: Mapping[str, Tensor]) -> torch.dtype:
        """As asked for; "auto" is what the config says, else what the tensors are."""
        dtype = self.dtype
        if dtype == "auto":
            stored = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
            dtype = config.dtype or next(stored, torch.get_default_dtype())
        found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"dtype={dtype!r} is not a floating type; say bfloat16, float16 or float32")
        return found


def _single_device(device_map: Any) -> torch.device:
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return get_current_device()
    if isinstance(device_map, Mapping):
        devices = set(device_map.values())
        if len(devices) != 1:
            raise ValueError(f"device_map={dict(device_map)} spreads a drafter over several devices; name one device")
        device_map = devices.pop()
    return torch.device(device_map)


def load_tensors(path: Any, hub: dict[str, Any]) -> dict[str, Tensor]:
    try:
        return load_checkpoint(path, **hub)
    except OSError as error:
        raise OSError(f"Can't load the weights of '{path}'. {error}") from error


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers hold ids, masks and rope frequencies, whose precision is not the weights'."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def mismatched_sizes(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[tuple[str, Any, Any]]:
    return [
        (key, tuple(tensors[key].shape), tuple(own[key].shape))
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]


def refuse_other_sizes(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[tuple[str, Any, Any]]:
    """Raises `ValueError` unless the tensors have the sizes of the model's. Asked of a model without data too, before
    memory is taken for one that a damaged config makes too large."""
    own = model.state_dict()
    if mismatched := mismatched_sizes(own, tensors):
        raise ValueError(
            "the checkpoint's tensors do not fit its config (name, shape in the checkpoint, shape by the config): "
            f"{mismatched}; correct config.json, or pass ignore_mismatched_sizes=True to leave these out"
        )
    if huge := [name for name, tensor in own.items() if name not in tensors and tensor.numel() > MOST_VALUES]:
        raise ValueError(f"config.json makes {huge} larger than any embedding or head; correct its vocabulary or sizes")
    return []


def copy_tensors(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], ignore_mismatched_sizes: bool
) -> dict[str, list[Any]]:
    own = model.state_dict()
    mismatched = mismatched_sizes(own, tensors) if ignore_mismatched_sizes else refuse_other_sizes(model, tensors)
    left_out = {key for key, *_ in mismatched}
    model.load_state_dict({k: v for k, v in tensors.items() if k in own and k not in left_out}, strict=False)
    missing = [key for key in own if key not in tensors and not _matches(key, model._keys_to_ignore_on_load_missing)]
    unexpected = [
        key for key in tensors if key not in own and not _matches(key, model._keys_to_ignore_on_load_unexpected)
    ]
    if missing:
        logger.warning("%s: the checkpoint lacks %s; they keep their initial values", type(model).__name__, missing)
    if unexpected:
        logger.warning("%s: the checkpoint's %s are not used", type(model).__name__, unexpected)
    return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched, "error_msgs": []}


def _matches(key: str, patterns: Any) -> bool:
    return any(re.search(pattern, key) for pattern in patterns or ())
