"""Where a verifier lies: on one device, or with its layers on several by a device map, carried out by transformers and
accelerate. Layers on "disk" are read from their files at each forward.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


def device_of(model: nn.Module) -> torch.device:
    """The device to which the tokens of a forward go. Weights on disk have none of their own."""
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    hook = getattr(get_embedding(), "_hf_hook", None) if get_embedding is not None else None
    device = getattr(hook, "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)
