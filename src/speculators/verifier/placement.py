"""Where a verifier lies: on one device, with its layers on several by a device map, carried out by transformers and
accelerate (layers on "disk" are read from their files at each forward), or with a slice of each layer on every rank of
torchrun, by the tensor-parallel plan that transformers has for it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from speculators.verifier.config import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUTO, DISK = "auto", "disk"
DeviceMap = str | dict[str, str | int]


def refuse_missing_device(device: torch.device | str | int | None) -> None:
    """Before anything is loaded, and in words of ours: torch only asserts."""
    try:
        wanted = torch.device(device if device is not None else "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown to torch; use cpu, cuda, cuda:1, ...") from error
    num_devices = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= num_devices:
        raise ValueError(f"device={str(device)!r} but torch sees {num_devices} CUDA devices; use cpu or another one")


def read_device_map(given: str) -> DeviceMap:
    """`auto` (transformers fills one device after the other), or the map in a JSON file:

        {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": "disk"}

    Raises `ValueError`, before any weight is read, for a file that holds no map, a device that torch does not have, and
    without the package that it takes.
    """
    found = AUTO if given == AUTO else map_in_file(given)
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError(f"--verifier-device-map {given} takes the package accelerate: pip install accelerate")
    return found


def map_in_file(given: str) -> DeviceMap:
    try:
        found: Any = json.loads(Path(given).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--verifier-device-map {given} is neither `auto` nor a JSON file: {error}") from error
    is_map = isinstance(found, dict) and found and all(type(place) in (str, int) for place in found.values())
    if not is_map:
        raise ValueError(f'--verifier-device-map {given} must hold an object such as {{"model.layers.0": 0, ...}}')
    for place in found.values():
        if place != DISK:
            refuse_missing_device(f"cuda:{place}" if isinstance(place, int) else place)
    return dict(found)


SPLIT_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
"""Of a config: every rank takes an equal share of them."""


def refuse_unsplittable(config: PreTrainedConfig, num_ranks: int) -> None:
    """Raises `ValueError` for a verifier without a tensor-parallel plan, or whose heads the ranks cannot share equally.
    No weight is read."""
    language_model = text_config(config)
    other_ways = "spread its layers with --verifier-device-map on one rank, or ask a server with --vllm-endpoint"
    if not getattr(language_model, "base_model_tp_plan", None):
        raise ValueError(
            f"--verifier-tp: transformers has no tensor-parallel plan for {config.model_type}: {other_ways}"
        )
    sizes = {name: size for name in SPLIT_SIZES if type(size := getattr(language_model, name, None)) is int}
    odd = next((f"{name}={size}" for name, size in sizes.items() if size % num_ranks), None)
    if odd is not None:
        raise ValueError(
            f"--verifier-tp: {num_ranks} ranks cannot share {odd} of the verifier equally: start a number of ranks "
            f"that divides it, {other_ways}"
        )


def spread_by(device_map: DeviceMap | None, tp_size: int) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that say it."""
    if tp_size == 1:
        return {"device_map": device_map}
    from transformers.distributed.configuration_utils import DistributedConfig  # only who splits a model pays for it

    return {"distributed_config": DistributedConfig(tp_size=tp_size)}


def device_of(model: nn.Module) -> torch.device:
    """The device to which the tokens of a forward go. Weights on disk have none of their own."""
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    hook = getattr(get_embedding(), "_hf_hook", None) if get_embedding is not None else None
    device = getattr(hook, "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)
