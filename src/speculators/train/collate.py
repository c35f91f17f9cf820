"""Packing samples into one row.

Shapes: S tokens of a document, T tokens of the packed row. A sample is a dict of tensors whose first axis is S.

    documents     a a a | b b              document_ids   0 0 0 1 1 -1 -1
    position_ids  0 1 2   0 1              (positions restart; padding is 0 everywhere else)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Sample = dict[str, Tensor]


class CollateFn:
    """Concatenate samples to one row of `max_len` tokens, padded or cut, with a leading axis of one."""

    def __init__(
        self,
        max_len: int,
        hidden_size: int,
        num_target_layers: int = 3,
        dtype: torch.dtype = torch.bfloat16,
        preprocess: Callable[[Sample], Sample] | None = None,
    ):
        self.max_len = max_len
        self.dtype = dtype
        self.preprocess = preprocess
        self.empty: Sample = {
            "hidden_states": torch.zeros(0, num_target_layers * hidden_size, dtype=dtype),
            "verifier_last_hidden_states": torch.zeros(0, hidden_size, dtype=dtype),
            "input_ids": torch.zeros(0, dtype=torch.int64),
            "loss_mask": torch.zeros(0, dtype=torch.int64),
            "position_ids": torch.zeros(0, dtype=torch.int64),
            "lengths": torch.zeros(1, dtype=torch.int64),
        }

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """`None` stands for a sample that could not be had; `error_records` counts them."""
        present = [sample for sample in samples if sample is not None]
        num_missing = len(samples) - len(present)
        present = present or [self.empty]
        if self.preprocess is not None and present[0] is not self.empty:
            present = [self.preprocess(sample) for sample in present]
        lengths = [int(sample["lengths"]) for sample in present]
        document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        row = {key: torch.cat([sample[key] for sample in present]) for key in present[0] if key != "lengths"}
        row = {key: self.fit(value.to(self.dtype) if "hidden_states" in key else value) for key, value in row.items()}
        row["document_ids"] = self.fit(document_ids, padding=-1)
        row["error_records"] = torch.tensor(num_missing)
        return row

    def fit(self, values: Tensor, padding: int = 0) -> Tensor:
        """[S, ...] -> [1, max_len, ...]"""
        values = values[: self.max_len]
        rest = values.new_full((self.max_len - len(values), *values.shape[1:]), padding)
        return torch.cat([values, rest])[None]
