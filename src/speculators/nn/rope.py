"""Rotary position embedding, head-half split ("neox") style, every rope type of transformers, partial rotary.

Shapes: T positions, N heads, d head size, r = rotated part of d (r = d unless `partial_rotary_factor` < 1).

    rotate(x)_j = x_j cos(p w_j) - x_{j + r/2} sin(p w_j)          j < r/2
                  x_j cos(p w_{j - r/2}) + x_{j - r/2} sin(p w_{j - r/2})   otherwise

A Rope is no module and holds no weights: its tables follow from the config alone, so nothing can be lost on the meta
device, saved by accident or cast to bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from speculators.utils.util import WRONG_VALUE, load_transformer_config

DEFAULT_ROPE_THETA = 10_000.0
MIN_TABLE_POSITIONS = 256
BESIDE = ("rope_theta", "partial_rotary_factor")
"""Keys of rope that transformers 4 reads beside `rope_scaling`, not in it."""
MOST_HEAD_DIM = 65_536
"""A damaged config must not fill memory."""
DEPEND_ON_LENGTH = ("dynamic", "longrope")
"""Types that turn otherwise past the longest text."""


class RopeTables(NamedTuple):
    """cos and sign-folded sin of some positions: the first half of `sin` is negated, so that
    rotate(x) = x * cos + roll(x, r/2) * sin."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_BTNd: Tensor) -> Tensor:
        """Tables [..., T, r] for x [B, T, N, d]; features past r pass unrotated."""
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)
        if cos.dtype != x_BTNd.dtype:
            cos, sin = cos.to(x_BTNd.dtype), sin.to(x_BTNd.dtype)
        rotary_dim = cos.shape[-1]
        if rotary_dim == x_BTNd.shape[-1]:
            return torch.addcmul(x_BTNd * cos, x_BTNd.roll(rotary_dim // 2, -1), sin)
        turned, passed = x_BTNd[..., :rotary_dim], x_BTNd[..., rotary_dim:]
        turned = torch.addcmul(turned * cos, turned.roll(rotary_dim // 2, -1), sin)
        return torch.cat((turned, passed), dim=-1)

    def slice(self, start: int, end: int) -> RopeTables:
        return RopeTables(self.cos[start:end], self.sin[start:end])

    def at(self, positions: Tensor) -> RopeTables:
        return RopeTables(self.cos[positions], self.sin[positions])


def rope_parameters(config: Any) -> dict[str, Any]:
    """The flat rope parameters of a config, from the new spelling, the old one, or the class defaults."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        # One set for each layer type (gemma3 and friends): drafters slide, or take the first.
        parameters = parameters.get("sliding_attention") or next(iter(parameters.values()))
    parameters = dict(parameters)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", None) or DEFAULT_ROPE_THETA)
    return parameters


def with_older_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to the values of a decoder config rope as transformers 4 reads it, which ignores `rope_parameters` and takes
    the default: `rope_theta` and, where rope is scaled, `rope_scaling`. What transformers 5 makes of both is the same.
    One set for each kind of layer stays as it is: no older reader has such."""
    inside = values.get("rope_parameters")
    if not isinstance(inside, Mapping) or any(isinstance(value, Mapping) for value in inside.values()):
        return dict(values)
    beside = {key: inside[key] for key in BESIDE if inside.get(key) is not None}
    scaling = {key: value for key, value in inside.items() if key not in BESIDE}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {**values, **beside, "rope_scaling": scaling if is_scaled else None}


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def inverse_frequencies(config: Any) -> tuple[Tensor, float]:
    """(w [r/2] in fp32, factor on cos and sin) of a decoder config."""
    parameters = rope_parameters(config)
    rope_type = parameters["rope_type"]
    if head_dim(config) > MOST_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim(config)} is no size of a head; at most {MOST_HEAD_DIM} is read")
    if rope_type in ("default", "mrope"):  # mrope equals plain rope on text
        factor = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
        rotary_dim = int(head_dim(config) * factor)
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    if rope_type not in ROPE_INIT_FUNCTIONS:
        known = sorted(["default", "mrope", *ROPE_INIT_FUNCTIONS])
        raise ValueError(f"rope_type={rope_type!r} is not known; use one of {known} in `rope_parameters`")
    # The scale that depends on length (longrope, dynamic) is chosen once, for the longest sequence the config allows:
    # keys rotated with different frequencies cannot share a cache.
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=config.max_position_embeddings)


def rope_numbers(layers: Mapping[str, Any], model_type: str) -> list[float] | None:
    """The factor on cos and sin, then the frequencies, of layers that config.json describes, by transformers' reading
    of it; last, where they depend on it while decoding, the longest text. `model_type`: of a description that says
    none. None where it cannot be read, or the layers do not rotate."""
    try:
        config: Any = load_transformer_config(copy.deepcopy(dict(layers)), model_type)
        frequencies, factor = inverse_frequencies(config)
        depends = rope_parameters(config)["rope_type"] in DEPEND_ON_LENGTH
        longest = [float(config.max_position_embeddings)] if depends else []
    except (ValueError, *WRONG_VALUE):
        return None
    return [float(factor), *frequencies.tolist(), *longest]


class Rope:
    """Tables of a decoder config, grown on demand and kept for each device and dtype."""

    def __init__(self, config: Any):
        self.config = config
        self._tables: dict[tuple[torch.device, torch.dtype], RopeTables] = {}

    def tables(self, num_positions: int, device: torch.device, dtype: torch.dtype) -> RopeTables:
        """Tables of at least the positions 0 .. num_positions - 1."""
        held = self._tables.get((device, dtype))
        if held is None or held.cos.shape[0] < num_positions:
            size = max(MIN_TABLE_POSITIONS, 1 << max(num_positions - 1, 1).bit_length())
            held = self.at(torch.arange(size, device=device), dtype)
            self._tables[(device, dtype)] = held
        return held

    def at(self, positions: Tensor, dtype: torch.dtype) -> RopeTables:
        """Tables of the given positions (any shape), computed directly: no limit on how large they are."""
        frequencies, factor = inverse_frequencies(self.config)
        angles = positions.unsqueeze(-1).float() * frequencies.to(positions.device, non_blocking=True)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return RopeTables(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def is_frequency_table(tensor: Tensor, config: Any) -> bool:
    """Says whether the tensor is what old releases of transformers saved of a rotary embedding without scaling."""
    if config is None or rope_parameters(config)["rope_type"] != "default":
        return False
    size = head_dim(config)
    table = rope_parameters(config)["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return tensor.shape == table.shape and torch.allclose(tensor.float(), table, rtol=1e-2)
