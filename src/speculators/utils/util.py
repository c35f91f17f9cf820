"""Finds the device to work on: CUDA, Ascend NPU or CPU."""

from __future__ import annotations

import importlib.util

import torch


def is_npu_available() -> bool:
    """Says whether this machine has an Ascend NPU and its torch package."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    return hasattr(torch, "npu") and bool(torch.npu.is_available())


def _kind() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "npu" if is_npu_available() else "cpu"


def get_current_device() -> torch.device:
    """Returns the accelerator that this process uses, else the CPU."""
    kind = _kind()
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, getattr(torch, kind).current_device())


def get_device_name() -> str:
    """Returns the device's name for display: "NVIDIA H100 80GB HBM3", "cpu"."""
    kind = _kind()
    return "cpu" if kind == "cpu" else getattr(torch, kind).get_device_name()


def mem_get_info() -> tuple[int, int]:
    """Returns (free, total) bytes of the accelerator; (0, 0) on the CPU."""
    kind = _kind()
    return (0, 0) if kind == "cpu" else getattr(torch, kind).mem_get_info()


def empty_cache() -> None:
    """Returns cached accelerator memory to the device; does nothing on the CPU."""
    kind = _kind()
    if kind != "cpu":
        getattr(torch, kind).empty_cache()
