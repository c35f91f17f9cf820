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
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype


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


def copy_tensors(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], ignore_mismatched_sizes: bool
) -> dict[str, list[Any]]:
    own = model.state_dict()
    mismatched = [
        (key, tuple(tensors[key].shape), tuple(own[key].shape))
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if mismatched and not ignore_mismatched_sizes:
        raise ValueError(
            "the checkpoint's tensors do not fit its config (name, shape in the checkpoint, shape by the config): "
            f"{mismatched}; correct config.json, or pass ignore_mismatched_sizes=True to leave these out"
        )
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
